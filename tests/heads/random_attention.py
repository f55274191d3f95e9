"""Attention modules drawn at random, in the styles that people write them in, with their heads."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

Truth = dict[str, dict[str, tuple[tuple[tuple[str, int], ...], ...]]]
"""For each layer and block: for each head the names of its maps, and its features of each."""


@dataclass
class Design:
    """How one attention module is written."""

    heads: int
    kv_heads: int
    size: int
    value_size: int
    width: int
    style: str  # linear, conv, einsum, parameter, modules
    fusion: str  # separate, qkv, kv
    order: tuple[str, ...]
    interleaving: str  # blocks, by_head, by_group
    strided: bool  # features of a head are every n-th
    tiled: bool  # key-value head j serves query heads j, j + n, ...
    rotary: bool
    norm: str  # none, head, all
    bias: bool
    gate: bool
    mask: str  # none, causal, padding
    extra: int  # output features that nobody uses
    shared: bool  # values are the keys
    fused_call: bool  # scaled_dot_product_attention
    flat: bool  # samples and heads in one axis
    output: str  # linear, loop, none-like styles are separate tests

    @classmethod
    def draw(cls, seed: int) -> Design:
        r = random.Random(seed)
        kv_heads = r.choice([1, 1, 2, 2, 3, 4])
        heads = kv_heads * r.choice([1, 1, 2]) if r.random() < 0.8 else kv_heads
        heads = min(heads, 8)
        style = r.choice(["linear", "linear", "linear", "conv", "einsum", "parameter", "modules"])
        size = r.choice([4, 6, 8])
        shared = r.random() < 0.1
        fusion = "separate" if shared else r.choice(["separate", "separate", "qkv", "qkv", "kv"])
        if style in ("einsum", "modules"):
            fusion = "separate"
        by_group = fusion == "qkv" and r.random() < 0.4
        return cls(
            heads=heads, kv_heads=kv_heads, size=size, value_size=size if shared or by_group else r.choice([size, size, 5]),
            width=r.choice([16, 24]), style=style, fusion=fusion,
            order=tuple(r.sample("QKV", 3)), interleaving="by_group" if by_group else r.choice(["blocks", "by_head"]),
            strided=r.random() < 0.25 and style not in ("einsum", "modules"),
            tiled=r.random() < 0.1, rotary=r.random() < 0.3 and size % 2 == 0 and not shared,
            norm=r.choice(["none", "none", "head", "all"]), bias=r.random() < 0.5, gate=r.random() < 0.2,
            mask=r.choice(["none", "causal", "padding"]), extra=r.choice([0, 0, 5]) if style in ("linear", "conv", "parameter") else 0,
            shared=shared, fused_call=r.random() < 0.5, flat=r.random() < 0.3, output=r.choice(["whole", "whole", "loop"]) if style == "parameter" else "whole",
        )  # fmt: skip


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / (3.0 ** torch.arange(half))
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class Maps(nn.Module):
    """Query, key and value maps of a design: gives them by head, and knows which features are whose."""

    def __init__(self, design: Design, prefix: str) -> None:
        super().__init__()
        d = self.design = design
        self.counts = {"Q": d.heads, "K": d.kv_heads, "V": d.kv_heads}
        self.sizes = {"Q": d.size, "K": d.size, "V": d.value_size}
        self.blocks = [b for b in d.order if not (b == "V" and d.shared)]
        self.truth: dict[str, list[list[tuple[str, int]]]] = {}
        self.picks: dict[str, tuple[str, Tensor]] = {}
        groups = {"separate": [[b] for b in self.blocks], "qkv": [self.blocks], "kv": [["Q"], ["K", "V"]]}[
            d.fusion
        ]
        for number, group in enumerate(groups):
            self._make(f"m{number}", group, prefix)
        if d.shared:
            self.truth["V"] = self.truth["K"]

    def _make(self, name: str, group: list[str], prefix: str) -> None:
        d = self.design
        if d.style == "modules":
            (block,) = group
            many = nn.ModuleList(
                nn.Linear(d.width, self.sizes[block], bias=d.bias) for _ in range(self.counts[block])
            )
            setattr(self, name, many)
            self.picks[block] = (name, torch.empty(0))
            self.truth[block] = [
                [(f"{prefix}{name}.{h}", i) for i in range(self.sizes[block])]
                for h in range(self.counts[block])
            ]
            return
        if d.style == "einsum":
            (block,) = group
            shape = (self.counts[block], d.width, self.sizes[block])
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / math.sqrt(d.width)))
            self.picks[block] = (name, torch.empty(0))
            self.truth[block] = [
                [(f"{prefix}{name}", h * self.sizes[block] + i) for i in range(self.sizes[block])]
                for h in range(self.counts[block])
            ]
            return
        pieces: list[tuple[str, int]] = []
        if d.interleaving == "by_group" and len(group) == 3:
            share = d.heads // d.kv_heads
            for kv in range(d.kv_heads):
                for block in group:
                    pieces += (
                        [(block, kv * share + i) for i in range(share)] if block == "Q" else [(block, kv)]
                    )
        elif d.interleaving == "by_head" and len({self.counts[b] for b in group}) == 1:
            pieces = [(block, h) for h in range(self.counts[group[0]]) for block in group]
        else:
            pieces = [(block, h) for block in group for h in range(self.counts[block])]
        places: dict[tuple[str, int], list[int]] = {}
        start = 0
        if d.strided and len({self.sizes[b] for b, _ in pieces}) == 1:
            for i, piece in enumerate(pieces):
                places[piece] = list(range(i, len(pieces) * self.sizes[piece[0]], len(pieces)))
            start = len(pieces) * self.sizes[pieces[0][0]]
        else:
            for piece in pieces:
                places[piece] = list(range(start, start + self.sizes[piece[0]]))
                start += self.sizes[piece[0]]
        outputs = start + d.extra
        if d.style == "linear":
            setattr(self, name, nn.Linear(d.width, outputs, bias=d.bias))
        elif d.style == "conv":
            setattr(self, name, nn.Conv1d(d.width, outputs, 1, bias=d.bias))
        else:
            self.register_parameter(name, nn.Parameter(torch.randn(d.width, outputs) / math.sqrt(d.width)))
        for block in group:
            own = [places[block, h] for h in range(self.counts[block])]
            self.picks[block] = (name, torch.tensor(own))
            self.truth[block] = [[(f"{prefix}{name}", i) for i in sorted(features)] for features in own]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Sample, head, token, feature."""
        d, found, made = self.design, {}, {}
        for block in self.blocks:
            name, picks = self.picks[block]
            weight = getattr(self, name)
            if d.style == "modules":
                found[block] = torch.stack([one(x) for one in weight], dim=1)
            elif d.style == "einsum":
                found[block] = torch.einsum("btd,hde->bhte", x, weight)
            else:
                if name not in made:
                    if d.style == "linear":
                        made[name] = weight(x)
                    elif d.style == "conv":
                        made[name] = weight(x.transpose(1, 2)).transpose(1, 2)
                    else:
                        made[name] = x @ weight
                found[block] = made[name][..., picks].permute(0, 2, 1, 3)
        if d.shared:
            found["V"] = found["K"]
        return found


