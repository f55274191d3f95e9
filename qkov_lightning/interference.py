r"""The scores, as pure functions of one slice's per-sample gradients.

Notation of one slice (the weights k of one head of one block): :math:`g_i` is the gradient of sample
i's own loss, :math:`C_i = g_i^2` its contribution, :math:`I` the Fisher pooled over tasks, and

.. math:: u_i = C_i / (I + \epsilon), \qquad v_j = |g_j|, \qquad M_{ij} = \langle u_i, v_j \rangle .

The mean of :math:`M_{ij}` over all pairs of a sample of task A and a sample of task B factorises into
:math:`\langle \bar u_A, \bar v_B \rangle`, and so do its marginals: no score here ever looks at a pair.

A new score is one function from :class:`SliceStatistics` to :class:`Estimate`, listed in ``SCORES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    """

    membership: Float[Tensor, "task sample"]
    sensitivity: Float[Tensor, "sample task head"]
    push: Float[Tensor, "sample task head"]
    self_pair: Float[Tensor, "sample head"]
    absolute_norm: Float[Tensor, "sample head"]
    alignment: Float[Tensor, "sample task head"]
    squared_norm: Float[Tensor, "sample head"]

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


def interference(s: SliceStatistics) -> Estimate:
    r"""How hard B's gradients push on the weights that A's samples are sensitive to.

    .. math:: M_{AB} = \operatorname{mean}_{i \in A, j \in B}
              \sum_k \frac{C_{ik}}{I_k + \epsilon} |g_{jk}|

    without the pairs (i, i) where A is B. In units of gradient: it shrinks as training converges. At
    least 0.
    """
    sensitivity, push = s.without_self(s.sensitivity), s.without_self(s.push)
    return s.pair_estimate(s.task_mean(sensitivity), as_a=sensitivity, as_b=push)


def relative(s: SliceStatistics) -> Estimate:
    r"""Interference per unit of B's push: how much more sensitive A is than the pool where B pushes.

    .. math:: M_{AB} \Big/ \sum_k \operatorname{mean}_{j \in B} |g_{jk}|

    Dimensionless; 1 = no more than the average task. In [0, number of tasks] if the Fisher is the mean
    over the same samples; an EMA that lags can take it further.
    """
    sensitivity, push = s.without_self(s.sensitivity), s.without_self(s.push)
    norm = s.task_mean(s.absolute_norm)
    value = s.task_mean(sensitivity) / norm
    own_value = s.of_own_task(value.transpose(0, 1))  # of the pair (a, own task)
    as_b = (push - own_value * s.absolute_norm[:, None]) / s.of_own_task(norm)[:, None]
    return s.pair_estimate(value, as_a=sensitivity / norm, as_b=as_b)


def cosine(s: SliceStatistics) -> Estimate:
    r"""Cosine of the two tasks' mean gradients (gradient surgery, Yu et al. 2020, arXiv:2001.06782).

    .. math:: \langle \bar g_A, \bar g_B \rangle / (\|\bar g_A\| \|\bar g_B\|)

    In [-1, 1], negative = the tasks pull the slice in opposite directions. Noise in the mean gradients
    shrinks it towards 0. Within one task, pairs (i, i) are left out of the product but not of the norms, so
    that the result is the share of the mean gradient that is not noise: 1 = none, 0 or less = all.
    """
    squared = s.task_mean(s.alignment).diagonal(dim1=0, dim2=1).T  # |mean gradient|^2 [task, head]
    norm = squared.sqrt()
    value = s.task_mean(s.alignment) / (norm[:, None] * norm[None, :])
    own_norm, own_squared = s.of_own_task(norm)[:, None], s.of_own_task(squared)[:, None]
    own_alignment = (s.alignment * s.membership.T.unsqueeze(-1)).sum(dim=1, keepdim=True)
    influence = s.alignment / (own_norm * norm) - s.of_own_task(value) * own_alignment / own_squared

    # Within a task: (n - mean|g|^2 / |mean g|^2) / (n - 1), and its derivative in one sample.
    count = s.count[:, None]
    mean_squared_norm = s.task_mean(s.squared_norm)
    within = (count - mean_squared_norm / squared) / (count - 1)
    ratio = s.of_own_task(mean_squared_norm / squared)[:, None]
    within_influence = (2 * ratio * own_alignment - s.squared_norm[:, None]) / (
        own_squared * (s.of_own_task(count)[:, None] - 1)
    )
    value = value.clone()
    value.diagonal(dim1=0, dim2=1).copy_(within.T)
    own = s.membership.T.unsqueeze(-1).bool()
    return s.pair_estimate(
        value,
        as_a=torch.where(own, within_influence, influence),
        as_b=torch.where(own, torch.zeros_like(influence), influence),
    )


