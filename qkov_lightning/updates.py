"""The direction in which a task updates a slice, and how it moves with each sample of the task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

UpdateDirection = Literal["adam", "sgd"]

STEP_SIZE = 0.01
"""Length of the step whose effect is predicted: ten steps with a learning rate of 0.001."""

INFLUENCE_BYTES = 256 * 2**20
"""Memory for what standard errors need: beyond it the gradients are read again for some tasks at a time."""


def damped(
    fisher: Float[Tensor, "*any weight"],
    damping: float,
    weights: Float[Tensor, "head weight"] | None = None,
) -> Float[Tensor, "*any weight"]:
    r""":math:`I + \epsilon`, the damping relative to the (weighted) mean over the slice, so that units cancel."""
    return fisher + damping * _slice_mean(fisher, weights)


def _slice_mean(
    values: Float[Tensor, "*any weight"], weights: Float[Tensor, "head weight"] | None
) -> Float[Tensor, "*any 1"]:
    if weights is None:
        return values.mean(dim=-1, keepdim=True)
    return (values * weights).sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True)


def update_rate(
    update: UpdateDirection | Float[Tensor, "head weight"],
    mean_gradient: Float[Tensor, "*task head weight"],
    mean_square: Float[Tensor, "*task head weight"],
    damping: float,
    weights: Float[Tensor, "head weight"] | None = None,
) -> Float[Tensor, "*task head weight"]:
    r"""What an optimiser multiplies the mean gradient with, per weight: :math:`d = \rho \, \bar g`.

    Args:
        update: "adam" divides by the root of the damped mean square of the task's own gradients,
            :math:`\rho = (\overline{g^2} + \epsilon)^{-1/2}` (Kingma & Ba 2015, arXiv:1412.6980, whose second moment is
            that of batches; of single samples here). "sgd": 1. A tensor: the rates themselves, as from an
            optimiser's state.
        mean_gradient: Mean gradient.
        mean_square: Mean squared gradient.
        damping: Relative to the mean of the mean square over the slice.
        weights: As for :func:`~qkov_lightning.reduction.slice_statistics`.

    Returns:
        The rates.
    """
    if isinstance(update, Tensor):
        return update.to(mean_gradient).expand_as(mean_gradient)
    if update == "sgd":
        return torch.ones_like(mean_gradient)
    return damped(mean_square, damping, weights).rsqrt()


class UpdateDirections:
    """The update direction of every task, and how it moves with a sample of the task."""

    def __init__(
        self,
        mean_gradient: Float[Tensor, "task head weight"],
        mean_square: Float[Tensor, "task head weight"],
        count: Float[Tensor, "task 1 1"],
        damping: float,
        update: UpdateDirection | Float[Tensor, "head weight"],
        weights: Float[Tensor, "head weight"],
    ) -> None:
        self._mean, self._square, self._count = mean_gradient, mean_square, count
        self._damping, self._update, self._weights = damping, update, weights
        self._rate = update_rate(update, mean_gradient, mean_square, damping, weights)
        self._direction = mean_gradient * self._rate

    @property
    def weighted(self) -> Float[Tensor, "task head weight"]:
        """The directions, ready for inner products over the slice."""
        return self._direction * self._weights

    def without_self(
        self,
        response: Float[Tensor, "sample task head"],
        chunk: Float[Tensor, "sample head weight"],
        tasks: Int[Tensor, sample],
    ) -> Float[Tensor, "sample task head"]:
        """Inner products of samples with the directions; with that of a sample's own task, of the others' direction."""
        for task, rows, samples in _by_task([chunk], tasks):
            response[rows, task] = (samples * self._without(samples, task) * self._weights).sum(dim=-1)
        return response

    def _without(
        self, samples: Float[Tensor, "sample head weight"], task: int
    ) -> Float[Tensor, "sample head weight"]:
        """Direction of the task without each of the samples."""
        count = self._count[task]
        others = (count - 1).clamp(min=1)
        mean = (count * self._mean[task] - samples) / others
        # Rounding can leave less than nothing of a weight that only this sample moves.
        square = ((count * self._square[task] - samples.square()) / others).clamp(min=0)
        return mean * update_rate(self._update, mean, square, self._damping, self._weights)

    def influences(
        self,
        chunks: Iterable[Float[Tensor, "_ head weight"]],
        task_indices: Int[Tensor, sample],
        response: Float[Tensor, "sample task head"],
    ) -> dict[str, list[Tensor]]:
        """Derivatives of the mean response and of the mean squared response in each sample of the pushing task."""
        slope = torch.zeros_like(response)
        curvature = torch.zeros_like(response)
        # A vector of the slice's size for each pair of tasks: some pushing tasks at a time.
        size = max(1, INFLUENCE_BYTES // max(1, self._mean.nbytes))
        for first in range(0, len(self._mean), size):
            pushing = range(first, min(first + size, len(self._mean)))
            weighted = self._response_weighted_mean(chunks, task_indices, response, pushing)
            for task, rows, samples in _by_task(chunks, task_indices):
                if task in pushing:
                    slope[rows] = self._derivative(samples, task, self._mean)
                    curvature[rows] = 2 * self._derivative(samples, task, weighted[:, task - first])
        return {"slope_influence": [slope], "curvature_influence": [curvature]}

    def _response_weighted_mean(
        self,
        chunks: Iterable[Float[Tensor, "_ head weight"]],
        task_indices: Int[Tensor, sample],
        response: Float[Tensor, "sample task head"],
        pushing: range,
    ) -> Float[Tensor, "task_a task_b head weight"]:
        """Mean over A of each sample's gradient times its response to each of the pushing tasks B."""
        total = self._mean.new_zeros(len(self._mean), len(pushing), *self._mean.shape[1:])
        for task, rows, samples in _by_task(chunks, task_indices):
            to = response[rows, pushing.start : pushing.stop]
            total[task] += torch.einsum("nth,nhk->thk", to, samples)
        return total / self._count.unsqueeze(-1)

    def _derivative(
        self,
        samples: Float[Tensor, "sample head weight"],
        task: int,
        vectors: Float[Tensor, "other head weight"],
    ) -> Float[Tensor, "sample other head"]:
        r""":math:`\langle y, \partial d / \partial j \rangle`, up to a constant, which no variance sees."""
        moved = inner(samples, vectors * (self._rate[task] * self._weights))
        if isinstance(self._update, Tensor) or self._update == "sgd":
            return moved
        # d = m (f + eps)^(-1/2), with m the mean gradient and f the mean square, in which eps is a share.
        slowed = vectors * (self._direction[task] * self._rate[task].square() * self._weights / 2)
        square = samples.square()
        share = self._damping * _slice_mean(square, self._weights)[..., 0][:, None] * slowed.sum(dim=-1)
        return moved - inner(square, slowed) - share


def _by_task(
    chunks: Iterable[Float[Tensor, "_ head weight"]], task_indices: Int[Tensor, sample]
) -> Iterator[tuple[int, Int[Tensor, _], Float[Tensor, "_ head weight"]]]:
    """The samples of each task in each chunk, with their places among all samples."""
    start = 0
    for chunk in chunks:
        tasks = task_indices[start : start + len(chunk)]
        for task in tasks.unique().tolist():
            if task >= 0:
                rows = (tasks == task).nonzero().flatten()
                yield task, rows + start, chunk[rows]
        start += len(chunk)


def inner(samples: Tensor, vectors: Tensor) -> Tensor:
    """[sample, head, weight] and [task, head, weight] to [sample, task, head]."""
    return torch.einsum("nhk,thk->nth", samples, vectors)
