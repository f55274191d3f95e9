"""Sight of every softmax of a model while it runs, and of what its output weighs.

Its output becomes a leaf of the autograd graph, so that what comes before it and what comes after it are
apart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning.heads.contraction import MATMULS
from qkov_lightning.heads.parameter_views import flat
from qkov_lightning.heads.watching import MapWatcher

MATRIX_PRODUCTS = ("BmmBackward0", "MmBackward0", "BaddbmmBackward0", "AddmmBackward0")
"""Nodes of the autograd graph that multiply matrices."""

SOFTMAXES = (
    functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax,
    functional.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax,
)  # fmt: skip
"""Functions that make probabilities, or their logarithms, which carry the same."""


SQUASHES = (torch.exp, Tensor.exp, torch.sigmoid, Tensor.sigmoid, functional.sigmoid)
"""Functions that some attention uses in place of a softmax."""


@dataclass(eq=False)
class Softmax:
    """One softmax.

    Attributes:
        scores: Its input, with the axis that it runs along last.
        probabilities: Its output as a leaf, in the same form.
        weighted_values: What became of the values that it weighs, if that was seen.
    """

    scores: Float[Tensor, "*place key"]
    probabilities: Float[Tensor, "*place key"]
    weighted_values: Tensor | None = None


class SoftmaxWatcher(MapWatcher):
    """While active, makes the output of each softmax a leaf and keeps what it was made of.

    Grad mode is on, and checkpoints keep what they would compute again: derivatives are taken at once.

    Attributes:
        softmaxes: Those that were seen since somebody emptied the list.
    """

    softmaxes: list[Softmax]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with derivatives_on():
            if func is functional.scaled_dot_product_attention:
                return self._scaled_dot_product(*args, **kwargs)
            output = super().__torch_function__(func, types, args, kwargs)
            if func in SOFTMAXES:
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                return self._softmax(args[0] if args else kwargs["input"], output, dim)
            if func in MATMULS or func is torch.einsum:
                self._note_weighted(args, output)
            elif func in SQUASHES and isinstance(output, Tensor) and output.requires_grad:
                self._note_squashed(func.__name__, output)
        return output

    def _note_squashed(self, name: str, output: Tensor) -> None:
        """An exponential or a sigmoid, which some use in place of a softmax."""

    def _note_weighted(self, args: tuple[Any, ...], output: Tensor) -> None:
        softmax = self.softmaxes[-1] if self.softmaxes else None
        if softmax is None or softmax.weighted_values is not None or not output.requires_grad:
            return
        operands = [a for a in flat(args) if isinstance(a, Tensor) and a.requires_grad]
        keys = softmax.scores.shape[-1]
        if any(keys in a.shape and leads_to(a, softmax.probabilities) for a in operands):
            softmax.weighted_values = output

    def _softmax(self, scores: Tensor, output: Tensor, dim: int | None) -> Tensor:
        if not scores.requires_grad or dim is None or scores.ndim < 2:
            return output
        # A token that may look at nothing has no probabilities, and a model may mend that later.
        leaf = output.detach().nan_to_num(0.0).movedim(dim, -1).requires_grad_()
        self.softmaxes.append(Softmax(scores.movedim(dim, -1), leaf))
        return leaf.clone().movedim(-1, dim)

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
            self.softmaxes[-1].weighted_values = output
        return output


@contextlib.contextmanager
def derivatives_on() -> Iterator[None]:
    """Grad mode, whatever the model says, and tensors that checkpoints do not compute again."""
    hooks = torch.autograd.graph.saved_tensors_hooks(_kept, _itself)
    with torch.inference_mode(False), torch.enable_grad(), hooks:
        yield


@dataclass(frozen=True)
class Trace:
    """Where a tensor comes from.

    Attributes:
        leaves: The leaves of the autograd graph that it was computed from, by identity.
        is_joined: Whether a product of two of them is on the way.
        is_hidden: Whether a function of the user's own with a weight is on the way.
    """

    leaves: dict[int, Tensor]
    is_joined: bool
    is_hidden: bool = False


def trace(tensor: Tensor) -> Trace:
    """Where a tensor comes from."""
    if tensor.is_leaf:
        return Trace({id(tensor): tensor} if tensor.requires_grad else {}, False)
    found: dict[int, Tensor] = {}
    is_joined = is_hidden = False
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        following = [one for one, _ in node.next_functions if one is not None]
        is_joined |= node.name() in MATRIX_PRODUCTS and len(following) > 1
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            saved = node.saved_tensors
            is_hidden |= any(isinstance(one, nn.Parameter) and one.ndim > 1 for one in saved)
        waiting += following
    return Trace(found, is_joined, is_hidden)


def leaves_of(tensor: Tensor) -> dict[int, Tensor]:
    """The leaves of the autograd graph that a tensor was computed from, by identity."""
    return trace(tensor).leaves


def leads_to(tensor: Tensor, leaf: Tensor) -> bool:
    """Whether a tensor was computed from a leaf."""
    return id(leaf) in leaves_of(tensor)


def _kept(tensor: Tensor) -> Tensor:
    """What the graph keeps of a tensor: one that leads back to the graph would keep it alive for ever."""
    return tensor if tensor.is_leaf else tensor.detach()


def _itself(tensor: Tensor) -> Tensor:
    return tensor