SCORES: dict[str, Callable[[SliceStatistics], Estimate]] = {
    "interference": interference,
    "relative": relative,
    "cosine": cosine,
}


def damped(
    fisher: Float[Tensor, "head weight"],
    damping: float,
    weights: Float[Tensor, "head weight"] | None = None,
) -> Float[Tensor, "head weight"]:
    r""":math:`I + \epsilon`, the damping relative to the (weighted) mean over the slice, so that units cancel."""
    if weights is None:
        return fisher + damping * fisher.mean(dim=-1, keepdim=True)
    mean = (fisher * weights).sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True)
    return fisher + damping * mean


def slice_statistics(
    chunks: Iterable[Float[Tensor, "chunk head weight"]],
    task_indices: Int[Tensor, sample],
    num_tasks: int,
    fisher: Float[Tensor, "head weight"],
    damping: float,
    weights: Float[Tensor, "head weight"] | None = None,
) -> SliceStatistics:
    """Reduce per-sample gradients to sums over weights, in time and memory linear in the samples.

    Args:
        chunks: Gradients of the samples in order, read twice (a list, or an object whose ``__iter__``
            makes them anew), so that not all of them need be in memory.
        task_indices: Task of each sample, counted from 0; -1 leaves a sample out.
        num_tasks: Number of tasks.
        fisher: Fisher pooled over tasks.
        damping: Added to the Fisher, relative to its mean over the slice.
        weights: How many weights of the slice each one stands for, where only some were kept.

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
    parts: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        square, absolute = chunk.square(), chunk.abs()
        results = {
            "sensitivity": _inner(square, sensitive_to),
            "push": _inner(absolute, pushed_by),
            "self_pair": _inner(square * absolute, inverse[None]).squeeze(1),
            "absolute_norm": _inner(absolute, each[None]).squeeze(1),
            "alignment": _inner(chunk, mean_gradient * each),
            "squared_norm": _inner(square, each[None]).squeeze(1),
        }
        for name, result in results.items():
            parts.setdefault(name, []).append(result)
    kept = task_indices >= 0
    return SliceStatistics(
        membership=membership[:, kept].double(),
        **{name: torch.cat(results).double()[kept] for name, results in parts.items()},
    )


def sampled_estimate(
    function: Callable[[SliceStatistics], Estimate], statistics: SliceStatistics, num_replicates: int
) -> Estimate:
    r"""A score from independent samples of the weights, their spread added to its variance.

    Every replicate estimates each sum over weights without bias, and so does their mean. The sampling variance of the score
    comes from leaving one of the R replicates out (Quenouille 1949, Tukey 1958):

    .. math:: s^2 = \frac{R - 1}{R} \sum_{r=1}^{R} (\theta_{-r} - \bar\theta)^2

    Args:
        function: The score.
        statistics: Statistics in which the replicates of a head stand side by side as if they were heads.
        num_replicates: R.

    Returns:
        The score of every head.
    """
    whole = torch.arange(num_replicates)
    estimate = function(_over_replicates(statistics, whole, num_replicates))
    if num_replicates == 1:  # every weight was kept
        return estimate
    left_out = [
        function(_over_replicates(statistics, whole[whole != replicate], num_replicates))
        for replicate in range(num_replicates)
    ]
    values = torch.stack([one.value for one in left_out])
    sampling_variance = values.var(dim=0, correction=0) * (num_replicates - 1)
    # The variance over samples contains each sample's own share of the sampling error, which falls as 1 / R.
    variances = torch.stack([one.variance for one in left_out]).mean(dim=0)
    variance = (num_replicates * estimate.variance - (num_replicates - 1) * variances).clamp(min=0)
    return Estimate(estimate.value, variance + sampling_variance)


def _over_replicates(
    statistics: SliceStatistics, replicates: Int[Tensor, replicate], num_replicates: int
) -> SliceStatistics:
    """Mean of the statistics over some replicates."""
    sums = {name: value for name, value in vars(statistics).items() if name != "membership"}
    means = {
        name: value.unflatten(-1, (-1, num_replicates))[..., replicates].mean(dim=-1)
        for name, value in sums.items()
    }
    return SliceStatistics(membership=statistics.membership, **means)


def _inner(samples: Tensor, vectors: Tensor) -> Tensor:
    """[sample, head, weight] and [task, head, weight] to [sample, task, head]."""
    return torch.einsum("nhk,thk->nth", samples, vectors)


def sample_pairs(
    gradients_a: Float[Tensor, "sample_a weight"],
    gradients_b: Float[Tensor, "sample_b weight"],
    fisher: Float[Tensor, weight],
    damping: float = 1e-3,
) -> Float[Tensor, "sample_a sample_b"]:
    r""":math:`M_{ij}` of every pair of samples in one slice: one matrix product."""
    sensitivity = gradients_a.square() / damped(fisher[None], damping)
    return sensitivity @ gradients_b.abs().T


def head_interference(
    gradients: Float[Tensor, "sample head weight"],
    tasks: Sequence[str],
    fisher: Float[Tensor, "head weight"],
    damping: float = 1e-3,
) -> dict[tuple[str, str], dict[str, Float[Tensor, head]]]:
    """All scores of one projection's heads, for every ordered pair of tasks.

    The functional twin of :class:`~qkov_lightning.HeadInterference`.

    Args:
        gradients: Gradient of each sample's own loss, per head.
        tasks: Task of each sample.
        fisher: Fisher pooled over tasks, as from :meth:`EmpiricalFisher.pooled`.
        damping: Added to the Fisher, relative to its mean over the head.

    Returns:
        For each (task_a, task_b): the scores by name, and beside each ``<score>_standard_error``. NaN
        where a task has fewer than two samples.

    Raises:
        ValueError: If there is not one task per sample, or the damping is not positive.

    Example:
        >>> gradients = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]], [[1.0, 2.0]]])
        >>> fisher = gradients.square().mean(dim=0)
        >>> scores = head_interference(gradients, ["math", "math", "code", "code"], fisher)
        >>> scores["math", "code"]["relative"]  # code pushes mostly where math is not sensitive
        tensor([0.3633], dtype=torch.float64)
    """
    check_inputs(gradients, tasks, damping)
    names = sorted(set(tasks))
    indices = torch.tensor([names.index(task) for task in tasks], device=gradients.device)
    statistics = slice_statistics([gradients], indices, len(names), fisher, damping)
    result: dict[tuple[str, str], dict[str, Tensor]] = {(a, b): {} for a in names for b in names}
    for score, function in SCORES.items():
        estimate = function(statistics)
        for (a, b), scores in result.items():
            scores[score] = estimate.value[names.index(a), names.index(b)]
            scores[f"{score}_standard_error"] = estimate.variance[names.index(a), names.index(b)].sqrt()
    return result


def check_inputs(gradients: Tensor, tasks: Sequence[str], damping: float) -> None:
    """Refuse what would give a silent NaN.

    Raises:
        ValueError: If there is not one task per sample, or the damping is not positive.
    """
    if len(tasks) != gradients.shape[0]:
        raise ValueError(
            f"{len(tasks)} tasks for gradients of {gradients.shape[0]} samples, expected one per sample."
        )
    if not damping > 0:
        raise ValueError(
            f"damping is {damping}, expected a positive number: a weight with zero Fisher divides by it."
        )
