"""The head map refuses what cannot be one."""

from __future__ import annotations

import pytest
import torch

from qkov_lightning import Projection, contiguous_heads
from qkov_lightning.capture.factors import GradientFactors
from qkov_lightning.capture.gradients import head_gradients
from qkov_lightning.heads.projections import check_unique


def projection(features: torch.Tensor, block: str = "Q", **kwargs: int) -> Projection:
    return Projection("layers.0.q_proj", 0, "layers.0", block, features, **kwargs)


def test_heads_own_outputs_of_q_k_v_and_inputs_of_o() -> None:
    assert [projection(contiguous_heads(2, 3), block).feature_axis for block in "QKVO"] == ["output"] * 3 + [
        "input"
    ]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.tensor([[0, 1], [1, 2]]), "repeats a feature"),
        (torch.tensor([[0, -1]]), "has a negative one"),
        (torch.zeros(0, 2, dtype=torch.int64), "expected a non-empty int64 tensor"),
        (torch.tensor([[0, 1]], dtype=torch.int32), "dtype torch.int32, expected a non-empty int64"),
    ],
)
def test_head_features_that_cannot_be_heads_are_refused(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projection(features)


def test_a_query_group_of_zero_and_an_unknown_block_are_refused() -> None:
    with pytest.raises(ValueError, match="query_group is 0, expected at least 1"):
        projection(contiguous_heads(1, 2), query_group=0)


def test_one_block_of_one_layer_is_placed_once() -> None:
    twice = [projection(contiguous_heads(1, 2)), projection(contiguous_heads(1, 2))]
    with pytest.raises(
        ValueError, match=r"block Q is placed twice, in `layers\.0\.q_proj` and in `layers\.0\.q_proj`"
    ):
        check_unique(twice)


def test_a_feature_beyond_the_module_is_refused() -> None:
    factors = GradientFactors(torch.randn(4, 8), torch.randn(4, 6), torch.tensor([0, 2, 4]))
    with pytest.raises(
        ValueError, match=r"claims feature 7 of `layers.0.q_proj`, which has 6 output features"
    ):
        head_gradients(factors, projection(contiguous_heads(2, 4)), torch.ones(2))
