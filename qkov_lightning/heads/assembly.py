"""From what moves each head of one attention to its projections, Q, K, V and O."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from qkov_lightning.heads.leaves import Feature, NoHeadsError
from qkov_lightning.heads.projections import JOINED, Block, Projection
from qkov_lightning.heads.slots import Head

Sets = Sequence[frozenset[Feature]]
"""Features of each head."""


@dataclass(eq=False)
class Parts:
    """What was seen of one attention.

    Attributes:
        heads: Its heads.
        sources: Identities of the inputs of each map.
        outputs: Features of the output projection that carry each head; none without one.
        origins: Identities of the inputs of all maps before each map.
        near: Names of maps around it, for messages.
        computed: For scores and values of each softmax, at how many tokens features act whose weights are
            computed.
        context: Identities of the leaves that the context was computed from.
        queries_are_keys: Whether one map makes both.
        leaks: Whether its result goes elsewhere, too.
        is_shared: Whether several linear maps take the context itself.
    """

    heads: list[Head]
    sources: Mapping[str, set[tuple[int, ...]]]
    outputs: list[frozenset[Feature]]
    near: list[str]
    origins: Mapping[str, set[tuple[int, ...]]] = field(default_factory=dict)
    computed: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = ()
    context: frozenset[int] = frozenset()
    queries_are_keys: bool = False
    leaks: bool = False
    is_shared: bool = False

    def note_use(self, name: str, reached: Collection[int]) -> None:
        """Something used the result, beside what is taken for the output projection, which then is none.

        Args:
            name: The linear map; none where the model gives it back.
            reached: The leaves of the graph that its input was computed from.
        """
        if any(feature[0] == name for own in self.outputs for feature in own):
            return
        self.leaks = True
        self.is_shared |= bool(name) and self.context >= {*reached}

    def without_leaking_output(self) -> Parts:
        """The same without an output projection that does not stand alone."""
        return replace(self, outputs=[]) if self.leaks else self

    @property
    def problem(self) -> str | None:
        """Why it has no place, if that shows only after it."""
        return "several linear maps take its result" if self.is_shared else None


def assemble(
    parts: Parts, widths: Mapping[str, int], axes: Mapping[str, tuple[int, ...]]
) -> list[Projection]:
    """The projections of one attention.

    Args:
        parts: What was seen of it.
        widths: Output features of each map.
        axes: Axes of each parameter that are input features.

    Raises:
        NoHeadsError: If heads share features that should be their own, or have none.
    """
    queries, keys, is_shared = _roles(parts)
    values = [frozenset(f for f, (_, most) in head.values.items() if most > 1) for head in parts.heads]
    if not any(values) and any(head.values for head in parts.heads):
        raise NoHeadsError("the tokens that its softmax runs over are not those whose values it weighs")
    names_of_values = {source for name in _names(_union(values)) for source in parts.sources.get(name, ())}
    placed: dict[Block, Sets] = {
        "Q": _narrowed(queries, "Q", parts, names_of_values),
        "K": _narrowed(keys, "K", parts, names_of_values),
        "V": _narrowed(values, "V", parts, names_of_values),
    }
    also: dict[Block, tuple[Block, ...]] = {}
    if is_shared:  # queries and keys in one
        also["Q"] = ("K",)
        placed["K"] = []
    for block in ("Q", "K"):
        if any(placed[block]) and list(placed[block]) == list(placed["V"]):
            also[block] = (*also.get(block, ()), "V")
            placed["V"] = []
    _check_computed(parts, placed)
    if not any(placed["Q"]) and not any(placed["K"]):
        raise NoHeadsError("neither queries nor keys come from a linear map of their own")
    if (
        (is_shared or not any(placed["Q"]))
        and all(len(own) == 1 for own in queries if own)
        and all(len(own) == 1 for own in keys if own)
    ):
        raise NoHeadsError(
            "its scores come straight from a linear map: there is no product of queries and keys"
        )
    if parts.outputs:
        if not all(parts.outputs) or len(_union(parts.outputs)) != sum(map(len, parts.outputs)):
            raise NoHeadsError(
                "features of its output projection carry several heads, or none: the heads are mixed"
            )
        placed["O"] = parts.outputs
    label = label_of(sorted({name for sets in placed.values() for name in _names(_union(sets))}))
    result = []
    for block, sets in placed.items():
        if any(sets):
            result.append(_projection(block, sets, label, widths, axes, also.get(block, ())))
    return result


def _check_computed(parts: Parts, placed: Mapping[Block, Sets]) -> None:
    """Refuse a block that is missing because its weight is computed from others.

    Raises:
        NoHeadsError: If there is one.
    """
    scores = [count for own, _ in parts.computed for count in own]
    values = [count for _, own in parts.computed for count in own]
    missing = {
        "Q": 1 in scores,
        "K": any(count > 1 for count in scores),
        "V": any(count > 1 for count in values),
    }
    for block, is_computed in missing.items():
        if is_computed and not any(placed[block]):  # type: ignore[index]
            raise NoHeadsError(f"its block {block} comes from a weight that is computed from others")


def label_of(names: Sequence[str]) -> str:
    """The innermost module around some maps."""
    parts = [name.split(".") for name in names if name]
    if not parts:
        return "attention"
    if len(parts) == 1:
        return ".".join(parts[0][:-1]) or parts[0][0]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    if ".".join(common) in names:
        common = common[:-1]
    return ".".join(common).removesuffix(".self") or ", ".join(names[:4])


def _roles(parts: Parts) -> tuple[Sets, Sets, bool]:
    """Features that act on the scores as queries, and as keys; and whether they are the same.

    Raises:
        NoHeadsError: If it cannot be told.
    """
    least: dict[Feature, int] = {}
    most: dict[Feature, int] = {}
    for head in parts.heads:
        for feature, (few, many) in head.scores.items():
            least[feature] = min(least.get(feature, few), few)
            most[feature] = max(most.get(feature, many), many)
    computed = [count for own, _ in parts.computed for count in own]
    fewest = min([*least.values(), *computed], default=1)  # where queries are pooled, more than one
    # Nothing to compare with: learned queries, or one pooled token.
    if fewest == max(most.values(), default=1):
        fewest = 1
    one = {f for f in most if least[f] <= fewest}
    several = {f for f in most if most[f] > fewest}
    only_one, only_several, both = one - several, several - one, one & several
    if parts.queries_are_keys and not only_one:  # without a mask a token sees itself among all others
        both, only_several = both | only_several, set()
    is_shared = bool(both) and not only_one and not only_several and (fewest == 1 or parts.queries_are_keys)
    queries, keys = set(only_one), set(only_several)
    if is_shared or (both and only_several and not only_one):
        queries = both
    elif both and not only_several:
        keys = both
    elif both:
        raise NoHeadsError("features act as queries at one place and as keys at another")
    own = [frozenset(head.scores) for head in parts.heads]
    return [s & queries for s in own], [s & keys for s in own], is_shared


def _narrowed(sets: Sets, block: Block, parts: Parts, sources_of_values: Collection[object]) -> Sets:
    """Without features that all heads share beside others of their own, and of one map for each head.

    Raises:
        NoHeadsError: If what is left of a head lies in several maps.
    """
    whole = frozenset.intersection(*sets) if sets else frozenset()
    if len(sets) > 1 and any(own - whole for own in sets):
        sets = [own - whole for own in sets]
    if max((len(_names(own)) for own in sets), default=0) > 1:  # positions have a map of their own
        kept = [
            frozenset(f for f in own if parts.sources.get(f[0], set()) & {*sources_of_values}) for own in sets
        ]
        dropped = _union(sets) - _union(kept)
        of_tokens = any(parts.origins.get(name, set()) & {*sources_of_values} for name in _names(dropped))
        sets = kept
        if of_tokens or max((len(_names(own)) for own in sets), default=0) != 1:
            raise NoHeadsError(f"each head of its block {block} is made by several linear maps at once")
    if any(sets) and not all(sets):
        raise NoHeadsError(f"some of its heads have features of block {block}, and others have none")
    return sets


def _projection(
    block: Block,
    sets: Sets,
    label: str,
    widths: Mapping[str, int],
    axes: Mapping[str, tuple[int, ...]],
    also: tuple[Block, ...],
) -> Projection:
    """One projection, from the features of each query head.

    Raises:
        NoHeadsError: If heads share what should be their own, or cannot be a row of a heatmap.
    """
    distinct = list(dict.fromkeys(sets))
    if len(_union(distinct)) != sum(map(len, distinct)):
        raise NoHeadsError(
            f"heads of its block {block} share some of their features, but not all: the heads are mixed"
        )
    group, rest = divmod(len(sets), len(distinct))
    if rest or any(sets[i] != distinct[i // group] for i in range(len(sets))):
        raise NoHeadsError(
            f"a head of its block {block} serves query heads that do not stand side by side, and has no place in a heatmap"
        )
    if block in ("Q", "O") and group > 1:
        raise NoHeadsError(f"several heads have the same features of block {block}")
    if len({len(own) for own in distinct}) != 1:
        raise NoHeadsError(f"heads of its block {block} differ in size")
    names = list(dict.fromkeys(name for own in distinct for name in sorted(_names(own))))
    if block == "O" and len(names) > 1:
        raise NoHeadsError("several linear maps take its result")
    starts, start = {}, 0
    for name in names:
        starts[name] = start
        start += widths.get(name, 0)
    features = torch.tensor([sorted(starts[name] + place for name, place in own) for own in distinct])
    input_axes = tuple(axes.get(names[0], ()))
    return Projection(JOINED.join(names), 0, label, block, features, group, input_axes, also)


def _union(sets: Sets) -> frozenset[Feature]:
    return frozenset().union(*sets)


def _names(features: Collection[Feature]) -> set[str]:
    return {name for name, _ in features}
