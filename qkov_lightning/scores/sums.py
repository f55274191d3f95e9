"""What the samples of each task add up to, and what each sample is then compared with.

All samples at some of the weights, or some samples at all weights of a head: sums take either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.scores.spans import Place, SamplesByTask, inner
from qkov_lightning.scores.updates import UpdateDirection, UpdateDirections, damped


def halves_of(task_indices: Int[Tensor, sample], groups: Int[Tensor, sample]) -> Int[Tensor, sample]:
    """Half of its task that each sample is in: the groups of a task are dealt out in turn.

    A task whose samples are all of one group has one half only.
    """
    halves = torch.zeros_like(task_indices)
    for task in task_indices.unique().tolist():
        own = task_indices == task
        halves[own] = groups[own].unique(return_inverse=True)[1] % 2
    return halves


class TaskSums:
    """Sums over the samples of each task (of each half of it).

    Args:
        num_tasks: Number of tasks.
        each: How many weights of the slice each one stands for.
        with_cubes: Whether the cubes of the magnitudes are summed, which pairs of a sample with itself need.

    Attributes:
        count: Samples of each half.
        gradient: Their gradients.
        absolute: Magnitudes of the gradients of the whole task.
        square: Their squares.
        cube: Cubes of the magnitudes; None if they are not wanted.
    """

    def __init__(self, num_tasks: int, each: Float[Tensor, "head weight"], with_cubes: bool = False) -> None:
        self.each = each
        self.count = torch.zeros(2, num_tasks, dtype=torch.float64, device=each.device)
        self.absolute, self.square = (each.new_zeros(num_tasks, *each.shape) for _ in range(2))
        self.gradient = each.new_zeros(2, num_tasks, *each.shape)
        self.cube = torch.zeros_like(self.square) if with_cubes else None

    @property
    def task_count(self) -> Float[Tensor, task]:
        """Samples of each task."""
        return self.count.sum(dim=0)

    def add(self, samples: SamplesByTask) -> Float[Tensor, "sample head"]:
        """Take samples that were not taken before.

        Returns:
            Their squared norms.
        """
        squared_norm = samples.zeros(len(self.each))
        for task, half, rows in samples.halves:
            self.count[half, task] += rows.stop - rows.start
        for at, gradient, square, absolute in samples:
            squared_norm[:, at[1]] += inner(square, self.each[at][None])[:, 0]
            for task, half, rows in samples.halves:
                self.gradient[half, task][at] += gradient[rows].sum(dim=0)
            for task, rows in samples.groups:
                self.absolute[task][at] += absolute[rows].sum(dim=0)
                self.square[task][at] += square[rows].sum(dim=0)
                if self.cube is not None:
                    self.cube[task][at] += (square[rows] * absolute[rows]).sum(dim=0)
        return squared_norm

    def drop_magnitudes(self) -> None:
        """Forget what interference alone needs: magnitudes and cubes."""
        self.absolute, self.cube = self.absolute.new_empty(0), None

    def plain_fisher(self) -> Float[Tensor, "head weight"]:
        """Mean squared gradient of each task that has samples, then the mean over these tasks."""
        present = self.task_count > 0
        means = self.square[present] / self.task_count[present].to(self.square)[:, None, None]
        return means.mean(dim=0)


@dataclass(frozen=True, eq=False)
class Reference:
    """What each sample is compared with.

    Attributes:
        sums: Sums over all samples.
        own_square: Mean over the samples of each task, and over the weights of the slice, of their squares.
        fisher: Fisher pooled over tasks.
        inverse: Weights over the damped Fisher.
        damping: Added to a mean square, relative to its mean over the slice.
        update: Direction in which a task updates the slice.
    """

    sums: TaskSums
    own_square: Float[Tensor, "task head"]
    fisher: Float[Tensor, "head weight"]
    inverse: Float[Tensor, "head weight"]
    damping: float
    update: UpdateDirection | Float[Tensor, "head weight"]

    @classmethod
    def of(
        cls,
        sums: TaskSums,
        own_square: Float[Tensor, "task head"],
        fisher: Float[Tensor, "head weight"],
        damping: float,
        update: UpdateDirection | Float[Tensor, "head weight"],
        weights: Float[Tensor, "head weight"] | None = None,
    ) -> Reference:
        """With the inverse of the damped Fisher; ``weights`` is None where every weight was kept."""
        inverse = sums.each / damped(fisher, damping, weights)
        return cls(sums, own_square, fisher, inverse, damping, update)

    def directions(self, at: Place) -> UpdateDirections:
        """The update direction of every task at some weights."""
        sums = self.sums
        rule = self.update[at] if isinstance(self.update, Tensor) else self.update
        epsilon = self.damping * self.own_square[:, at[1], None]
        return UpdateDirections(
            rule,
            sums.gradient[at],
            sums.square[at],
            sums.count.to(sums.square),
            epsilon,
            self.damping,
            sums.each[at],
        )
