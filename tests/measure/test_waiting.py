"""Samples that wait for each other before they are summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import Classifier, GroupedAttention
from torch import Tensor

from qkov_lightning import find_projections
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import head_gradients
from qkov_lightning.capture.samples import Samples
from qkov_lightning.measure import waiting
from qkov_lightning.measure.allotment import SweptHeads, heads_of
from qkov_lightning.measure.waiting import WaitingGradients

MODEL = Classifier([GroupedAttention() for _ in range(2)], width=10)
PROJECTIONS = find_projections(MODEL)
TOKENS = 7


def heads() -> dict[int, SweptHeads]:
    return dict(enumerate(heads_of(MODEL, PROJECTIONS, 4)))


def steps(sizes: list[int], lengths: list[int] | None = None) -> list[CapturedStep]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for number, size in enumerate(sizes):
        factors = {}
        offsets = torch.tensor([0, *(lengths or [TOKENS] * size)]).cumsum(0)
        for one in PROJECTIONS:
            outputs, inputs = MODEL.get_submodule(one.module_name).weight.shape
            factors[one.module_name] = GradientFactors(
                torch.randn(int(offsets[-1]), inputs, generator=generator),
                torch.randn(int(offsets[-1]), outputs, generator=generator),
                offsets,
            )
        names = tuple(f"s{number}.{i}" for i in range(size))
        scales = torch.rand(size, generator=generator) + 0.5
        result.append(CapturedStep(Samples(("code",) * size, names), scales, torch.ones(size), factors))
    return result


def handed_over(
    some: dict[int, SweptHeads], given: list[CapturedStep]
) -> dict[int, list[tuple[Tensor, list[int]]]]:
    """Gradients and places of their samples, by the place of the heads."""
    result: dict[int, list[tuple[Tensor, list[int]]]] = {place: [] for place in some}

    def reduce(place: int, block: Tensor, where: Tensor) -> None:
        result[place].append((block.clone(), where.tolist()))

    line = WaitingGradients(some, reduce, torch.device("cpu"))
    first = 0
    for step in given:
        line.take(first, step)
        first += len(step.samples)
    line.flush()
    line.flush()
    return result


@pytest.mark.parametrize("sizes", [[1], [1] * 9, [3, 1, 4, 1, 5], [40, 1, 1]])
def test_every_gradient_arrives_once_in_order(sizes: list[int]) -> None:
    own = heads()
    for place, blocks in handed_over(own, steps(sizes)).items():
        projection = own[place].projection
        expected = torch.cat([
            head_gradients(step.factors[projection.module_name], projection, step.scales)
            for step in steps(sizes)
        ])
        assert [one for _, where in blocks for one in where] == list(range(sum(sizes)))
        torch.testing.assert_close(torch.cat([block for block, _ in blocks]), expected)


def test_samples_of_other_lengths_formats_and_layers_wait_together() -> None:
    """One sample without a token, half precision beside double, and a layer that a step passes by."""
    given = steps([3] * 4, lengths=[2, 0, 3])
    for number, step in enumerate(given):
        for name, own in step.factors.items():
            dtype = torch.float64 if name.startswith("layers.1") else torch.bfloat16
            step.factors[name] = replace(
                own, activation=own.activation.to(dtype), grad_output=own.grad_output.to(dtype)
            )
        if number == 1:
            del step.factors["layers.0.o_proj"]
    own = heads()
    for place, blocks in handed_over(own, given).items():
        projection = own[place].projection
        seen = [number for number, step in enumerate(given) if projection.module_name in step.factors]
        expected = torch.cat([
            head_gradients(given[number].factors[projection.module_name], projection, given[number].scales)
            for number in seen
        ])
        places = [3 * number + i for number in seen for i in range(3)]
        assert [one for _, where in blocks for one in where] == places
        assert any(len(where) > 3 for _, where in blocks) or projection.layer == 1
        torch.testing.assert_close(torch.cat([block for block, _ in blocks]), expected)


def test_which_samples_come_together_does_not_depend_on_what_is_swept_along() -> None:
    sizes = [1, 2, 1, 1, 3, 1, 1, 1, 2, 1]
    together = handed_over(heads(), steps(sizes))
    assert any(len(where) > 1 for _, where in together[0])
    for place, own in heads().items():
        (alone,) = handed_over({place: own}, steps(sizes)).values()
        assert [where for _, where in alone] == [where for _, where in together[place]]
        for (block, _), (other, _) in zip(alone, together[place], strict=True):
            assert torch.equal(block, other)


def test_waiting_factors_are_few() -> None:
    """Of heads of 200 weights: 7 x (20 + 10) numbers a sample, and four numbers a weight in all."""
    own = max(heads().values(), key=lambda one: one.size)
    assert (own.size, own.shape) == (200, (20, 10))
    (blocks,) = handed_over({0: own}, steps([1] * 7)).values()
    assert [len(where) for _, where in blocks] == [1, 3, 3]


def test_not_all_layers_hand_over_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 95 samples: the first group of the lowest layer is an eighth of that."""
    monkeypatch.setattr(waiting, "WAITING", 100)
    own = {one.projection.layer: one for one in heads().values() if one.size == 200}
    blocks = handed_over(own, steps([1] * 120))
    assert [len(where) for _, where in blocks[0]] == [11, 95, 14]
    assert [len(where) for _, where in blocks[1]] == [23, 95, 2]


def test_long_samples_and_large_steps_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BLOCK_BYTES", 3 * 200 * 4)
    monkeypatch.setattr(waiting, "WAITING", 100)
    own = max(heads().values(), key=lambda one: one.size)
    (blocks,) = handed_over({0: own}, steps([1, 1, 5, 1, 1, 1, 1])).values()
    # The first share has no room even for one.
    assert [where for _, where in blocks] == [[0], [1], [2, 3, 4, 5, 6], [7, 8, 9], [10]]
    monkeypatch.setattr(waiting, "WAITING", 1)
    (blocks,) = handed_over({0: own}, steps([1, 1])).values()
    assert [where for _, where in blocks] == [[0], [1]]
