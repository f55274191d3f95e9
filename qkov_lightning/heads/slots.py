"""The heads of one softmax, read off from derivatives: their places in it, and their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.heads.influence import MASKED, NUM_QUERIES
from qkov_lightning.heads.leaves import Feature, Leaf, NoAttentionError, NoHeadsError, Operand
from qkov_lightning.heads.signatures import acting
from qkov_lightning.heads.softmaxes import Softmax, leaves_of, trace

MAX_SLOTS = 1024
"""Places along the axes of the heads, samples included where they share an axis."""


@dataclass
class Head:
    """One head.

    Attributes:
        softmax: The softmax that it is in.
        slots: Its places in it.
        scores: Features that move its scores, with the least and the largest number of tokens of each that
            one query token sees.
        values: Features that move what it weighs, likewise.
    """

    softmax: int
    slots: list[tuple[int, ...]]
    scores: dict[Feature, tuple[int, int]] = field(default_factory=dict)
    values: dict[Feature, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Slots:
    """The axes of a softmax along which its heads lie.

    Attributes:
        axes: Those axes.
        heads: The heads, in the order of the first place of each.
        queries_are_keys: Whether one map makes both.
        computed: For scores and values, at how many tokens features act whose weights are computed from
            others.
    """

    axes: tuple[int, ...]
    heads: tuple[Head, ...]
    computed: tuple[tuple[int, ...], tuple[int, ...]]
    queries_are_keys: bool = False

    def headed(self, tensor: Float[Tensor, "*place key"]) -> Float[Tensor, "1 head query key"]:
        """A tensor of the shape of the scores, with all but heads and keys in one axis."""
        rest = [axis for axis in range(tensor.ndim - 1) if axis not in self.axes]
        parts = []
        for head in self.heads:
            own = torch.stack([tensor[_at(tensor.ndim, self.axes, slot)] for slot in head.slots])
            parts.append(own.reshape(-1, tensor.shape[-1]) if rest else own)
        return torch.stack(parts)[None]


def find_heads(
    number: int, softmax: Softmax, values: Tensor | None, leaf_of: Mapping[int, Leaf], inner: bool = True
) -> Slots:
    """The heads of one softmax.

    Args:
        number: What the softmax is called in the result.
        softmax: The softmax.
        values: What its output weighs, in the shape of the scores, if there is anything.
        leaf_of: What is known of the leaves of the graph.
        inner: Whether products count whose input comes from other products of the same scores. Tables of
            relative positions are such, and so are the two stages of latent attention.

    Raises:
        NoAttentionError: If it is no attention over tokens.
        NoHeadsError: If its heads cannot be told apart.
    """
    tensors = [softmax.scores, *([] if values is None or not values.requires_grad else [values])]
    positions = _positions(softmax.scores)
    computed: list[tuple[int, ...]] = [(), ()]
    operands = []
    for place, tensor in enumerate(tensors):
        keys = leaves_of(tensor).keys() & leaf_of.keys()
        leaves = [leaf_of[key] for key in leaves_of(tensor) if key in keys]
        nameless = Operand(tensor, [leaf for leaf in leaves if leaf.is_nameless])
        computed[place] = tuple(nameless.reach(positions))
        own = [leaf for leaf in leaves if not leaf.is_nameless and (inner or not leaf.upstream & keys)]
        operands.append(Operand(tensor, own))
    counts = [operand.reach(positions) for operand in operands]
    reach = [max([*own, *other], default=0) for own, other in zip(counts, computed, strict=False)]
    if len(operands) < 2 or (reach[0] < 2 and reach[1] < 2):
        raise NoAttentionError("no token looks at several others")
    if reach[0] < 2:
        raise NoHeadsError(
            "nothing moves its scores on this sample: queries or keys are zero, or cut off from the graph"
        )
    if not operands[0].leaves:
        raise NoHeadsError("its scores come from no linear map with a weight of its own")
    if any(trace(tensor).is_hidden for tensor in tensors):
        raise NoHeadsError(
            "a function with a derivative of its own hides a weight before its scores or values"
        )
    if any(leaf.is_joined for leaf in operands[0].leaves):
        raise NoHeadsError("a weight changes its scores after queries have met keys: the heads are mixed")
    normalised = False
    axes = _axes_of_heads(operands, softmax.scores.shape, normalised)
    if not axes:
        normalised = True
        axes = _axes_of_heads(operands, softmax.scores.shape, normalised)
    heads = _grouped(number, operands, axes, softmax.scores, positions)
    sees_several = all(least > 1 for head in heads for least, _ in head.scores.values())
    are_keys = sees_several and _queries_are_keys(operands[0], positions[0], softmax.scores)
    return Slots(axes, heads, (computed[0], computed[1]), are_keys)


def _at(ndim: int, axes: Sequence[int], slot: Sequence[int]) -> tuple[slice | int, ...]:
    index = dict(zip(axes, slot, strict=True))
    return tuple(index.get(axis, slice(None)) for axis in range(ndim))


def _positions(scores: Tensor) -> list[dict[int, int]]:
    """Index along each axis but the last of the places with the largest scores."""
    sizes = scores.detach().double().abs()
    strength = torch.where(sizes < MASKED, sizes, 0.0).sum(dim=-1)
    # A causal mask leaves the first token one key, whatever its size: the last ones are looked at as well.
    largest = strength.flatten().topk(min(NUM_QUERIES - 1, strength.numel())).indices.tolist()
    places = dict.fromkeys([*largest, strength.numel() - 1])
    return [
        {axis: int(i) for axis, i in enumerate(torch.unravel_index(torch.tensor(place), strength.shape))}
        for place in places
    ]


def _axes_of_heads(operands: Sequence[Operand], shape: Sequence[int], normalised: bool) -> tuple[int, ...]:
    """Axes along which other features act from place to place."""
    axes = []
    for axis in range(len(shape) - 1):
        size = shape[axis]
        if size < 2:
            continue
        seen = set()
        for index in dict.fromkeys((0, 1, size // 2, size - 1)):
            where = _at(len(shape), [axis], [index])
            columns = _columns(operands, where, lambda _: normalised)
            if columns:
                seen.add(columns)
        if len(seen) > 1:
            axes.append(axis)
    return tuple(axes)


def _columns(
    operands: Sequence[Operand], where: tuple[slice | int, ...], normalised: Callable[[int], bool]
) -> frozenset[tuple[int, Feature]]:
    return frozenset(
        (o, leaf.features[column])
        for o, operand in enumerate(operands)
        for leaf, columns in zip(operand.leaves, operand.signature(where, normalised), strict=True)
        for column in columns.nonzero().flatten().tolist()
    )


def _grouped(
    number: int,
    operands: Sequence[Operand],
    axes: tuple[int, ...],
    scores: Tensor,
    positions: Sequence[Mapping[int, int]],
) -> tuple[Head, ...]:
    shape = scores.shape
    slots = list(product(*(range(shape[axis]) for axis in axes)))
    if len(slots) > MAX_SLOTS:
        raise NoHeadsError(f"other features act at each of {len(slots)} places, more than heads can be")
    plain = [
        [operand.signature(_at(len(shape), axes, slot), lambda _: False) for operand in operands]
        for slot in slots
    ]
    # Where every place feels all features of a map, a normalisation may carry them along.
    suspects = [
        [
            all(torch.equal(plain[0][o][leaf], own[o][leaf]) for own in plain)
            for leaf in range(len(operand.leaves))
        ]
        for o, operand in enumerate(operands)
    ]
    heads: dict[tuple[object, ...], Head] = {}
    for slot in slots:
        where = _at(len(shape), axes, slot)
        sets = [
            operand.signature(where, lambda leaf, o=o: suspects[o][leaf])  # type: ignore[misc]
            for o, operand in enumerate(operands)
        ]
        features = [
            {
                leaf.features[column]
                for columns, leaf in zip(own, operand.leaves, strict=True)
                for column in columns.nonzero().flatten().tolist()
            }
            for operand, own in zip(operands, sets, strict=True)
        ]
        if not any(features):
            continue
        head = heads.setdefault(tuple(frozenset(own) for own in features), Head(number, []))
        head.slots.append(slot)
        if len(head.slots) > 1:
            continue
        at = dict(zip(axes, slot, strict=True))
        # A feature is the same for all heads: each looks at some query tokens, together at all of them.
        some = positions if len(slots) < NUM_QUERIES else positions[len(heads) % len(positions) :][:1]
        looks = [*some, positions[-1]]
        for operand, target in zip(operands, (head.scores, head.values), strict=False):
            counts = operand.tokens(looks, at)
            for columns, leaf, (least, most) in zip(
                sets[operands.index(operand)], operand.leaves, counts, strict=True
            ):
                for column in columns.nonzero().flatten().tolist():
                    feature = leaf.features[column]
                    few, many = target.get(feature, (int(least[column]), 0))
                    target[feature] = (min(few, int(least[column]) or few), max(many, int(most[column])))
            _check_whole(operand, sets[operands.index(operand)], {**positions[0], **at}, scores)
    sizes = {len(head.slots) for head in heads.values()}
    if len(sizes) != 1:
        raise NoHeadsError("its places do not divide evenly into heads with features of their own")
    return tuple(heads.values())


def _queries_are_keys(operand: Operand, position: Mapping[int, int], scores: Tensor) -> bool:
    """Whether a score is a product of a map's output at one token with its output at another."""
    where = tuple(position[axis] for axis in range(scores.ndim - 1))
    for key in range(min(scores.shape[-1], NUM_QUERIES)):
        for leaf in operand.leaves:
            (slope,) = torch.autograd.grad(
                scores[(*where, key)], leaf.tensor, create_graph=True, allow_unused=True
            )
            if slope is None or not slope.requires_grad:
                continue
            rows = slope.reshape(leaf.values.shape)
            for row in (rows != 0).any(dim=1).nonzero().flatten()[:2].tolist():
                (curved,) = torch.autograd.grad(
                    rows[row].sum(), leaf.tensor, retain_graph=True, allow_unused=True
                )
                if curved is not None:
                    acts = (curved.reshape(rows.shape) != 0).any(dim=1)
                    acts[row] = False
                    if bool(acts.any()):
                        return True
    return False


