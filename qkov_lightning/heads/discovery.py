"""Heads found from one forward pass: no name, no config, only what moves what.

The graph is cut at the output of every linear map and at every softmax. Which outputs of which map move the
scores of which head, at how many tokens, says what is a query and what is a key; what the softmax weighs are
the values; the linear map that its result goes into is the output projection. What is read off is then proven
as any other head map.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qkov_lightning.heads.assembly import Parts, assemble, label_of
from qkov_lightning.heads.cutting import GraphCutter, size_of
from qkov_lightning.heads.influence import AttentionGraph
from qkov_lightning.heads.influence import Leaf as GraphLeaf
from qkov_lightning.heads.leaves import NAMELESS, NoAttentionError, NoHeadsError
from qkov_lightning.heads.maps import untouched
from qkov_lightning.heads.projections import BLOCKS, Projection
from qkov_lightning.heads.slots import Slots, context_features, find_heads
from qkov_lightning.heads.softmaxes import Softmax, leaves_of, trace
from qkov_lightning.heads.watching import Product, whole_input

Run = Callable[[], object]
"""Runs the model on a sample or a few."""


@dataclass(frozen=True)
class Discovery:
    """What was found.

    Attributes:
        projections: The heads, layer by layer, in the order of the model's modules.
        refused: What looks like attention, but has no heads that could be placed: where, and why.
    """

    projections: tuple[Projection, ...]
    refused: tuple[tuple[str, str], ...]


def discover_projections(model: nn.Module, run: Run) -> Discovery:
    """Find and prove the heads of every attention that runs.

    Args:
        model: Left as found.
        run: Runs it on one or a few samples of at least two tokens.
    """
    discoverer = _Discoverer(model)
    with untouched(model), discoverer.watching():
        discoverer.finish(run())
    return discoverer.result()


@dataclass(eq=False)
class _Found:
    """One attention: its parts, and what became of them."""

    parts: Parts
    problem: str | None = None

    def note_use(self, name: str, reached: Collection[int]) -> None:
        """Something used the result."""
        self.parts.note_use(name, reached)


class _Discoverer(GraphCutter):
    """Says what each attention is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._found: list[_Found] = []

    def _note_squashed(self, name: str, output: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            seen = trace(output)
            if seen.is_joined and not any(key not in self._leaf_of for key in seen.leaves):
                near = {one for key in seen.leaves for one in self._leaf_of[key].names}
                parts = Parts([], {}, [], sorted(one for one in near if not one.startswith(NAMELESS)))
                self._found.append(_Found(parts, f"its scores pass through `{name}` in place of a softmax"))

    def _close(self, softmaxes: Sequence[Softmax], products: Sequence[Product]) -> None:
        found = self._read_all(softmaxes, products, inner=True)
        if found is not None and found.problem is not None:
            without = self._read_all(softmaxes, products, inner=False)
            found = found if without is None or without.problem is not None else without
        if found is not None:
            self._found.append(found)
        for softmax in softmaxes:
            self._closed[id(softmax.probabilities)] = (weakref.ref(softmax.probabilities), found)

    def _read_all(
        self, softmaxes: Sequence[Softmax], products: Sequence[Product], inner: bool
    ) -> _Found | None:
        """What the softmaxes are together; None if they are no attention over tokens."""
        seen: list[tuple[Softmax, Slots]] = []
        context = self._context(products)
        problem: _Found | None = None
        for softmax in softmaxes:
            values = self._values(softmax, context)
            try:
                seen.append((softmax, find_heads(len(seen), softmax, values, self._leaf_of, inner)))
            except NoHeadsError as error:
                if not isinstance(error, NoAttentionError):
                    problem = _Found(Parts([], {}, [], self._near(softmax)), str(error))
        return problem if problem is not None or not seen else self._read(seen, products, context)

    def _near(self, softmax: Softmax) -> list[str]:
        """Maps that the scores come from."""
        leaves = (self._leaf_of[key] for key in leaves_of(softmax.scores) if key in self._leaf_of)
        names = {name for leaf in leaves for name in leaf.names}
        return sorted(name for name in names if not name.startswith(NAMELESS))

    def _context(self, products: Sequence[Product]) -> tuple[str, tuple[int, ...], Tensor] | None:
        """The input of an output projection, with a feature for each that its parameter has."""
        pieces = [piece for product in products for piece in product.pieces]
        if not pieces or len({piece.name for piece in pieces}) != 1:
            return None
        axes = tuple(i for i in range(len(pieces[0].shape)) if i not in pieces[0].axes_of_outputs)
        whole = whole_input(products, pieces[0].name, axes, size_of(pieces[0].shape, axes))
        return None if whole is None else (pieces[0].name, axes, whole)

    @staticmethod
    def _values(softmax: Softmax, context: tuple[str, tuple[int, ...], Tensor] | None) -> Tensor | None:
        """What each probability weighs, in the shape of the scores."""
        ends = [
            end
            for end in (softmax.weighted_values, None if context is None else context[2])
            if end is not None
        ]
        for end in ends:
            generator = torch.Generator().manual_seed(0)
            direction = torch.randn(end.shape, generator=generator, dtype=torch.float64).to(end)
            (values,) = torch.autograd.grad(
                end, softmax.probabilities, direction, create_graph=True, allow_unused=True
            )
            if values is not None:
                return values
        return None

    def _read(
        self,
        seen: Sequence[tuple[Softmax, Slots]],
        products: Sequence[Product],
        context: tuple[str, tuple[int, ...], Tensor] | None,
    ) -> _Found:
        heads = [head for _, slots in seen for head in slots.heads]
        sources: dict[str, set[tuple[int, ...]]] = {}
        origins: dict[str, set[tuple[int, ...]]] = {}
        for leaf in self._leaf_of.values():
            for name in leaf.names:
                sources.setdefault(name, set()).add(leaf.source)
                origins.setdefault(name, set()).update(leaf.origins)
        outputs: list[frozenset[tuple[str, int]]] = []
        if context is not None:
            name, axes, whole = context
            self._axes.setdefault(f"{name} (inputs)", axes)
            for softmax, slots in seen:
                own = context_features(whole, softmax, slots)
                outputs += [frozenset((name, feature) for feature in features) for features in own]
        context_leaves = frozenset() if context is None else frozenset(leaves_of(context[2]))
        parts = Parts(
            heads,
            sources,
            outputs,
            self._near(seen[0][0]),
            origins,
            [slots.computed for _, slots in seen],
            context_leaves,
            all(slots.queries_are_keys for _, slots in seen),
        )
        if context_leaves and context_leaves <= {id(softmax.probabilities) for softmax, _ in seen}:
            return _Found(parts, "what its softmax gives is changed by a weight before it meets values")
        if products and context is None:
            return _Found(
                parts,
                "its result goes into several linear maps at once, or into one whose weight is computed",
            )
        axes_of = {**self._axes, **({} if context is None else {context[0]: context[1]})}
        widths = dict(self._widths)
        try:
            layer = assemble(parts, widths, axes_of)
            self._prove(layer, seen, None if context is None else context[2])
        except NoHeadsError as error:
            return _Found(parts, str(error))
        return _Found(parts)

    def _prove(
        self, layer: Sequence[Projection], seen: Sequence[tuple[Softmax, Slots]], context: Tensor | None
    ) -> None:
        """Check a head map as one that somebody claims.

        Raises:
            NoHeadsError: If it does not hold.
        """
        softmaxes = [softmax for softmax, _ in seen]
        if len({softmax.scores.shape for softmax in softmaxes}) != 1:
            raise NoHeadsError("softmaxes of different sizes lead to one output projection")

        def headed(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat(
                [slots.headed(tensor) for tensor, (_, slots) in zip(tensors, seen, strict=True)], dim=1
            )

        weighted = [softmax.weighted_values for softmax in softmaxes]
        if context is None and any(one is None for one in weighted):
            raise NoHeadsError("it is not seen what becomes of its result")
        graph = AttentionGraph(
            {projection.block: projection for projection in layer},
            sum(len(slots.heads) for _, slots in seen),
            self._graph_leaves(layer),
            headed([softmax.scores for softmax in softmaxes]),
            [softmax.probabilities for softmax in softmaxes],
            [context if one is None else one for one in weighted],  # type: ignore[misc]
            context,
            headed,
        )
        for (block, head), problem in graph.problems().items():
            if problem:
                raise NoHeadsError(f"head {head} of {block} {problem}")

    def _graph_leaves(self, layer: Sequence[Projection]) -> dict[str, list[GraphLeaf]]:
        leaves: dict[str, list[GraphLeaf]] = {}
        for projection in layer:
            starts, start = {}, 0
            for name in projection.map_names:
                starts[name] = start
                start += self._widths.get(name, 0)
            own = []
            for leaf in self._leaf_of.values():
                if not leaf.names & starts.keys():
                    continue
                places = [
                    (column, starts[feature[0]] + feature[1])
                    for column, feature in enumerate(leaf.features)
                    if feature[0] in starts
                ]
                if places:
                    columns, features = zip(*places, strict=True)
                    own.append(GraphLeaf(leaf.tensor, torch.tensor(columns), torch.tensor(features), start))
            leaves[projection.module_name] = own
        return leaves

    # What is said of it

    def result(self) -> Discovery:
        """All attention layers, and what was refused."""
        refused: list[tuple[str, str]] = []
        kept: list[Parts] = []
        for found in self._found:
            if found.problem is not None:
                refused.append((label_of(found.parts.near), found.problem))
                continue
            if found.parts.problem is not None:
                refused.append((label_of(found.parts.near), found.parts.problem))
                continue
            kept.append(found.parts.without_leaking_output())
        layers: list[list[Projection]] = []
        for parts in kept:
            names = {feature[0] for head in parts.heads for feature in (*head.scores, *head.values)}
            if names & self._clashes:
                refused.append((label_of(sorted(names)), "one weight is multiplied from both sides"))
                continue
            axes = dict(self._axes)
            for name in {feature[0] for own in parts.outputs for feature in own}:
                axes[name] = self._axes.get(f"{name} (inputs)", axes.get(name, ()))
            try:
                layers.append(assemble(parts, self._widths, axes))
            except NoHeadsError as error:
                refused.append((label_of(parts.near), str(error)))
        order = {name: place for place, (name, _) in enumerate(self._model.named_modules())}
        order |= {name: place for place, (name, _) in enumerate(self._model.named_parameters())}
        unique = _unique(layers)
        unique.sort(key=lambda layer: min(order.get(n, 0) for p in layer for n in p.map_names))
        modules = {name for name, _ in self._model.named_modules()}
        projections = [
            replace(
                projection,
                layer=number,
                input_axes=None if modules >= {*projection.map_names} else projection.input_axes,
            )
            for number, layer in enumerate(unique)
            for projection in sorted(layer, key=lambda p: BLOCKS.index(p.block))
        ]
        return Discovery(tuple(projections), tuple(dict.fromkeys(refused)))


def _unique(layers: Sequence[list[Projection]]) -> list[list[Projection]]:
    """Without layers that ran more than once, as where layers share their weights."""
    unique: dict[object, list[Projection]] = {}
    for layer in layers:
        key = tuple((p.block, p.module_name, tuple(p.head_features.flatten().tolist())) for p in layer)
        unique.setdefault(key, layer)
    return list(unique.values())


def explain(refused: Sequence[tuple[str, str]]) -> str:
    """What was refused, in one sentence each."""
    return " ".join(f"Attention `{where or '?'}` is not placed: {why}." for where, why in refused)
