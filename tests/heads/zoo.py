"""A registry of attention styles, each with the heads that its code says it has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import ArchitectureError, Projection, find_projections, verify_capture

WIDTH, HEADS, SIZE = 24, 3, 8

CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)

Claim = tuple[str, Tensor]
"""A map, relative to the attention, and the features of each head."""

Layer = dict[str, Claim]
"""For each block, as in "Q"; "KV" is a block K whose features are values, too."""


def rows(
    name: str, heads: int = HEADS, size: int = SIZE, start: int = 0, step: int | None = None, stride: int = 1
) -> Claim:
    """Heads that begin every ``step`` features, with features ``stride`` apart."""
    begins = start + torch.arange(heads) * (size * stride if step is None else step)
    return name, begins[:, None] + torch.arange(size) * stride


SEPARATE: Layer = {"Q": rows("q"), "K": rows("k"), "V": rows("v"), "O": rows("o")}
FUSED: Layer = {"Q": rows("qkv"), "K": rows("qkv", start=24), "V": rows("qkv", start=48), "O": rows("o")}


@dataclass
class Style:
    """One way to write attention.

    Attributes:
        build: Gives the model and a batch.
        truth: Its layers, or a pattern of the words of a refusal.
        xfail: Why it is not right today.
        runs: Context around ``find_projections``.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any]]
    truth: list[Layer] | str
    xfail: str | None = None
    capture: bool = False
    options: dict[str, Any] = field(default_factory=dict)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, attention: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """Two blocks between an embedding of patches and a head."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(10, WIDTH)
        self.layers = nn.ModuleList(Block(make()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Zoo:
    """Styles by name."""

    def __init__(self) -> None:
        self.styles: dict[str, Style] = {}

    def inside(self, truth: Layer | str, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """An attention module that maps tokens to tokens: two layers of it in a model."""

        def register(cls: type[nn.Module]) -> type[nn.Module]:
            def build() -> tuple[nn.Module, Any]:
                return Net(cls), torch.randn(2, 7, 10)

            whole = (
                truth if isinstance(truth, str) else [prefixed(truth, f"layers.{i}.attn") for i in range(2)]
            )
            self.add(cls.__name__, build, whole, **options)
            return cls

        return register

    def whole(
        self,
        truth: Layer | list[Layer] | str,
        batch: Callable[[], Any] = lambda: torch.randn(2, 7, WIDTH),
        **options: Any,
    ) -> Callable[[Any], Any]:
        """A model by itself: its class, or a function that makes it."""

        def register(make: Any) -> Any:
            self.add(
                make.__name__,
                lambda: (make(), batch()),
                [truth] if isinstance(truth, dict) else truth,
                **options,
            )
            return make

        return register

    def add(self, name: str, build: Callable[[], Any], truth: Any, **options: Any) -> None:
        assert name not in self.styles, name
        self.styles[name] = Style(name, build, truth, **options)


def prefixed(layer: Layer, prefix: str) -> Layer:
    return {
        block: (" + ".join(f"{prefix}.{one}".rstrip(".") for one in name.split(" + ")), features)
        for block, (name, features) in layer.items()
    }


def said(projections: list[Projection]) -> list[dict[str, tuple[str, list[list[int]], int]]]:
    """The same form for what was found."""
    layers: dict[int, dict[str, tuple[str, list[list[int]], int]]] = {}
    for p in projections:
        features = [sorted(own) for own in p.head_features.tolist()]
        layers.setdefault(p.layer, {})[p.block + "".join(p.also)] = (p.module_name, features, p.query_group)
    return list(layers.values())


def expected(layers: list[Layer]) -> list[dict[str, tuple[str, list[list[int]], int]]]:
    found = []
    for layer in layers:
        heads = max(len(features) for _, features in layer.values())
        found.append({
            block: (name, [sorted(own) for own in features.tolist()], heads // len(features))
            for block, (name, features) in layer.items()
        })
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that must be left alone."""
    return {
        "tensors": {
            name: (id(one), one.detach().clone(), one.requires_grad, one.grad_fn, one.grad)
            for name, one in (*model.named_parameters(), *model.named_buffers())
        },
        "training": {name: one.training for name, one in model.named_modules()},
        "hooks": {
            name: (len(one._forward_hooks), len(one._forward_pre_hooks))
            for name, one in model.named_modules()
        },
        "random": torch.get_rng_state(),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = [f"{key} changed" for key in ("training", "hooks") if before[key] != after[key]]
    if not torch.equal(before["random"], after["random"]):
        found.append("random numbers changed")
    for name, (same, value, grad, function, gradient) in before["tensors"].items():
        now = after["tensors"].get(name)
        if (
            now is None
            or now[0] != same
            or now[2] != grad
            or now[3] is not function
            or now[4] is not gradient
        ):
            found.append(f"{name} is another, or has another gradient")
        elif not torch.equal(value, now[1]):
            found.append(f"{name} has other values")
    return found


def look(style: Style) -> tuple[Any, nn.Module, Any, list[str]]:
    """What is said of a style: layers or a refusal; the model; the batch; what was changed."""
    torch.manual_seed(0)
    model, batch = style.build()
    before = state_of(model)
    try:
        found: Any = find_projections(model, batch, **style.options)
    except ArchitectureError as error:
        found = str(error)
    return found, model, batch, changes(before, state_of(model))


def cases(zoo: Zoo, today: dict[str, str], never_run: Collection[str] = ()) -> list[Any]:
    """A case for each style; those that are not right today are said to fail."""
    assert set(today) <= set(zoo.styles), set(today) - set(zoo.styles)
    return [
        pytest.param(
            style,
            id=name,
            marks=[pytest.mark.xfail(strict=True, reason=today[name], run=name not in never_run)]
            if name in today
            else [],
        )
        for name, style in zoo.styles.items()
    ]


def check(style: Style) -> None:
    """The heads are those of the code, the model is left alone, and captured gradients are right."""
    found, model, batch, changed = look(style)
    if isinstance(style.truth, str):
        assert isinstance(found, str), said(found)
        assert re.search(style.truth, found), found
    else:
        assert not isinstance(found, str), found
        assert said(found) == expected(style.truth)
    assert not changed
    if style.capture:
        verification = verify_capture(
            model.eval().double(),
            batch.double(),
            loss=lambda m, b: m(b).square().mean(),
            loss_reduction="mean",
            projections=found,
        )
        assert verification.passed, str(verification)


# What styles are made of


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Separate(nn.Module):
    """Four linear layers; what comes between is for subclasses."""

    bias = True

    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=self.bias))
        self.extra()

    def extra(self) -> None: ...

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split(self.q(x)), split(self.k(x)), split(self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(joined(attend(*self.heads(x))))


class Fused(nn.Module):
    """One layer for query, key and value; how its features are cut is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.chunk(3, dim=-1)
        return split(q), split(k), split(v)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(joined(attend(*self.cut(self.qkv(x)))))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 5)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 3).masked_fill(CAUSAL, -torch.inf).softmax(-1) @ v


def tokens() -> Tensor:
    return torch.randn(2, 7, WIDTH)


class TupleLinear(nn.Linear):
    """Gives its bias apart, as of Megatron."""

    def forward(self, x: Tensor) -> Any:
        return functional.linear(x, self.weight), self.bias
