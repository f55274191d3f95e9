"""What the benchmarks of the scores share: model and texts of the demo, training in one cell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import byte_model

TASKS = ("prose", "code", "math")
WIDTH, HEADS, LAYERS, CONTEXT = 48, 4, 3, 32


class Texts:
    """Windows of prose, code and arithmetic."""

    def __init__(self) -> None:
        sources = {"prose": byte_model.prose(), "code": byte_model.code(), "math": byte_model.math()}
        self.bytes = {task: torch.tensor(list("\n".join(t.values()).encode())) for task, t in sources.items()}

    def draw(self, task: str, count: int, generator: torch.Generator) -> Tensor:
        text = self.bytes[task]
        starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
        return text[starts + torch.arange(CONTEXT + 1)]


def make_model(width: int = WIDTH, layers: int = LAYERS) -> byte_model.ByteDecoder:
    return byte_model.ByteDecoder(width, HEADS, layers, CONTEXT)


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@dataclass(frozen=True, eq=False)
class ModelCell:
    """One (layer, head, block): a slice of a weight."""

    layer: int
    head: int
    block: str
    weight: nn.Parameter

    @property
    def name(self) -> str:
        return f"L{self.layer}.H{self.head}.{self.block}"

    @property
    def slice(self) -> tuple[slice, slice]:
        size = len(self.weight) // HEADS
        own = slice(self.head * size, (self.head + 1) * size)
        return (slice(None), own) if self.block == "O" else (own, slice(None))


def all_cells(model: nn.Module) -> list[ModelCell]:
    return [
        ModelCell(layer, head, block, getattr(model.layers[layer].self_attn, f"{block.lower()}_proj").weight)
        for layer in range(len(model.layers))
        for head in range(HEADS)
        for block in "QKVO"
    ]


def cell_gradients(model: nn.Module, windows: Tensor) -> Tensor:
    """Gradient of every window's own loss in every cell, ``[sample, cell, weight]``."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    attention = {name: weight for name, weight in weights.items() if "self_attn" in name}
    rest = {name: weight for name, weight in weights.items() if name not in attention}

    def loss(own: dict[str, Tensor], window: Tensor) -> Tensor:
        return next_byte_loss(lambda x: functional_call(model, {**rest, **own}, (x,)), window[None])

    parts = []
    with sdpa_kernel(SDPBackend.MATH):
        for some in windows.split(64):
            gradients = vmap(grad(loss), (None, 0))(attention, some)
            by_weight = {id(w): gradients[name] for name, w in model.named_parameters() if name in gradients}
            parts.append(
                torch.stack(
                    [by_weight[id(c.weight)][(slice(None), *c.slice)].flatten(1) for c in all_cells(model)], 1
                )
            )
    return torch.cat(parts)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    texts: Texts,
    tasks: Sequence[str],
    steps: int,
    generator: torch.Generator,
    batch_size: int = 15,
) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        windows = torch.cat([texts.draw(task, batch_size // len(tasks), generator) for task in tasks])
        loss = next_byte_loss(model, windows)
        loss.backward()
        optimizer.step()
    return loss.item()


class FromLayer:
    """The loss on fixed windows when only one layer changes: what comes before is computed once."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        self.model, self.targets = model, windows[:, 1:].flatten()
        with torch.no_grad():
            hidden = model.token(windows[:, :-1]) + model.position[: windows.shape[1] - 1]
            self.inputs = [hidden]
            for layer in model.layers:
                self.inputs.append(layer(self.inputs[-1]))

    def loss(self, layer: int) -> Tensor:
        hidden = self.inputs[layer]
        for module in list(self.model.layers)[layer:]:
            hidden = module(hidden)
        return functional.cross_entropy(self.model.head(hidden).flatten(0, 1), self.targets)
