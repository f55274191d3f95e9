"""Proof on a model itself that each claimed slice is the head that the model computes.

No name and no config is read: the check follows derivatives from the claimed features to the head axis of the
softmax, and from there to the input of the output projection.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning.heads.architectures import find_projections
from qkov_lightning.heads.influence import AttentionGraph, by_head
from qkov_lightning.heads.multihead import MultiheadLinears
from qkov_lightning.heads.projections import Block, Projection

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)

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
    placed = find_projections(model) if projections is None else list(projections)
    observer = _Observer(model, placed)
    run = forward or (lambda inputs: _call(model, inputs))
    with _frozen(model), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        with observer.watching():
            run(batch)
    return Verification(tuple(observer.checks()))


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in LABEL_KEYS})
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter trainable; everything restored afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@dataclass(eq=False)
class _Softmax:
    """One call: its input, its output as a leaf, and what became of the values that it weighs."""

    scores: Tensor
    probabilities: Tensor
    weighted_values: Tensor | None = None


class _Observer(MultiheadLinears):
    """Makes the output of each projection, and of each softmax behind it, a leaf of the autograd graph."""

    def __init__(self, model: nn.Module, projections: Sequence[Projection]) -> None:
        packed = {n: m for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
        super().__init__(packed, self._packed_linear)
        self._model = model
        self._projections = projections
        self._problems: dict[tuple[int, Block, int], str | None] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._softmaxes: list[_Softmax] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        for name in dict.fromkeys(p.module_name for p in self._projections):
            module = self._model.get_submodule(name)
            if isinstance(module, nn.MultiheadAttention):
                continue
            if any(p.block == "O" for p in self._projections if p.module_name == name):
                handles.append(module.register_forward_pre_hook(self._before_output(name), with_kwargs=True))
                handles.append(module.register_forward_hook(lambda _module, _args, output: output.detach()))
            else:
                handles.append(module.register_forward_hook(self._after(name)))
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
                    "not seen: the layer did not run, or not as softmax attention with its heads in view, over two tokens at least "
                    '(fused kernels hide it: load the model with attn_implementation="sdpa" or "eager")',
                )
                yield CellCheck(projection, head, problem)

    def _after(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return self._leaf(name, output)

        return hook

    def _before_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._close(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    def _leaf(self, name: str, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self._outputs.setdefault(name, []).append(leaf)
        return leaf.clone()

    def _packed_linear(self, name: str, start: int, activation: Tensor, output: Tensor) -> Tensor:
        if any(p.module_name == name and p.block == "O" for p in self._projections):
            self._close(name, activation)
            return output.detach()
        rows = self._model.get_submodule(name).get_parameter("in_proj_weight").shape[0]
        padded = functional.pad(output, (start, rows - start - output.shape[-1]))
        return self._leaf(name, padded)[..., start : start + output.shape[-1]]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._scaled_dot_product(*args, **kwargs)
        output = super().__torch_function__(func, types, args, kwargs)
        if func in (functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return self._softmax(args[0] if args else kwargs["input"], output, dim)
        if func in PRODUCTS and self._softmaxes and self._softmaxes[-1].weighted_values is None:
            weights, queries = args[0], self._softmaxes[-1].probabilities.shape[-2]
            if isinstance(weights, Tensor) and weights.requires_grad and weights.shape[-2:-1] == (queries,):
                self._softmaxes[-1].weighted_values = output
        return output

    def _softmax(self, scores: Tensor, output: Tensor, dim: int | None) -> Tensor:
        if not scores.requires_grad or dim not in (-1, scores.ndim - 1):
            return output
        # A token that may look at nothing has no probabilities, and a model may mend that later.
        leaf = output.detach().nan_to_num(0.0).requires_grad_()
        self._softmaxes.append(_Softmax(scores, leaf))
        return leaf.clone()

    def _scaled_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The definition of the fused function, with its softmax in view."""
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
        scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(
                    ~attn_mask, -torch.inf
                )
            scores = scores + attn_mask
        # A token that may look at nothing gives zeros, not NaN.
        probabilities = scores.softmax(dim=-1).nan_to_num(0.0)
        output = self._softmax(scores, probabilities, -1) @ value
        if scores.requires_grad:
            self._softmaxes[-1].weighted_values = output
        return output

    def _close(self, name: str, context: Tensor) -> None:
        """Check the layers that end in the output projection ``name``, whose input has arrived."""
        outputs, softmaxes = self._outputs, self._softmaxes
        self._outputs, self._softmaxes = {}, []
        for ending in self._projections:
            if ending.block != "O" or ending.module_name != name:
                continue
            layer = {p.block: p for p in self._projections if p.layer == ending.layer}
            num_heads = max(p.num_heads for p in layer.values())
            for softmax in softmaxes:
                graph = self._graph(layer, num_heads, outputs, softmax, context)
                if graph is None:
                    continue
                with torch._C.DisableTorchFunction():  # the check is not for the observer to see
                    problems = graph.problems()
                for (block, head), problem in problems.items():
                    cell = (ending.layer, block, head)
                    self._problems[cell] = self._problems.get(cell) or problem

    @staticmethod
    def _graph(
        layer: Mapping[Block, Projection],
        num_heads: int,
        outputs: Mapping[str, list[Tensor]],
        softmax: _Softmax,
        context: Tensor,
    ) -> AttentionGraph | None:
        """The computation around one softmax, if it has the axis of the heads and leads to the context."""
        scores, probabilities = softmax.scores, softmax.probabilities
        if by_head(scores, num_heads) is None or scores.shape[-1] < 2 or not context.requires_grad:
            return None
        weighted = softmax.weighted_values
        for end in (context,) if weighted is None else (context, weighted):
            reached = torch.autograd.grad(end.sum(), probabilities, retain_graph=True, allow_unused=True)
            if reached[0] is None and end is context:
                return None
            if reached[0] is None:
                weighted = None
        weighted = context if weighted is None else weighted
        return AttentionGraph(layer, num_heads, outputs, scores, probabilities, weighted, context)
