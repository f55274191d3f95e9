r"""From the per-sample gradients of one slice to sums over its weights: all that the scores are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.updates import STEP_SIZE, UpdateDirection, UpdateDirections, damped, inner

MIN_SAMPLES = 2
"""A task with fewer samples in a slice has no score there: a variance needs two."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A score of every ordered task pair (a, b) and head, NaN where a task has fewer than two samples.

    Attributes:
        value: The score.
        variance: Its sampling variance over samples of both tasks, the Fisher taken as known.
    """

    value: Float[Tensor, "task_a task_b head"]
    variance: Float[Tensor, "task_a task_b head"]


@dataclass(frozen=True, eq=False)
class SliceStatistics:
    r"""What the scores are made of: sums over weights, per sample, in float64.

    Attributes:
        membership: 1 where a sample belongs to a task.
        sensitivity: :math:`\langle u_i, \bar v_t \rangle` for each sample i and task t.
        push: :math:`\langle \bar u_t, v_i \rangle`.
        self_pair: :math:`\langle u_i, v_i \rangle`.
        absolute_norm: :math:`\sum_k |g_{ik}|`.
        alignment: :math:`\langle g_i, \bar g_t \rangle`.
        squared_norm: :math:`\sum_k g_{ik}^2`.
        whitened_alignment: :math:`\langle g_i, \bar g_t / (I + \epsilon) \rangle`.
        whitened_squared_norm: :math:`\sum_k g_{ik}^2 / (I_k + \epsilon)`.
        response: :math:`r_{it} = \langle g_i, d_t \rangle` with the update direction :math:`d_t` of each task t; for a
            sample's own task, that of its other samples.
        slope_influence: How the mean response of each task t to the direction of a sample's own task moves with that
            sample, :math:`\langle \bar g_t, \partial d / \partial j \rangle`.
        curvature_influence: The same of the mean squared response.
        step_size: Length of the step along the update direction.
    """

    membership: Float[Tensor, "task sample"]
    sensitivity: Float[Tensor, "sample task head"]
    push: Float[Tensor, "sample task head"]
    self_pair: Float[Tensor, "sample head"]
    absolute_norm: Float[Tensor, "sample head"]
    alignment: Float[Tensor, "sample task head"]
    squared_norm: Float[Tensor, "sample head"]
    whitened_alignment: Float[Tensor, "sample task head"]
    whitened_squared_norm: Float[Tensor, "sample head"]
    response: Float[Tensor, "sample task head"]
    slope_influence: Float[Tensor, "sample task head"]
    curvature_influence: Float[Tensor, "sample task head"]
    step_size: float

    @property
    def count(self) -> Float[Tensor, task]:
        """Samples of each task."""
        return self.membership.sum(dim=1)

    def task_mean(self, per_sample: Float[Tensor, sample * rest]) -> Float[Tensor, task * rest]:
        """Mean over the samples of each task."""
        return torch.tensordot(self.membership, per_sample, dims=1) / _column(self.count, per_sample.ndim)

    def task_variance(self, per_sample: Float[Tensor, sample * rest]) -> Float[Tensor, task * rest]:
        """Sampling variance of ``task_mean``: the unbiased variance over samples, divided by their number."""
        deviation = per_sample - torch.tensordot(self.membership.T, self.task_mean(per_sample), dims=1)
        squares = torch.tensordot(self.membership, deviation.square(), dims=1)
        count = _column(self.count, per_sample.ndim)
        return squares / (count * (count - 1))

    def of_own_task(self, per_task: Float[Tensor, task * rest]) -> Float[Tensor, sample * rest]:
        """The entry of each sample's own task."""
        return torch.tensordot(self.membership.T, per_task, dims=1)

    def without_self(
        self, per_sample: Float[Tensor, "sample task head"]
    ) -> Float[Tensor, "sample task head"]:
        """Marginals with the pair (i, i) taken out of the mean over the sample's own task."""
        own = self.membership.T.unsqueeze(-1).bool()
        count = self.of_own_task(self.count)[:, None, None]
        return torch.where(own, (count * per_sample - self.self_pair[:, None]) / (count - 1), per_sample)

    def pair_estimate(
        self,
        value: Float[Tensor, "task_a task_b head"],
        as_a: Float[Tensor, "sample task_b head"],
        as_b: Float[Tensor, "sample task_a head"],
    ) -> Estimate:
        """Add the sampling variance, from each sample's influence on the value.

        Args:
            value: The score.
            as_a: Influence of a sample as a member of its task A, on the pair with each task B.
            as_b: Influence as a member of task B, on the pair with each task A.

        Returns:
            Two-sample variance ``var(as_a) / n_a + var(as_b) / n_b``; within one task both influences
            come from the same samples and are added before the variance is taken.
        """
        variance = self.task_variance(as_a) + self.task_variance(as_b).transpose(0, 1)
        within = self.task_variance(as_a + as_b).diagonal(dim1=0, dim2=1)
        variance = variance.clone()
        variance.diagonal(dim1=0, dim2=1).copy_(within)
        no_data = self.count < MIN_SAMPLES
        no_data = (no_data[:, None] | no_data[None, :]).unsqueeze(-1)
        return Estimate(value.masked_fill(no_data, torch.nan), variance.masked_fill(no_data, torch.nan))


