"""Sums over the gradients of a slice, some weights of all samples at a time.

Pure functions that a processor's caches can follow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SPAN_BYTES = 2 * 2**20
"""Gradients that a processor works on at once: small enough for its caches."""

MIN_WEIGHTS = 64
"""Weights of a head that a processor works on, about, however many samples there are."""

Place = tuple[Any, slice, slice]
"""Indexes ``[..., head, weight]``."""


def weight_spans(gradient: Float[Tensor, "sample head weight"]) -> Iterator[tuple[slice, slice]]:
    """Heads and weights to work on at once, so that all samples of these fit into a processor's caches."""
    num_samples, num_heads, num_weights = gradient.shape
    # Many small kernels would keep an accelerator waiting.
    size = SPAN_BYTES if gradient.device.type == "cpu" else 32 * SPAN_BYTES
    width = max(MIN_WEIGHTS, size // max(1, num_samples * gradient.element_size()))
    together = max(1, width // max(1, num_weights))
    # Of even size, which may be down to half the width: a short rest takes as many calls as the others.
    width = math.ceil(num_weights / math.ceil(num_weights / width)) if num_weights > width else width
    for head in range(0, num_heads, together):
        heads = slice(head, min(head + together, num_heads))
        for weight in range(0, num_weights, width):
            yield heads, slice(weight, min(weight + width, num_weights))


class SamplesByTask:
    """The gradients of a slice, some weights of all samples at a time, those of a task side by side.

    Args:
        blocks: Gradients of all samples, block after block of weights, readable several times.
        task_indices: Task of each sample, counted from 0; -1 leaves a sample out.
        num_tasks: Number of tasks.
        num_weights: Weights of a head, in all blocks together.
        halves: Half of its task that each sample is in, 0 or 1, which then stand side by side, too.

    Attributes:
        groups: For each task that has samples, where they stand.
        halves: The same for each half of a task: task, half, place.
        membership: 1 where a sample, in the order of their tasks, belongs to a task.
        count: Samples of each task.
    """

    def __init__(
        self,
        blocks: Iterable[Float[Tensor, "_ head _"]],
        task_indices: Int[Tensor, sample],
        num_tasks: int,
        num_weights: int,
        halves: Int[Tensor, sample] | None = None,
    ) -> None:
        self._blocks, self._num_samples, self._num_weights = blocks, len(task_indices), num_weights
        half = torch.zeros_like(task_indices) if halves is None else halves.to(task_indices)
        order = (2 * task_indices + half).argsort(stable=True)
        self._order = order[task_indices[order] >= 0]
        self._memory: Tensor | None = None
        tasks = task_indices[self._order]
        self.membership = torch.nn.functional.one_hot(tasks, num_tasks).T.double()
        self.count = self.membership.sum(dim=1)
        self.groups = _places(self.count.long().tolist())
        per_half = torch.bincount(2 * tasks + half[self._order], minlength=2 * num_tasks)
        self.halves = [(*divmod(place, 2), rows) for place, rows in _places(per_half.tolist())]

    @property
    def order(self) -> Int[Tensor, kept]:
        """Which of the samples stands at each place."""
        return self._order

    def of(self, per_sample: Tensor) -> Tensor:
        """Values of the samples, in the order of their tasks."""
        return per_sample.to(self._order.device)[self._order]

    def zeros(self, *size: int) -> Float[Tensor, kept * size]:
        """A sum for each sample, in float64."""
        return torch.zeros(len(self._order), *size, dtype=torch.float64, device=self._order.device)

    def __iter__(self) -> Iterator[tuple[Place, Tensor, Tensor, Tensor]]:
        """Some weights at a time: where they stand, and their gradients, squares and magnitudes.

        All three are written over by the next.

        Raises:
            ValueError: If there is not one task per sample, or not as many weights as expected.
        """
        start = 0
        for block in self._blocks:
            if len(block) != self._num_samples:
                raise ValueError(
                    f"{self._num_samples} tasks for gradients of {len(block)} samples, expected one each: a block "
                    "holds all samples, at some of the weights."
                )
            for heads, weights in weight_spans(block):
                source = block[:, heads, weights].detach()
                gradient, square, absolute = self._buffers(source)
                torch.index_select(source, 0, self._order, out=gradient)
                torch.mul(gradient, gradient, out=square)
                torch.abs(gradient, out=absolute)
                place = (..., heads, slice(start + weights.start, start + weights.stop))
                yield place, gradient, square, absolute
            start += block.shape[2]
        if start != self._num_weights:
            raise ValueError(f"Gradients of {start} weights a head, but a Fisher of {self._num_weights}.")

    def _buffers(self, source: Tensor) -> list[Tensor]:
        """Memory for three tensors, the same at every call: fresh memory costs more than the arithmetic."""
        shape = (len(self._order), *source.shape[1:])
        if self._memory is None or self._memory.shape[1] < math.prod(shape):
            self._memory = source.new_empty(3, math.prod(shape))
        return [memory[: math.prod(shape)].view(shape) for memory in self._memory]


def _places(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Where the members of each kind stand, one kind after the other; nothing of kinds that have none."""
    ends = itertools.accumulate(counts)
    return [(i, slice(end - n, end)) for i, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]


def weighted_squares(
    blocks: Iterable[Float[Tensor, sample * some_weights]], coefficients: Float[Tensor, "row sample"]
) -> Float[Tensor, row * weight]:
    r"""Sums over samples :math:`\sum_i c_{ri} g_i^2`.

    Args:
        blocks: Per-sample gradients of all samples, block after block along the last axis.
        coefficients: The c.
    """
    used = coefficients.any(dim=0).nonzero().flatten().tolist() or [0]
    rows = slice(used[0], used[-1] + 1)  # not a copy: those of new steps are the last ones
    parts = []
    for block in blocks:
        width = block.shape[-1] if block.ndim > 1 else 1
        gradient = block[rows].detach().reshape(rows.stop - rows.start, -1, width)
        factors = coefficients[:, rows].to(block)
        part = block.new_empty(len(factors), *gradient.shape[1:])
        for heads, weights in weight_spans(gradient):
            part[:, heads, weights] = torch.tensordot(factors, gradient[:, heads, weights].square(), dims=1)
        parts.append(part.view(len(factors), *block.shape[1:]))
    return torch.cat(parts, dim=-1)


def inner(
    samples: Float[Tensor, "sample head weight"], vectors: Float[Tensor, "vector head weight"]
) -> Float[Tensor, "sample vector head"]:
    """Inner products over the weights of each head."""
    return torch.bmm(samples.transpose(0, 1), vectors.permute(1, 2, 0)).permute(1, 2, 0)
