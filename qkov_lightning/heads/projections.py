"""Which features of which module belong to each (layer, head, block)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

Block = Literal["Q", "K", "V", "O"]
"""Query, key, value or output projection of an attention layer."""

JOINED = " + "
"""Between the names of linear maps that together are one projection, as of a module for each head."""

BY_NAME = "by name"
"""How a layer is placed that nobody has proven."""

BLOCKS: tuple[Block, ...] = ("Q", "K", "V", "O")


@dataclass(frozen=True, eq=False)
class Projection:
    """One block of one attention layer: the features of a linear module that each head owns.

    Q, K and V heads own OUTPUT features of their module, O heads own INPUT features, so that the
    layout of the weight itself (transposed, fused, interleaved) never matters.

    Attributes:
        module_name: Dotted path of the module inside the model; of the parameter, where it is used without a
            module; of several, joined by " + ", whose features are counted on.
        layer: Position among the attention layers that were found, from 0.
        layer_name: Label of the layer, for people.
        block: "Q", "K", "V" or "O".
        head_features: Indices of the features of each head.
        query_group: Query heads that share one head of this block (1, except for K and V under
            grouped-query attention).
        input_axes: Of a parameter: its axes that are input features; the others are output features.
        also: Other blocks that the very same features are, as of a model whose values are its keys. They have
            no projection of their own.
        placed: How it was placed, in words.
    """

    module_name: str
    layer: int
    layer_name: str
    block: Block
    head_features: Int[Tensor, "head feature"]
    query_group: int = 1
    input_axes: tuple[int, ...] | None = None
    also: tuple[Block, ...] = ()
    placed: str = BY_NAME

    def __post_init__(self) -> None:
        where = f"Layer {self.layer} (`{self.layer_name}`), block {self.block}"
        if self.block not in BLOCKS:
            raise ValueError(f"{where}: unknown block; expected one of {', '.join(BLOCKS)}.")
        features = self.head_features
        if features.ndim != 2 or features.dtype != torch.int64 or features.numel() == 0:
            raise ValueError(
                f"{where}: head_features has shape {tuple(features.shape)} and dtype {features.dtype}, "
                "expected a non-empty int64 tensor of shape [num_heads, head_dim]."
            )
        if int(features.min()) < 0 or features.unique().numel() != features.numel():
            raise ValueError(
                f"{where}: head_features repeats a feature or has a negative one; every feature belongs "
                "to one head. For grouped-query attention give each shared head once and set query_group."
            )
        if self.query_group < 1:
            raise ValueError(f"{where}: query_group is {self.query_group}, expected at least 1.")

    @property
    def feature_axis(self) -> Literal["output", "input"]:
        """Side of the module that the heads own: "input" for O, "output" for Q, K and V."""
        return "input" if self.block == "O" else "output"

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the linear maps that it is made of: one, as a rule."""
        return tuple(self.module_name.split(JOINED))

    @property
    def num_heads(self) -> int:
        """Heads of this block itself, before any expansion to query heads."""
        return self.head_features.shape[0]

    @property
    def cell_names(self) -> list[str]:
        """Short name of each head's cell, as in ``L15.H8.O``."""
        return [f"L{self.layer}.H{head}.{self.block}" for head in range(self.num_heads)]

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.head_features.shape[1]


def contiguous_heads(num_heads: int, head_dim: int, start: int = 0) -> Int[Tensor, "head feature"]:
    """Head features of heads that lie one after the other, the first at feature ``start``.

    >>> contiguous_heads(num_heads=2, head_dim=3, start=6)
    tensor([[ 6,  7,  8],
            [ 9, 10, 11]])
    """
    return torch.arange(start, start + num_heads * head_dim).view(num_heads, head_dim)


def num_layers(projections: Sequence[Projection]) -> int:
    """Number of attention layers."""
    return 1 + max(projection.layer for projection in projections)


def num_heads(projections: Sequence[Projection]) -> int:
    """Largest number of heads of any block of any layer."""
    return max(projection.num_heads for projection in projections)


def check_unique(projections: Iterable[Projection]) -> None:
    """Refuse two projections for one block of one layer.

    Raises:
        ValueError: If a (layer, block) is placed twice.
    """
    seen: dict[tuple[int, Block], Projection] = {}
    for projection in projections:
        other = seen.setdefault((projection.layer, projection.block), projection)
        if other is not projection:
            raise ValueError(
                f"Layer {projection.layer} (`{projection.layer_name}`): block {projection.block} is placed "
                f"twice, in `{other.module_name}` and in `{projection.module_name}`. Give each attention "
                "layer a number of its own."
            )
