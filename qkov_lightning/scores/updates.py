"""The direction in which a task updates a slice, and how it moves with each sample of the task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.scores.spans import SamplesByTask, inner

UpdateDirection = Literal["adam", "sgd"]

STEP_SIZE = 0.01
"""Length of the step whose effect is predicted: ten steps with a learning rate of 0.001."""


def damped(
    fisher: Float[Tensor, "*any weight"],
    damping: float,
    weights: Float[Tensor, "head weight"] | None = None,
) -> Float[Tensor, "*any weight"]:
    r""":math:`I + \epsilon`, with a damping relative to the (weighted) mean over the slice."""
    if weights is None:
        return fisher + damping * fisher.mean(dim=-1, keepdim=True)
    mean = (fisher * weights).sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True)
    return fisher + damping * mean


def update_rate(
    update: UpdateDirection | Float[Tensor, "head weight"],
    mean_square: Float[Tensor, "*task head weight"],
    epsilon: Float[Tensor, "*task head 1"],
) -> Float[Tensor, "*task head weight"]:
    r"""What an optimiser multiplies the mean gradient with, per weight: :math:`d = \rho \, \bar g`.

    Args:
        update: "adam" divides by the root of the damped mean square of the task's own gradients, :math:`\rho
            = (\overline{g^2} + \epsilon)^{-1/2}` (Kingma & Ba 2015, arXiv:1412.6980, whose second moment is
            that of batches; of single samples here). "sgd": 1. A tensor: the rates themselves, as from an
            optimiser's state.
        mean_square: Mean squared gradient.
        epsilon: Damping of each slice: a share of the mean of its mean square.

    Returns:
        The rates.
    """
    if isinstance(update, Tensor):
        return update.to(mean_square).expand_as(mean_square)
    if update == "sgd":
        return torch.ones_like(mean_square)
    return (mean_square + epsilon).rsqrt()


@dataclass(frozen=True, eq=False)
class TaskSamples:
    """Samples of one half of a task, at some weights of a slice.

    Attributes:
        task: The task.
        half: The half.
        gradient: Their gradients.
        square: Their squared gradients.
        slice_square: Means of these over the whole slice.
    """

    task: int
    half: int
    gradient: Float[Tensor, "sample head weight"]
    square: Float[Tensor, "sample head weight"]
    slice_square: Float[Tensor, "sample head"]


def task_samples(
    samples: SamplesByTask,
    gradient: Float[Tensor, "sample head weight"],
    square: Float[Tensor, "sample head weight"],
    slice_square: Float[Tensor, "sample head"],
) -> Iterator[tuple[int, list[tuple[slice, TaskSamples]]]]:
    """For each task, where the samples of its halves stand, and what a direction needs of them."""
    for task, halves in itertools.groupby(samples.halves, key=lambda one: one[0]):
        yield (
            task,
            [
                (rows, TaskSamples(task, half, gradient[rows], square[rows], slice_square[rows]))
                for _, half, rows in halves
            ],
        )


class UpdateDirections:
    r"""The update direction :math:`d = \rho \bar g` of every task at some weights of a slice.

    Each half of a task's samples has a direction of its own, with the rates :math:`\rho` of the whole task:
    what the two have in common is not noise.

    Args:
        update: Rule that gives the rates.
        gradient_sum: Sum of the gradients of each half.
        square_sum: Sum of the squared gradients.
        count: Samples of each half.
        epsilon: What is added to the mean square, one number per slice.
        damping: The share of the slice's mean of the mean square that it is.
        weights: How many weights each one stands for.

    Attributes:
        mean_gradient: Mean gradient.
        mean_square: Mean squared gradient.
    """

    def __init__(
        self,
        update: UpdateDirection | Float[Tensor, "head weight"],
        gradient_sum: Float[Tensor, "half task head weight"],
        square_sum: Float[Tensor, "task head weight"],
        count: Float[Tensor, "half task"],
        epsilon: Float[Tensor, "task head 1"],
        damping: float,
        weights: Float[Tensor, "head weight"],
    ) -> None:
        self._is_adaptive = not isinstance(update, Tensor) and update == "adam"
        self._damping, self._weights = damping, weights
        self._half_sum, self._half_count = gradient_sum, count
        self._gradient_sum, self._square_sum, self._count = (
            gradient_sum.sum(dim=0),
            square_sum,
            count.sum(dim=0),
        )
        each = self._count.clamp(min=1)[:, None, None]
        self.mean_gradient, self.mean_square = self._gradient_sum / each, square_sum / each
        self._epsilon = epsilon
        self._rate = update_rate(update, self.mean_square, epsilon.to(square_sum))

    def weighted(self, out: Float[Tensor, "task head weight"]) -> None:
        """Write the directions, ready for inner products over the slice."""
        torch.mul(self.mean_gradient, self._rate, out=out).mul_(self._weights)

    def weighted_half(self, out: Float[Tensor, "task head weight"]) -> None:
        """Write those of the first half of each task; 0 for a half without samples."""
        first = self._half_count[0].clamp(min=1)[:, None, None]
        torch.div(self._half_sum[0], first, out=out).mul_(self._rate).mul_(self._weights)

    def half_mean(self, half: int, task: int) -> Float[Tensor, "head weight"]:
        """Mean gradient of one half of a task, which must have samples."""
        return self._half_sum[half, task] / self._half_count[half, task]

    def response_to_others(
        self, own: TaskSamples, scratch: Float[Tensor, "sample head weight"]
    ) -> tuple[Float[Tensor, "sample head"], Float[Tensor, "sample head"]]:
        r"""Inner product of each sample of a task with the direction of the task's other samples.

        .. math:: \Big\langle g_i, \frac{s - g_i}{n - 1}
                  \Big(\frac{q - g_i^2}{n - 1} + \epsilon_{-i}\Big)^{-1/2} \Big\rangle

        with the sums s and q over the n samples of their gradients and squares. Where the others have no
        gradient at all, neither has their direction.

        Args:
            own: The samples; their gradients and squares are written over.
            scratch: Memory to write to.

        Returns:
            That with all others, and that with those of the other half alone.
        """
        task = own.task
        count = self._count[task]
        others = (count - 1).clamp(min=1)
        # From sums, not means: without the only sample that has a gradient nothing is left, not even
        # rounding.
        rest = torch.sub(self._gradient_sum[task], own.gradient, out=scratch)
        product = own.gradient * rest
        across = self._half_sum[1 - own.half, task]
        in_other = self._half_count[1 - own.half, task].clamp(min=1)
        if not self._is_adaptive:
            rate = (self._rate[task] * self._weights)[None]
            with_all = inner(product, rate)[:, 0] / others
            return with_all, inner(own.gradient, rate * across)[:, 0] / in_other
        rest_square = torch.sub(self._square_sum[task], own.square, out=own.square)
        # Next to a sample that dwarfs the others, their squares drown in rounding: they are no less than the
        # square of their sum allows (Cauchy-Schwarz).
        torch.maximum(rest_square, rest.square_().div_(others), out=rest_square)
        damping = count * self._epsilon[task][:, 0] - self._damping * own.slice_square
        rate = rest_square.add_(damping.clamp(min=0).to(rest)[..., None]).rsqrt_().nan_to_num_(posinf=0.0)
        with_all = inner(product.mul_(rate), self._weights[None])[:, 0] / others.sqrt()
        with_other = inner(own.gradient.mul_(rate), (self._weights * across)[None])[:, 0]
        return with_all, with_other * others.sqrt() / in_other

    def slopes(
        self, task: int, times_mean: Float[Tensor, "other head weight"]
    ) -> Callable[[TaskSamples, Float[Tensor, "other head weight"]], Float[Tensor, "sample other head"]]:
        r""":math:`\langle y, \partial d / \partial j \rangle`, up to a constant, which no variance sees.

        Args:
            task: The task whose direction d moves.
            times_mean: The y times the mean gradient that they belong to.

        Returns:
            That as a function of samples j of the task, and of y that they meet.
        """
        rate = self._rate[task] * self._weights
        if not self._is_adaptive:
            return lambda own, vectors: inner(own.gradient, vectors * rate)
        # d = m (f + eps)^(-1/2), with m the mean gradient and f the mean square, in which eps is a share.
        slowed = times_mean * (self._rate[task].square().mul_(rate).div_(2))
        shared = self._damping * slowed.sum(dim=-1)

        def moved(
            own: TaskSamples, vectors: Float[Tensor, "other head weight"]
        ) -> Float[Tensor, "sample other head"]:
            share = own.slice_square.to(slowed)[:, None] * shared
            return inner(own.gradient, vectors * rate) - inner(own.square, slowed) - share

        return moved