def _check_whole(
    operand: Operand, sets: Sequence[Tensor], position: Mapping[int, int], scores: Tensor
) -> None:
    """Refuse features that are places: one query and one key meet in all features of a head, or none.

    Raises:
        NoHeadsError: If they meet in some only.
    """
    where = tuple(position[axis] for axis in range(scores.ndim - 1))
    sizes = scores[where].detach().abs()
    key = int(torch.where(sizes < MASKED, sizes, -1.0).argmax())
    for columns, gradient in zip(sets, operand.gradients((*where, key)), strict=True):
        touched = (gradient != 0).any(dim=0).cpu() & columns
        if bool(touched.any()) and not bool((touched == columns).all()):
            raise NoHeadsError("features of one of its maps are places, or some are zero on this sample")


def context_features(context: Tensor, softmax: Softmax, slots: Slots) -> list[frozenset[int]]:
    """Features of the context that each head moves.

    Args:
        context: Input of the output projection.
        softmax: The softmax.
        slots: Its heads.
    """
    any_direction = torch.zeros_like(context, requires_grad=True)
    (linear,) = torch.autograd.grad(context, softmax.probabilities, any_direction, create_graph=True)
    moved: list[Tensor] = []
    headed = slots.headed(linear)[0]
    generator = torch.Generator().manual_seed(0)
    for own in headed:
        direction = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own)
        (movement,) = torch.autograd.grad(own, any_direction, direction, retain_graph=True)
        moved.append(movement.detach().reshape(-1, context.shape[-1]))
    value = context.detach().reshape(-1, context.shape[-1])
    plain = [acting(movement, value, normalised=False) for movement in moved]
    is_spread = len(moved) > 1 and all(torch.equal(plain[0], own) for own in plain)
    sets = [acting(movement, value, is_spread) for movement in moved]
    return [frozenset(columns.nonzero().flatten().tolist()) for columns in sets]
