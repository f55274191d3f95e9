"""The head map of a training is proven before its first step, and what names get wrong is not blamed."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from models import Classifier
from modules import Module, loader, trainer
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import (
    ArchitectureError,
    HeadFreezer,
    HeadMapWarning,
    InterferenceMonitor,
    find_projections,
    probe_interference,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)


class CausalSelfAttention(nn.Module):
    """Named as nanoGPT's, but keys come before queries."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = 2
        self.c_attn, self.c_proj = nn.Linear(10, 30), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        key, query, value = (t.unflatten(-1, (2, 5)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(context.transpose(1, 2).flatten(2))


class Homework(nn.Module):
    """Names that nobody knows, and weights that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.randn(2, 2, 10, 5) / 3)
        self.one, self.two = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        query, key = torch.einsum("btd,shde->sbhte", x, self.qk)
        value = self.one(x).unflatten(-1, (2, 5)).transpose(1, 2)
        context = (query @ key.mT).softmax(-1) @ value
        return self.two(context.transpose(1, 2).flatten(2))


def module(make: Callable[[], nn.Module]) -> Module:
    torch.manual_seed(0)
    return Module(network=Classifier([make(), make()], width=10))


def fitted(tmp_path: Path, made: LightningModule, **settings: Any) -> InterferenceMonitor:
    monitor = InterferenceMonitor(every_n_steps=1, **settings)
    trainer(tmp_path, monitor).fit(made, loader(24))
    return monitor


def test_heads_that_names_place_right_are_proven(tmp_path: Path) -> None:
    monitor = fitted(tmp_path, Module())
    assert monitor.heatmap is not None
    assert [layer.placed for layer in monitor.heatmap.layers] == ["proven", "proven"]
    assert monitor.results is not None
    saved = json.loads((Path(monitor.results) / "latest.json").read_text())
    assert [layer["placed"] for layer in saved["layers"]] == ["proven", "proven"]


def test_where_names_are_wrong_the_map_that_derivatives_find_goes_on(tmp_path: Path) -> None:
    made = module(CausalSelfAttention)
    with pytest.warns(HeadMapWarning, match=r"L0 H0 Q .*: acts at several tokens.* Goes on with the map"):
        monitor = fitted(tmp_path, made)
    assert monitor.heatmap is not None
    assert {layer.placed for layer in monitor.heatmap.layers} == {"found and proven"}
    features = {p.block: p.head_features.tolist() for p in monitor._projections if p.layer == 0}
    assert features["K"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert features["Q"] == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]


def test_heads_that_no_name_places_are_found(tmp_path: Path) -> None:
    made = module(Homework)
    with pytest.raises(ArchitectureError):
        find_projections(made)
    monitor = fitted(tmp_path, made)
    assert monitor.heatmap is not None
    assert {layer.placed for layer in monitor.heatmap.layers} == {"found and proven"}
    assert {
        (block, info.module_name, info.status) for block, info in monitor.heatmap.layers[1].blocks.items()
    } == {
        ("Q", "network.layers.1.qk", "measured"),
        ("K", "network.layers.1.qk", "measured"),
        ("V", "network.layers.1.one", "measured"),
        ("O", "network.layers.1.two", "measured"),
    }


def test_a_given_map_that_is_wrong_stops_before_the_first_step(tmp_path: Path) -> None:
    made = Module()
    before = [parameter.detach().clone() for parameter in made.parameters()]
    swapped = [
        dataclasses.replace(p, head_features=p.head_features.flip(0)) if p.block == "Q" else p
        for p in find_projections(made)
    ]
    with pytest.raises(ArchitectureError, match=r"L0 H0 Q .* moves head 3 instead of head 0"):
        fitted(tmp_path, made, projections=swapped)
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))
    with pytest.raises(ArchitectureError, match="moves head 3 instead of head 0"):
        probe_interference(Module(), loader(8), projections=swapped)
    assert fitted(tmp_path, Module(), projections=swapped, verify="off").heatmap is not None


def test_the_freezer_is_told_the_right_head_too(tmp_path: Path) -> None:
    made = module(CausalSelfAttention)
    before = made.network.layers[0].c_attn.weight.detach().clone()
    with pytest.warns(HeadMapWarning):
        trainer(tmp_path, HeadFreezer(["L0.H0.Q"])).fit(made, loader(24))
    moved = (made.network.layers[0].c_attn.weight != before).any(dim=1)
    assert moved.logical_not().nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


class ByHand(Module):
    """Optimises by itself."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()


def test_a_module_that_optimises_by_itself_is_proven_without_a_step_more(tmp_path: Path) -> None:
    made, alone = ByHand(), ByHand()
    alone.load_state_dict(made.state_dict())
    monitor = fitted(tmp_path, made)
    assert monitor.heatmap is not None
    assert {layer.placed for layer in monitor.heatmap.layers} == {"proven"}
    trainer(tmp_path).fit(alone, loader(24))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), alone.parameters(), strict=True))


class NeedsTwo(Module):
    """Its training step does not run on one sample."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if len(batch["target"]) < 2:
            raise RuntimeError("two samples, please")
        return self.loss(batch)


def test_what_cannot_be_proven_says_why(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadMapWarning)
        monitor = fitted(tmp_path, NeedsTwo())
    assert monitor.heatmap is not None
    assert all("not provable" in layer.placed for layer in monitor.heatmap.layers)
    assert all("two samples, please" in layer.placed for layer in monitor.heatmap.layers)
