r"""How a loss joins the losses of its samples, read from its autograd graph.

A training loss is a few scalar operations on reductions of many elements (tokens, samples, pixels). The graph
knows each reduction: its input, its weights, and the numbers that its result is divided by. No forward pass
is repeated, and nothing of the graph changes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qkov_lightning.capture.reading import finest, read_together

MAX_ELEMENTS = 2**22
"""Elements of the largest tensor that is made to read a loss."""

MAX_SELECTED = 2**26
"""Elements of the largest tensor that something may be selected from."""

MAX_NODES = 2000
"""Nodes to visit on the way from a reduction to the model's attention layers."""

LINEAR = frozenset(
    f"{name}Backward{version}"
    for version in range(4)
    for name in (
        "Add", "Sub", "Neg", "Mul", "Div", "Mean", "Sum", "NanSum", "ToCopy", "Clone", "Alias", "View", "UnsafeView",
        "ReshapeAlias", "Squeeze", "Unsqueeze", "Expand", "Permute", "Transpose", "T", "Slice", "Select", "Index",
        "MaskedSelect", "MaskedFill", "Where", "IndexSelect",
    )
)  # fmt: skip
"""Nodes whose derivative depends on their input through factors only that are in the loss themselves."""

SELECTING = ("IndexBackward", "MaskedSelectBackward", "IndexSelectBackward")
"""Nodes that take some elements out of more."""