class RandomAttention(nn.Module):
    def __init__(self, design: Design, prefix: str) -> None:
        super().__init__()
        d = self.design = design
        self.maps = Maps(design, f"{prefix}maps.")
        inner = d.heads * d.value_size
        if d.style == "parameter":
            shape = (d.heads, d.value_size, d.width) if d.output == "loop" else (inner, d.width)
            self.out = nn.Parameter(torch.randn(shape) / math.sqrt(inner))
        elif d.style == "einsum":
            self.out = nn.Parameter(torch.randn(d.heads, d.value_size, d.width) / math.sqrt(inner))
        elif d.style == "conv":
            self.out = nn.Conv1d(inner, d.width, 1)
        else:
            self.out = nn.Linear(inner, d.width, bias=d.bias)
        self.gate = nn.Linear(d.width, inner) if d.gate else None
        self.head_norms = nn.ModuleList(nn.LayerNorm(d.size) for _ in "QK") if d.norm == "head" else None
        sizes = (d.heads * d.size, d.kv_heads * d.size)
        self.all_norms = nn.ModuleList(nn.RMSNorm(size) for size in sizes) if d.norm == "all" else None
        features = [
            [(f"{prefix}out", h * d.value_size + i) for i in range(d.value_size)] for h in range(d.heads)
        ]
        self.truth = {**self.maps.truth, "O": features}

    def forward(self, x: Tensor) -> Tensor:
        d = self.design
        found = self.maps(x)
        q, k, v = found["Q"], found["K"], found["V"]
        if self.head_norms is not None:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        if self.all_norms is not None:
            q, k = (
                norm(t.transpose(1, 2).flatten(2))
                .view(t.shape[0], t.shape[2], t.shape[1], -1)
                .transpose(1, 2)
                for norm, t in zip(self.all_norms, (q, k), strict=True)
            )
        if d.rotary:
            q, k = rotated(q), rotated(k)
        share = d.heads // d.kv_heads
        if d.tiled:
            k, v = k.repeat(1, share, 1, 1), v.repeat(1, share, 1, 1)
        else:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        tokens = x.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool)
        if d.mask == "causal":
            mask = mask.tril()
        if d.mask == "padding":
            mask[:, -1] = False
        if d.fused_call:
            z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            if d.flat:
                q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(d.size)).masked_fill(~mask, -1e9)
            z = scores.softmax(-1) @ v
            if d.flat:
                z = z.unflatten(0, (-1, d.heads))
        if d.style == "einsum":
            z = (
                z
                if self.gate is None
                else z * self.gate(x).sigmoid().unflatten(-1, (d.heads, -1)).transpose(1, 2)
            )
            return torch.einsum("bhte,hed->btd", z, self.out)
        z = z.transpose(1, 2).flatten(2)
        if self.gate is not None:
            z = z * self.gate(x).sigmoid()
        if d.style == "conv":
            return self.out(z.transpose(1, 2)).transpose(1, 2)
        if d.style == "parameter" and d.output == "loop":
            heads = z.unflatten(-1, (d.heads, -1))
            return sum(heads[:, :, h] @ self.out[h] for h in range(d.heads))
        return z @ self.out if d.style == "parameter" else self.out(z)


class Block(nn.Module):
    def __init__(self, design: Design, prefix: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(design.width), nn.LayerNorm(design.width)
        self.attention = RandomAttention(design, f"{prefix}attention.")
        self.mlp = nn.Sequential(nn.Linear(design.width, 32), nn.GELU(), nn.Linear(32, design.width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@dataclass
class Drawn:
    model: nn.Module
    batch: Tensor
    design: Design
    truth: list[dict[str, list[list[tuple[str, int]]]]] = field(default_factory=list)


def draw(seed: int) -> Drawn:
    """A model of two layers of one random design, a batch, and its heads."""
    design = Design.draw(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(*(Block(design, f"{i}.") for i in range(2)), nn.Linear(design.width, 3))
    truth = [model[i].attention.truth for i in range(2)]
    return Drawn(model.eval(), torch.randn(2, 7, design.width), design, truth)
