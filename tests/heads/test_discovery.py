"""Heads found by derivatives alone are the heads that the model has, whatever things are called."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import test_architectures as hub
import test_families as unusual
import torch
from random_attention import Drawn, draw
from shadowed import Shadowed
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import (
    ArchitectureError,
    Projection,
    find_projections,
    register_architecture,
    verify_capture,
    verify_projections,
)
from qkov_lightning.heads.maps import find_map

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of transformers on kernels that are not installed

Facts = list[tuple[Any, ...]]


def facts(projections: list[Projection], called: Any = lambda name: name) -> Facts:
    return sorted(
        (tuple(map(called, p.map_names)), p.block, p.query_group, tuple(map(tuple, p.head_features.tolist())))
        for p in projections
    )


def named_features(model: nn.Module, projection: Projection) -> list[list[tuple[str, int]]]:
    """For each head the name of its map, and its features there."""
    names = projection.map_names
    starts = find_map(model, projection).starts if len(names) > 1 else {names[0]: 0}
    rows = []
    for features in projection.head_features.tolist():
        owner = max((n for n in names if starts[n] <= features[0]), key=starts.__getitem__)
        rows.append([(owner, feature - starts[owner]) for feature in features])
    return rows


def heads_of(drawn: Drawn, projections: list[Projection]) -> list[dict[str, list[list[tuple[str, int]]]]]:
    found: list[dict[str, list[list[tuple[str, int]]]]] = [{} for _ in drawn.truth]
    for projection in projections:
        for block in (projection.block, *projection.also):
            found[projection.layer][block] = named_features(drawn.model, projection)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_random_attention_is_placed_right_or_refused(seed: int) -> None:
    drawn = draw(seed)
    design = drawn.design
    if design.tiled and 1 < design.kv_heads < design.heads:
        # Heads of a group that do not stand side by side have no place in a heatmap.
        with pytest.raises(ArchitectureError, match="do not stand side by side"):
            find_projections(drawn.model, drawn.batch)
    else:
        assert heads_of(drawn, find_projections(drawn.model, drawn.batch)) == drawn.truth


@pytest.mark.parametrize("seed", [2, 4, 10, 12, 21])
def test_captured_gradients_of_found_maps_are_those_of_autograd(seed: int) -> None:
    """Modules, convolutions, einsum, parameters, and a module for each head."""
    drawn = draw(seed)
    model, batch = drawn.model.double(), drawn.batch.double()
    projections = find_projections(model, batch)
    verification = verify_capture(
        model, batch, loss=lambda m, x: m(x).square().mean(), loss_reduction="mean", projections=projections
    )
    assert verification.passed, verification.summary
    assert all(cell.error is not None for cell in verification.cells)
    assert verify_projections(model, batch, projections).passed


@pytest.mark.parametrize("family", [*hub.FAMILIES, *unusual.FAMILIES])
def test_without_names_the_heads_are_those_that_names_give(family: str) -> None:
    if family in hub.FAMILIES:
        model, batch = hub.build(family, **hub.FAMILIES[family]), hub.sample_for(family)
    else:
        model, batch = unusual.build(family), unusual.FAMILIES[family][2]()
    shadowed = Shadowed(model)
    named, found = facts(find_projections(model)), facts(find_projections(shadowed, batch), shadowed.named)
    if family == "lilt":  # its second stream, of layouts, attends as well
        found = [one for one in found if "layout" not in one[0][0]]
    assert found == named


def test_the_model_is_left_bit_identical() -> None:
    model = hub.build("llama", **hub.FAMILIES["llama"]).train()
    model.model_buffer = nn.BatchNorm1d(4)
    before = copy.deepcopy(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    first = facts(find_projections(model, hub.sample_for("llama")))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert facts(find_projections(model, hub.sample_for("llama"))) == first


class Homework(nn.Module):
    """Attention as it is written in a lecture, with one thing changed at a time."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change
        self.one, self.two, self.three, self.four = (nn.Linear(12, 12) for _ in range(4))
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.mask = nn.Parameter(torch.rand(12, 12))
        self.router = nn.Linear(12, 2)
        self.fifth = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        first = (
            functional.linear(x, self.one.weight * self.mask) if self.change == "computed" else self.one(x)
        )
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (first, self.two(x), self.three(x)))
        scores = q @ k.transpose(-1, -2) / math.sqrt(4)
        if self.change == "mixed":
            scores = torch.einsum("bhqk,hg->bgqk", scores, self.mix)
        if self.change == "no softmax":
            return x + self.four((scores @ v).transpose(1, 2).flatten(2))
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if self.change == "twice":
            return x + self.four(context) + self.fifth(context)
        if self.change == "no output":
            return self.fifth(functional.layer_norm(x + context, (12,))) + x + context
        weights = self.router(x).softmax(-1)
        return x + weights[..., :1] * self.four(context)


def blocks(change: str) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(Homework(change), nn.Linear(12, 3))
    return "".join(p.block for p in find_projections(model, torch.randn(2, 5, 12)))


def test_a_router_beside_attention_is_no_attention() -> None:
    assert blocks("") == "QKVO"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("computed", "its block Q comes from a weight that is computed from others"),
        ("mixed", "a weight changes its scores after queries have met keys"),
        ("twice", "several linear maps take its result"),
        ("no softmax", "no softmax over tokens whose scores come from linear maps"),
    ],
)
def test_what_has_no_slices_is_refused_in_words(change: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        blocks(change)


def test_what_does_not_stand_alone_is_no_output_projection() -> None:
    assert blocks("no output") == "QKV"


def test_a_registered_class_is_left_to_its_recogniser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.stage, "_registered", {})
    register_architecture("Homework", lambda attention: {})
    with pytest.raises(ArchitectureError, match="No attention was seen"):
        blocks("")


def test_keys_and_values_of_other_sizes_are_found_in_torch_attention() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, kdim=10, vdim=8, batch_first=True)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(x, key, value)[0]

    model = Cross().double()
    batch = tuple(torch.randn(2, 5, size, dtype=torch.float64) for size in (12, 10, 8))
    projections = find_projections(model, batch)
    assert [(p.module_name, p.block) for p in projections] == [
        ("attention.q_proj_weight", "Q"),
        ("attention.k_proj_weight", "K"),
        ("attention.v_proj_weight", "V"),
        ("attention.out_proj", "O"),
    ]
    assert all(torch.equal(p.head_features, torch.arange(12).view(3, 4)) for p in projections)
    verification = verify_capture(
        model, batch, loss=lambda m, b: m(*b).square().mean(), loss_reduction="mean", projections=projections
    )
    assert verification.passed, verification.summary


def test_keys_that_are_values_are_named_as_both_and_proven_as_both() -> None:
    model = hub.gemma(
        family="gemma4_text",
        num_kv_shared_layers=0,
        attention_k_eq_v=True,
        global_head_dim=16,
        num_global_key_value_heads=1,
    )
    shared = [p for p in find_projections(model) if p.also]
    assert shared
    assert {(p.block, p.also) for p in shared} == {("K", ("V",))}
    batch = {"input_ids": hub.TOKENS}
    assert verify_projections(model, batch).passed
    assert facts(find_projections(model, batch)) == facts(find_projections(model))
