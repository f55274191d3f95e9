"""Proof on a model itself that each claimed slice is the head that the model computes.

No name and no config is read: the check follows derivatives from the claimed features to the head axis of the
softmax, and from there to the input of the output projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkov_lightning.heads.architectures import named_projections
from qkov_lightning.heads.influence import AttentionGraph, Leaf, by_head
from qkov_lightning.heads.maps import LinearMap, MapPart, find_map, untouched
from qkov_lightning.heads.projections import Block, Projection
from qkov_lightning.heads.softmaxes import Softmax, SoftmaxWatcher, leads_to
from qkov_lightning.heads.watching import Piece, Product, features_last, on_call, whole_input

NOT_SEEN = "not seen"
"""Begins what is said of a cell that could not be checked."""

LABEL_KEYS = ("task", "sample_id", "num_target_tokens")
"""Entries of a batch that speak to the monitor, not to the model."""


@dataclass(frozen=True)
class CellCheck:
    """What became of one cell of the head map.

    Attributes:
        projection: Layer and block.
        head: Head of the block, from 0.
        problem: What is wrong, or None.
    """

    projection: Projection
    head: int
    problem: str | None

    @property
    def is_wrong(self) -> bool:
        """Whether the slice is another head, or none; not so where it could not be checked."""
        return self.problem is not None and not self.problem.startswith(NOT_SEEN)

    def __str__(self) -> str:
        name = (
            f"L{self.projection.layer} H{self.head} {self.projection.block} (`{self.projection.layer_name}`)"
        )
        return f"{name}: {self.problem or 'pass'}"


@dataclass(frozen=True)
class Verification:
    """Outcome of ``verify_projections``: one check per cell."""

    cells: tuple[CellCheck, ...]

    @property
    def failures(self) -> tuple[CellCheck, ...]:
        """The cells that are not proven."""
        return tuple(cell for cell in self.cells if cell.problem)

    @property
    def passed(self) -> bool:
        """Whether every cell is proven."""
        return not self.failures

    def __str__(self) -> str:
        lines = [f"{len(self.cells) - len(self.failures)} of {len(self.cells)} cells proven"]
        return "\n".join(lines + [str(cell) for cell in self.failures])


def verify_projections(
    model: nn.Module,
    batch: Any,
    projections: Sequence[Projection] | None = None,
    forward: Callable[[Any], object] | None = None,
) -> Verification:
    r"""Whether each claimed slice is the head that the model computes, and nothing else.

    One forward pass; each layer is cut out of it, so that only its own attention answers. With the attention
    scores :math:`s_h` (the input of the softmax), its output :math:`p_h` and the input x of the output
    projection, a cell passes if

    - Q, K: mixing the slice moves :math:`s_h` of exactly its head, or group of heads. The score of one query
      token must depend on the Q slice at one token, and on the K slice at several.
    - V: mixing the slice moves :math:`\partial x / \partial p_h` of exactly its head or group, and no score.
    - O: the claimed features of x depend on :math:`p_h` of exactly its head.

    The mixes are infinitesimal rotations that keep the sum and the length of the slice, so that a
    normalisation over all heads does not carry them to other heads.

    Args:
        model: Left as found.
        batch: One or a few samples of at least two tokens: a mapping is passed by keyword (without the
            entries for the monitor), a tuple or list by position, anything else as the one argument.
        projections: The head map; ``find_projections(model)`` if left out.
        forward: Runs the model on the batch, if calling it is not enough.

    Returns:
        A check per layer, block and head. A layer whose attention does not pass through a softmax that can
        be watched is reported as not proven.
    """
    placed = named_projections(model) if projections is None else list(projections)
    observer = _Observer(model, placed)
    run = forward or (lambda inputs: call(model, inputs))
    with untouched(model), observer.watching():
        run(batch)
    return Verification(tuple(observer.checks()))


def call(model: nn.Module, batch: Any) -> object:
    """Run a model on a batch.

    A mapping is passed by keyword, without the entries for the monitor; a tuple or list by position.
    """
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in LABEL_KEYS})
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


class _Observer(SoftmaxWatcher):
    """Cuts the graph at the output of each projection, and of each softmax behind it."""

    def __init__(self, model: nn.Module, projections: Sequence[Projection]) -> None:
        self._maps: dict[str, LinearMap] = {p.module_name: find_map(model, p) for p in projections}
        self._parts: dict[str, list[tuple[LinearMap, MapPart]]] = {}
        for one in self._maps.values():
            for part in one.parts:
                self._parts.setdefault(part.name, []).append((one, part))
        super().__init__(model, self._products, [name for name in self._parts if not self._is_called(name)])
        self._model = model
        self._projections = projections
        self._outgoing = {name for p in projections if p.block == "O" for name in p.map_names}
        self._problems: dict[tuple[int, Block, int], str | None] = {}
        self._outputs: dict[str, list[Leaf]] = {}
        self.softmaxes: list[Softmax] = []

    def _is_called(self, name: str) -> bool:
        return self._parts[name][0][1].container is None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        for name in self._parts:
            if self._is_called(name):
                module = self._model.get_submodule(name)
                if name in self._outgoing:  # before it runs: its input is still in the graph
                    handles.append(
                        module.register_forward_pre_hook(self._before_output(name, module), with_kwargs=True)
                    )
                    handles.append(
                        module.register_forward_hook(lambda _module, _args, output: output.detach())
                    )
                else:
                    hook = on_call(name, module, self._products)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def checks(self) -> Iterator[CellCheck]:
        for projection in self._projections:
            for head in range(projection.num_heads):
                problem = self._problems.get(
                    (projection.layer, projection.block, head),
                    f"{NOT_SEEN}: the layer did not run, or not as softmax attention with its heads in view, over two tokens at least "
                    '(fused kernels hide it: load the model with attn_implementation="sdpa" or "eager")',
                )
                yield CellCheck(projection, head, problem)

    def _before_output(self, name: str, module: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            context = args[0] if args else next(iter(kwargs.values()))
            with torch._C.DisableTorchFunction():
                self._close(name, features_last(module, context))

        return hook

    def _products(self, products: Sequence[Product]) -> list[Tensor | None]:
        with torch._C.DisableTorchFunction():
            ending = [
                piece for product in products for piece in product.pieces if piece.name in self._outgoing
            ]
            if ending:
                self._close(ending[0].name, self._context(products, ending[0]))
                return [product.output.detach() for product in products]
            return [self._cut(product) for product in products]

    def _cut(self, product: Product) -> Tensor | None:
        own = [piece for piece in product.pieces if piece.name in self._parts]
        if not own:
            return None
        leaf = product.output.detach().clone().requires_grad_()
        for piece in own:
            for one, part in self._parts[piece.name]:
                features = piece.output_features(part.input_axes or piece.axes_of_inputs)
                start = one.starts[piece.name]
                self._outputs.setdefault(one.name, []).append(
                    Leaf(leaf, piece.columns, start + features, one.num_outputs)
                )
        return leaf.clone()

    def _context(self, products: Sequence[Product], piece: Piece) -> Tensor:
        """The input of an output projection, with a column for each feature of its parameter."""
        part = self._parts[piece.name][0][1]
        axes = part.input_axes or piece.axes_of_inputs
        whole = whole_input(products, piece.name, axes, part.num_inputs)
        return products[0].activation if whole is None else whole

    def _close(self, name: str, context: Tensor) -> None:
        """Check the layers that end in the output projection ``name``, whose input has arrived."""
        outputs, softmaxes = self._outputs, self.softmaxes
        self._outputs, self.softmaxes = {}, []
        for ending in self._projections:
            if ending.block != "O" or name not in ending.map_names:
                continue
            layer = {p.block: p for p in self._projections if p.layer == ending.layer}
            num_heads = max(p.num_heads for p in layer.values())
            for graph in self._graphs(layer, num_heads, outputs, softmaxes, context):
                for (block, head), problem in graph.problems().items():
                    cell = (ending.layer, block, head)
                    self._problems[cell] = self._problems.get(cell) or problem

    def _graphs(
        self,
        layer: Mapping[Block, Projection],
        num_heads: int,
        outputs: Mapping[str, list[Leaf]],
        softmaxes: Sequence[Softmax],
        context: Tensor,
    ) -> Iterator[AttentionGraph]:
        """The computation around each softmax that has the axis of the heads and leads to the context."""
        leading = [s for s in softmaxes if _leads(s, context)]
        for softmax in leading:
            if by_head(softmax.scores, num_heads) is not None and softmax.scores.shape[-1] > 1:
                yield _graph(
                    layer, num_heads, outputs, [softmax], context, lambda t: _headed(t[0], num_heads)
                )
        # Every head may have a softmax of its own.
        singles = len(leading) == num_heads > 1 and len({s.scores.shape for s in leading}) == 1
        if singles and by_head(leading[0].scores, num_heads) is None:
            yield _graph(layer, num_heads, outputs, leading, context, _stacked)


def _graph(
    layer: Mapping[Block, Projection],
    num_heads: int,
    outputs: Mapping[str, list[Leaf]],
    softmaxes: Sequence[Softmax],
    context: Tensor,
    headed: Callable[[Sequence[Tensor]], Tensor],
) -> AttentionGraph:
    weighted = [s.weighted_values for s in softmaxes]
    ends = [
        context
        if one is None or not leads_to(context, s.probabilities) or not leads_to(one, s.probabilities)
        else one
        for one, s in zip(weighted, softmaxes, strict=True)
    ]
    scores = headed([s.scores for s in softmaxes])
    return AttentionGraph(
        layer, num_heads, outputs, scores, [s.probabilities for s in softmaxes], ends, context, headed
    )


def _leads(softmax: Softmax, context: Tensor) -> bool:
    return context.requires_grad and leads_to(context, softmax.probabilities)


def _headed(tensor: Tensor, num_heads: int) -> Tensor:
    headed = by_head(tensor, num_heads)
    return tensor if headed is None else headed


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors], dim=1)