def _column(values: Tensor, ndim: int) -> Tensor:
    return values.view(-1, *(1,) * (ndim - 1))


def slice_statistics(
    chunks: Iterable[Float[Tensor, "_ head weight"]],
    task_indices: Int[Tensor, sample],
    num_tasks: int,
    fisher: Float[Tensor, "head weight"],
    damping: float,
    update: UpdateDirection | Float[Tensor, "head weight"] = "adam",
    step_size: float = STEP_SIZE,
    weights: Float[Tensor, "head weight"] | None = None,
    num_replicates: int = 1,
) -> SliceStatistics:
    """Reduce per-sample gradients to sums over weights, in time and memory linear in the samples.

    Args:
        chunks: Gradients of the samples in order, read several times (a list, or an object whose ``__iter__``
            makes them anew), so that not all of them need be in memory.
        task_indices: Task of each sample, counted from 0; -1 leaves a sample out.
        num_tasks: Number of tasks.
        fisher: Fisher pooled over tasks.
        damping: Added to the Fisher, relative to its mean over the slice.
        update: Direction in which a task updates the slice, see :func:`~qkov_lightning.updates.update_rate`.
        step_size: Length of the step along it.
        weights: How many weights of the slice each one stands for, where only some were kept.
        num_replicates: Independent samples of the weights of each head, which stand side by side as if they were heads.

    Returns:
        The statistics of the samples that belong to a task.

    Raises:
        ValueError: If there is not one task per sample.
    """
    each = torch.ones_like(fisher) if weights is None else weights.to(fisher)
    inverse = each / damped(fisher, damping, weights)
    membership = torch.nn.functional.one_hot(task_indices + 1, num_tasks + 1)[:, 1:].to(fisher).T
    count = membership.sum(dim=1).clamp(min=1)[:, None, None]
    mean_gradient = fisher.new_zeros(num_tasks, *fisher.shape)
    mean_absolute, mean_square = torch.zeros_like(mean_gradient), torch.zeros_like(mean_gradient)
    start = 0
    for chunk in chunks:
        belongs = membership[:, start : start + len(chunk)]
        if belongs.shape[1] != len(chunk):
            raise ValueError(
                f"{len(task_indices)} tasks for gradients of {start + len(chunk)} samples, expected one each."
            )
        start += len(chunk)
        mean_gradient += torch.tensordot(belongs, chunk, dims=1)
        mean_absolute += torch.tensordot(belongs, chunk.abs(), dims=1)
        mean_square += torch.tensordot(belongs, chunk.square(), dims=1)
    if start != len(task_indices):
        raise ValueError(f"{len(task_indices)} tasks for gradients of {start} samples, expected one each.")
    mean_gradient, mean_absolute, mean_square = (
        total / count for total in (mean_gradient, mean_absolute, mean_square)
    )
    sensitive_to = mean_absolute * inverse
    pushed_by = mean_square * inverse
    pulled_by = mean_gradient * inverse
    directions = UpdateDirections(mean_gradient, mean_square, count, damping, update, each)
    parts: dict[str, list[Tensor]] = {}
    # Products with the same samples are taken at once, so that the samples are read once.
    with_gradients = torch.cat([mean_gradient * each, pulled_by, directions.weighted])
    with_squares = torch.cat([sensitive_to, inverse[None], each[None]])
    with_absolutes = torch.cat([pushed_by, each[None]])
    start = 0
    for chunk in chunks:
        tasks = task_indices[start : start + len(chunk)]
        start += len(chunk)
        square, absolute = chunk.square(), chunk.abs()
        alignment, whitened_alignment, response = inner(chunk, with_gradients).split(num_tasks, dim=1)
        sensitivity, whitened_squared_norm, squared_norm = inner(square, with_squares).split(
            [num_tasks, 1, 1], dim=1
        )
        push, absolute_norm = inner(absolute, with_absolutes).split([num_tasks, 1], dim=1)
        results = {
            "sensitivity": sensitivity,
            "push": push,
            "self_pair": inner(square.mul_(absolute), inverse[None]).squeeze(1),
            "absolute_norm": absolute_norm.squeeze(1),
            "alignment": alignment,
            "squared_norm": squared_norm.squeeze(1),
            "whitened_alignment": whitened_alignment,
            "whitened_squared_norm": whitened_squared_norm.squeeze(1),
            "response": directions.without_self(response, chunk, tasks),
        }
        for name, result in results.items():
            parts.setdefault(name, []).append(result)
    parts |= directions.influences(
        chunks, task_indices, _mean_over_replicates(torch.cat(parts["response"]), num_replicates)
    )
    kept = task_indices >= 0
    return SliceStatistics(
        membership=membership[:, kept].double(),
        **{name: torch.cat(results).double()[kept] for name, results in parts.items()},
        step_size=step_size,
    )


def _mean_over_replicates(
    response: Float[Tensor, "sample task head"], num_replicates: int
) -> Float[Tensor, "sample task head"]:
    """The response of a whole head in the place of each of its replicates."""
    mean = response.unflatten(-1, (-1, num_replicates)).mean(dim=-1)
    return mean.repeat_interleave(num_replicates, dim=-1)
