"""The outputs of linear maps, cut out of the graph, and what moves with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.heads.signatures import acting

NAMELESS = "(computed)"
"""Begins the name of a weight that is computed from others."""

Feature = tuple[str, int]
"""Name of a linear map, and one of its features."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """The output of one product, cut out of the graph.

    Attributes:
        tensor: The output.
        features: What each of its columns is; of no name where its weights are computed from others.
        source: Identity of the input of the product.
        upstream: Identities of the leaves that the input was computed from.
        origins: Identities of the inputs of all maps before it.
        is_joined: Whether the input is made of products of these, as scores are.
    """

    tensor: Float[Tensor, "*token column"]
    features: tuple[Feature, ...]
    source: tuple[int, ...]
    upstream: frozenset[int]
    is_joined: bool = False
    origins: frozenset[tuple[int, ...]] = frozenset()

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of its maps."""
        return frozenset(name for name, _ in self.features)

    @property
    def is_nameless(self) -> bool:
        """Whether some of its weights are computed from others."""
        return any(name.startswith(NAMELESS) for name in self.names)

    @property
    def values(self) -> Float[Tensor, "token column"]:
        """Its columns."""
        return self.tensor.detach().reshape(-1, self.tensor.shape[-1])


class NoHeadsError(ValueError):
    """A softmax that has no heads, or none that can be told apart."""


class NoAttentionError(NoHeadsError):
    """A softmax that is no attention over tokens."""


class Operand:
    """Scores or values, with the leaves that they were computed from."""

    def __init__(self, tensor: Tensor, leaves: Sequence[Leaf]) -> None:
        self.tensor, self.leaves = tensor, leaves
        generator = torch.Generator().manual_seed(0)
        self._direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    def gradients(self, where: tuple[slice | int, ...]) -> list[Float[Tensor, "token column"]]:
        """Derivatives, with respect to each leaf, of what lies there in a random direction."""
        if not self.leaves:
            return []
        cotangent = torch.zeros_like(self.tensor)
        cotangent[where] = self._direction[where]
        found = torch.autograd.grad(
            self.tensor,
            [leaf.tensor for leaf in self.leaves],
            cotangent,
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(leaf.values) if g is None else g.detach().reshape(leaf.values.shape)
            for g, leaf in zip(found, self.leaves, strict=True)
        ]

    def signature(
        self, where: tuple[slice | int, ...], normalised: Callable[[int], bool]
    ) -> tuple[Tensor, ...]:
        """Columns of each leaf that move what lies there."""
        return tuple(
            acting(g, leaf.values, normalised(i)).cpu()
            for i, (g, leaf) in enumerate(zip(self.gradients(where), self.leaves, strict=True))
        )

    def tokens(
        self, positions: Sequence[Mapping[int, int]], slot: Mapping[int, int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each leaf, at how many tokens each column acts on one query token, at least and at most.

        Query tokens on which a column does not act do not count.
        """
        counts: list[list[Tensor]] = [[] for _ in self.leaves]
        for position in positions:
            index = {**position, **slot}
            where = tuple(index.get(axis, slice(None)) for axis in range(self.tensor.ndim))
            for own, g in zip(counts, self.gradients(where), strict=True):
                own.append((g != 0).sum(dim=0).cpu())
        found = []
        for own in counts:
            stacked = torch.stack(own)
            most = stacked.amax(dim=0)
            found.append((torch.where(stacked > 0, stacked, most).amin(dim=0), most))
        return found

    def reach(self, positions: Sequence[Mapping[int, int]]) -> list[int]:
        """The numbers of tokens at which columns act on one query token."""
        return sorted({
            count for _, most in self.tokens(positions, {}) for count in most.unique().tolist() if count
        })