CUTTING = ("SelectBackward", "UnbindBackward", "SliceBackward", "SplitBackward", "SplitWithSizesBackward")
"""Nodes that take a piece along one dimension."""


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One reduction of many elements to a number, which is part of the loss.

    Attributes:
        joined: "mean" divides by the number of elements, "weighted_mean" by the sum of their weights, "sum"
            by nothing.
        levels: Weights of the elements: of those that the reduction reads, then of those that these are made
            of, in the order of the samples. Zero for padding.
        divisors: What the result is divided by on its way to the loss, number by number.
        selected: Nonzero where an element of the whole was selected, before the loss was taken; None if all
            were.
        is_part: Whether its elements are not those of all samples, as in a loop over samples, or in
            statistics of the batch.
        owner: The ``tap`` of the first attention layer below, if one was found.
    """

    joined: Literal["mean", "weighted_mean", "sum"]
    levels: tuple[Tensor, ...]
    divisors: tuple[float, ...]
    selected: Tensor | None
    is_part: bool
    owner: object


@dataclass(frozen=True, eq=False)
class TracedTerm:
    """A reduction whose numbers are still where the loss is.

    Attributes:
        term: The reduction, without divisors.
        factors: Derivatives of the number that is the loss, node by node on the way to the reduction.
    """

    term: LossTerm
    factors: tuple[Tensor, ...]


def read_loss(loss: Tensor) -> list[LossTerm]:
    """The reductions that a loss consists of; those in operations that are not known are left out."""
    return read_terms(trace_loss(loss))


def read_terms(traced: Sequence[TracedTerm]) -> list[LossTerm]:
    """Numbers of traced reductions, after one wait for the device that has them.

    Reductions that are no part of the loss, or of none that is finite, are left out.
    """
    tensors = [tensor for one in traced for tensor in _tensors(one)]
    read = iter(tensor.double() for tensor in read_together(tensors))
    terms = []
    for one in traced:
        levels = tuple(next(read) for _ in one.term.levels)
        selected = None if one.term.selected is None else next(read)
        factors = [abs(float(next(read))) for _ in one.factors]
        if all(factor and math.isfinite(factor) for factor in factors):
            divisors = tuple(1 / factor for factor in factors if not math.isclose(factor, 1.0))
            terms.append(replace(one.term, levels=levels, selected=selected, divisors=divisors))
    return terms


def _tensors(traced: TracedTerm) -> Iterator[Tensor]:
    yield from traced.term.levels
    if traced.term.selected is not None:
        yield traced.term.selected
    yield from traced.factors


def trace_loss(loss: Tensor) -> list[TracedTerm]:
    """Find the reductions that a loss consists of, before its backward pass. No device is waited for."""
    terms: list[TracedTerm] = []
    if loss.grad_fn is None or loss.numel() != 1:
        return terms
    todo: list[tuple[Any, int, tuple[Tensor, ...]]] = [(loss.grad_fn, 0, ())]
    for _ in range(MAX_NODES):
        if not todo:
            break
        node, output, factors = todo.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if hasattr(node, "_saved_reduction") and _size(node, output) == 1:
            term = _loss_function(node)
            terms += [] if term is None else [TracedTerm(term, factors)]
        elif node.name() in LINEAR:
            gradients = _backward(node, output)
            reduced = [
                (child, index, gradient)
                for (child, index), gradient in zip(node.next_functions, gradients, strict=False)
                if child is not None and gradient is not None
            ]
            for child, index, gradient in reduced:
                if _size(child, index) == 1:
                    todo.append((child, index, (*factors, gradient.sum())))
                elif len(children) == 1 and node.name().startswith(("Mean", "Sum", "NanSum")):
                    terms.append(TracedTerm(_reduction(node, child, index, gradient), factors))
    return terms


def _reduction(node: Any, child: Any, index: int, gradient: Tensor) -> LossTerm:
    """A mean or a sum over all elements of a tensor."""
    is_mean = node.name().startswith("Mean")
    ones = torch.ones_like(gradient)
    levels, last = [ones], (child, index)
    for level, below in _down(child, index, ones):
        levels.append(level)
        last = below
    joined: Literal["mean", "sum"] = "mean" if is_mean else "sum"
    # The derivative of a loss function without a reduction is where its elements are valid.
    mask = _valid(last[0])
    if mask is not None and mask.numel() == levels[-1].numel():
        levels.append(levels[-1].flatten() * mask.flatten())
    if last[0].name().startswith("LogSoftmax") and levels[-1].shape == _shape(*last):
        # The classes of one target are no terms of their own.
        levels.append(levels[-1].sum(dim=_signed(last[0]._saved_dim)))
    return LossTerm(joined, tuple(levels), (), *_below(child, levels[0].numel()))


def _loss_function(node: Any) -> LossTerm | None:
    """A loss function that reduces by itself, such as the cross-entropy."""
    joined: dict[int, Literal["mean", "sum"]] = {1: "mean", 2: "sum"}
    weights = _valid(node)
    child = node.next_functions[0][0]
    if node._saved_reduction not in joined or child is None:
        return None
    if weights is not None:
        how: Any = "weighted_mean" if node._saved_reduction == 1 else "sum"
    else:
        how, weights = joined[node._saved_reduction], torch.ones(_shape(child, node.next_functions[0][1]))
    return LossTerm(how, (weights,), (), *_below(child, weights.numel()))


def _valid(node: Any) -> Tensor | None:
    """Weights of the targets of a cross-entropy, 0 for those that it ignores; None for other nodes."""
    if not node.name().startswith("NllLoss"):
        return None
    target, ignored = node._saved_target, node._saved_ignore_index
    ignored -= 2**64 if ignored >= 2**63 else 0
    valid = target != ignored
    if node._saved_weight is None:
        return _exact(valid)
    return _exact(node._saved_weight[target.where(valid, 0)] * valid)


def _down(node: Any, output: int, weights: Tensor) -> Iterator[tuple[Tensor, tuple[Any, int]]]:
    """Weights of the elements below, as long as they are combined linearly from one tensor."""
    while node.name() in LINEAR:
        gradients = _backward(node, output, weights)
        children = [
            (child, index, gradient)
            for (child, index), gradient in zip(node.next_functions, gradients, strict=False)
            if child is not None and gradient is not None and _size(child, index) > 1
        ]
        if len(children) != 1 or children[0][2].numel() > MAX_ELEMENTS:
            return
        node, output, weights = children[0]
        yield weights, (node, output)


def _below(node: Any, num_elements: int) -> tuple[Tensor | None, bool, object]:
    """What was selected between a reduction and the first tap below, whether of some samples, and the tap."""
    selected, is_part, todo, seen = None, False, deque([node]), {node}
    while todo and len(seen) < MAX_NODES:
        node = todo.popleft()
        owner = getattr(node, "tap", None)
        if owner is not None:
            return selected, is_part, owner
        if selected is None and node.name().startswith(SELECTING):
            selected = _selection(node, num_elements)
        is_part |= node.name().startswith(CUTTING) and node._saved_dim == 0 and _is_shorter(node)
        is_part |= _mixes_rows(node)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)
    return selected, is_part, None


def _mixes_rows(node: Any) -> bool:
    """Whether a node takes a mean or a sum over rows, as statistics of a batch do."""
    if not node.name().startswith(("MeanBackward1", "SumBackward1")):
        return False
    shape = _shape(*node.next_functions[0])
    dims = [_signed(dim) % max(1, len(shape)) for dim in node._saved_dim]
    return 0 in dims and len(shape) > 1 and shape[0] > 1


def _signed(dim: int) -> int:
    """A dimension as autograd saves it, where -1 is the largest integer."""
    return dim - 2**64 if dim >= 2**63 else dim


def _is_shorter(node: Any) -> bool:
    """Whether less comes out of a node than goes into it."""
    return _size(node, 0) < _size(*node.next_functions[0])


def _selection(node: Any, num_elements: int) -> Tensor | None:
    """Where the elements of a reduction, or rows of features that became them, were taken from."""
    shape, (source, index) = _shape(node, 0), node.next_functions[0]
    by_row = len(shape) > 1 and shape[0] == num_elements
    if not (by_row or math.prod(shape) == num_elements) or math.prod(_shape(source, index)) > MAX_SELECTED:
        return None
    whole = _backward(node, 0)[0]
    if whole is None:
        return None
    # A copy of one feature of each row: the whole may be as large as the features of the model.
    return whole.flatten(whole.ndim - len(shape) + 1)[..., 0].flatten().clone() if by_row else whole.flatten()


def _backward(node: Any, output: int, gradient: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Derivative of a node with respect to its inputs, times a gradient of one of its outputs (or 1)."""
    metadata = node._input_metadata
    kind = metadata[output]
    # In the finest numbers that the node allows: a count of tokens must come out exactly.
    for dtype in dict.fromkeys((finest(kind.device), kind.dtype)):
        gradients: list[Tensor | None] = [None] * len(metadata)
        if gradient is None:
            gradients[output] = torch.ones((), dtype=dtype, device=kind.device).expand(kind.shape)
        else:
            gradients[output] = gradient.to(kind.device, dtype).expand(kind.shape)
        try:
            with torch.no_grad():
                result = node(*gradients)
        except RuntimeError:  # another type, or a saved tensor was changed in place or freed
            continue
        result = result if isinstance(result, tuple) else (result,)
        return tuple(None if one is None else _exact(one) for one in result)
    return tuple(None for _ in node.next_functions)


def _exact(values: Tensor) -> Tensor:
    return values.to(finest(values.device))


def _shape(node: Any, output: int) -> tuple[int, ...]:
    metadata = node._input_metadata
    return tuple(metadata[output].shape) if output < len(metadata) else ()


def _size(node: Any, output: int) -> int:
    return math.prod(_shape(node, output))
