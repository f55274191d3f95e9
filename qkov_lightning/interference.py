r"""The scores, as pure functions of one slice's per-sample gradients.

Notation of one slice (the weights k of one head of one block): :math:`g_i` is the gradient of sample
i's own loss, :math:`C_i = g_i^2` its contribution, :math:`I` the Fisher pooled over tasks, and

.. math:: u_i = C_i / (I + \epsilon), \qquad v_j = |g_j|, \qquad M_{ij} = \langle u_i, v_j \rangle .

Beside it stands the update :math:`-u_B` that an optimiser would take along the mean gradient of task B
(:func:`update_rate`), and what it does to the losses of A's samples, :math:`\langle g_i, u_B \rangle`.

The mean of :math:`M_{ij}` over all pairs of a sample of task A and a sample of task B factorises into
:math:`\langle \bar u_A, \bar v_B \rangle`, and so do its marginals: no score here ever looks at a pair.

A new score is one function from :class:`SliceStatistics` to :class:`Estimate`, and one entry of ``SCORES``, which says
all that figures, tables and the gate need to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

UpdateDirection = Literal["adam", "sgd"]

STEP_SIZE = 0.01
"""Length of the step whose effect is predicted: ten steps with a learning rate of 0.001."""

INFLUENCE_BYTES = 256 * 2**20
"""Memory for what standard errors need: beyond it the gradients are read again for some tasks at a time."""

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
    return _cosine(s, s.alignment, s.squared_norm)


def conflict(s: SliceStatistics) -> Estimate:
    r"""Cosine of the two tasks' mean gradients after whitening by the pooled Fisher.

    .. math:: \frac{\bar g_A^\top D \bar g_B}{\sqrt{\bar g_A^\top D \bar g_A \; \bar g_B^\top D \bar g_B}},
              \qquad D = 1 / (I + \epsilon)

    The inner product of the natural gradient (Amari 1998, eq. 2) with a diagonal Fisher: how the tasks pull
    counts in units of what moves the model's outputs, so that a few weights with large gradients do not decide
    alone. In [-1, 1], negative = conflict; the rest as for :func:`cosine`.
    """
    return _cosine(s, s.whitened_alignment, s.whitened_squared_norm)


def _cosine(
    s: SliceStatistics,
    alignment: Float[Tensor, "sample task head"],
    squared_norm: Float[Tensor, "sample head"],
) -> Estimate:
    """Cosine of the tasks' mean gradients under some inner product."""
    squared = s.task_mean(alignment).diagonal(dim1=0, dim2=1).T  # |mean gradient|^2 [task, head]
    norm = squared.sqrt()
    value = s.task_mean(alignment) / (norm[:, None] * norm[None, :])
    own_norm, own_squared = s.of_own_task(norm)[:, None], s.of_own_task(squared)[:, None]
    own_alignment = (alignment * s.membership.T.unsqueeze(-1)).sum(dim=1, keepdim=True)
    influence = alignment / (own_norm * norm) - s.of_own_task(value) * own_alignment / own_squared

    # Within a task: (n - mean|g|^2 / |mean g|^2) / (n - 1), and its derivative in one sample.
    count = s.count[:, None]
    mean_squared_norm = s.task_mean(squared_norm)
    within = (count - mean_squared_norm / squared) / (count - 1)
    ratio = s.of_own_task(mean_squared_norm / squared)[:, None]
    within_influence = (2 * ratio * own_alignment - squared_norm[:, None]) / (
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


def forgetting(s: SliceStatistics) -> Estimate:
    r"""How strongly a step along B's update moves A's samples, in either direction.

    .. math:: \operatorname{mean}_{i \in A} \langle g_i, d_B \rangle^2 = d_B^\top F_A d_B

    with the full, not the diagonal, empirical Fisher :math:`F_A` of the slice, and :math:`d_B` the update direction
    (:func:`update_rate`). To second order the step :math:`-\eta d_B` changes A's predictive distribution by a
    Kullback-Leibler divergence of :math:`\eta^2/2` times as much (Amari 1998; with the observed targets instead of
    drawn ones, Kunstner et al. 2019, arXiv:1905.12558); elastic weight consolidation takes the diagonal of it
    (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3). At least 0. Within one task the direction is that of
    the other samples.
    """
    squares = s.response.square()
    return s.pair_estimate(s.task_mean(squares), as_a=squares, as_b=s.curvature_influence)


def loss_rise(s: SliceStatistics) -> Estimate:
    r"""Rise of A's loss that a step along B's update in this cell alone predicts.

    .. math:: -\eta \langle \bar g_A, d_B \rangle + \frac{\eta^2}{2} d_B^\top F_A d_B

    the Taylor expansion of A's mean loss at the step :math:`-\eta d_B` to second order, the Hessian replaced by the
    empirical Fisher as in :func:`forgetting`. In units of loss; positive = A forgets, negative = A gains. Within
    one task the direction is that of the other samples.
    """
    rise = -s.step_size * s.response + s.step_size**2 / 2 * s.response.square()
    as_b = -s.step_size * s.slope_influence + s.step_size**2 / 2 * s.curvature_influence
    return s.pair_estimate(s.task_mean(rise), as_a=rise, as_b=as_b)


@dataclass(frozen=True)
class Score:
    """All that is known of a score: nothing downstream asks for its name.

    Attributes:
        name: Name in results, scalars and files.
        function: Computes it.
        meaning: How to read the numbers, in a few words.
        natural_range: Least and greatest value, given the number of tasks; None for a score in units.
        falling: Whether it falls when interference rises.
        symmetric: Whether it stays the same when the two tasks change places.
        signed: Whether zero lies in the middle and both signs mean something.
    """

    name: str
    function: Callable[[SliceStatistics], Estimate]
    meaning: str
    natural_range: Callable[[int], tuple[float, float]] | None = None
    falling: bool = False
    symmetric: bool = False
    signed: bool = False


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("interference", interference, "in units of gradient"),
        Score(
            "relative",
            relative,
            "1 = as sensitive as the average task",
            # No cell can be more sensitive than the number of tasks times the average.
            natural_range=lambda num_tasks: (0.0, float(max(2, num_tasks))),
        ),
        Score(
            "cosine",
            cosine,
            "-1 opposed, 1 aligned",
            natural_range=lambda _: (-1.0, 1.0),
            falling=True,
            symmetric=True,
            signed=True,
        ),
        Score(
            "conflict",
            conflict,
            "-1 opposed, 1 aligned, whitened by the Fisher",
            natural_range=lambda _: (-1.0, 1.0),
            falling=True,
            symmetric=True,
            signed=True,
        ),
        Score("forgetting", forgetting, "squared response of the loss to the update"),
        Score("loss_rise", loss_rise, "predicted rise of the loss, below 0 = it falls", signed=True),
    )
}
"""Every score; the first is the one that is shown first."""


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
        weights: As for :func:`slice_statistics`.

    Returns:
        The rates.
    """
    if isinstance(update, Tensor):
        return update.to(mean_gradient).expand_as(mean_gradient)
    if update == "sgd":
        return torch.ones_like(mean_gradient)
    return damped(mean_square, damping, weights).rsqrt()


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
        update: Direction in which a task updates the slice, see :func:`update_rate`.
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
    directions = _Directions(mean_gradient, mean_square, count, damping, update, each)
    parts: dict[str, list[Tensor]] = {}
    start = 0
    for chunk in chunks:
        tasks = task_indices[start : start + len(chunk)]
        start += len(chunk)
        square, absolute = chunk.square(), chunk.abs()
        results = {
            "sensitivity": _inner(square, sensitive_to),
            "push": _inner(absolute, pushed_by),
            "self_pair": _inner(square * absolute, inverse[None]).squeeze(1),
            "absolute_norm": _inner(absolute, each[None]).squeeze(1),
            "alignment": _inner(chunk, mean_gradient * each),
            "squared_norm": _inner(square, each[None]).squeeze(1),
            "whitened_alignment": _inner(chunk, pulled_by),
            "whitened_squared_norm": _inner(square, inverse[None]).squeeze(1),
            "response": directions.response(chunk, tasks),
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


class _Directions:
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

    def response(
        self, chunk: Float[Tensor, "sample head weight"], tasks: Int[Tensor, sample]
    ) -> Float[Tensor, "sample task head"]:
        response = _inner(chunk, self._direction * self._weights)
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
        moved = _inner(samples, vectors * (self._rate[task] * self._weights))
        if isinstance(self._update, Tensor) or self._update == "sgd":
            return moved
        # d = m (f + eps)^(-1/2), with m the mean gradient and f the mean square, in which eps is a share.
        slowed = vectors * (self._direction[task] * self._rate[task].square() * self._weights / 2)
        square = samples.square()
        share = self._damping * _slice_mean(square, self._weights)[..., 0][:, None] * slowed.sum(dim=-1)
        return moved - _inner(square, slowed) - share


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


def sampled_estimate(score: Score, statistics: SliceStatistics, num_replicates: int) -> Estimate:
    r"""A score from independent samples of the weights, their spread added to its variance.

    Every replicate estimates each sum over weights without bias, and so does their mean. The sampling variance of the
    score comes from leaving one of the R replicates out (Quenouille 1949, Tukey 1958):

    .. math:: s^2 = \frac{R - 1}{R} \sum_{r=1}^{R} (\theta_{-r} - \bar\theta)^2

    and so does the bias of a score that is no sum, :math:`(R - 1)(\bar\theta - \theta)`, which is taken off where the
    score has no natural range to leave: exact for squares of sums.

    Args:
        score: The score.
        statistics: Statistics in which the replicates of a head stand side by side as if they were heads.
        num_replicates: R.

    Returns:
        The score of every head.
    """
    if num_replicates == 1:  # every weight was kept
        return score.function(statistics)
    whole = torch.arange(num_replicates)
    estimate = score.function(_over_replicates(statistics, whole, num_replicates))
    left_out = [
        score.function(_over_replicates(statistics, whole[whole != replicate], num_replicates))
        for replicate in range(num_replicates)
    ]
    values = torch.stack([one.value for one in left_out])
    sampling_variance = values.var(dim=0, correction=0) * (num_replicates - 1)
    # The variance over samples contains each sample's own share of the sampling error, which falls as 1 / R.
    variances = torch.stack([one.variance for one in left_out]).mean(dim=0)
    variance = (num_replicates * estimate.variance - (num_replicates - 1) * variances).clamp(min=0)
    value = estimate.value
    if score.natural_range is None:
        value = num_replicates * value - (num_replicates - 1) * values.mean(dim=0)
    return Estimate(value, variance + sampling_variance)


def _over_replicates(
    statistics: SliceStatistics, replicates: Int[Tensor, replicate], num_replicates: int
) -> SliceStatistics:
    """Mean of the statistics over some replicates."""
    means = {
        name: value.unflatten(-1, (-1, num_replicates))[..., replicates].mean(dim=-1)
        for name, value in vars(statistics).items()
        if name not in {"membership", "step_size"}
    }
    return replace(statistics, **means)


def _mean_over_replicates(
    response: Float[Tensor, "sample task head"], num_replicates: int
) -> Float[Tensor, "sample task head"]:
    """The response of a whole head in the place of each of its replicates."""
    mean = response.unflatten(-1, (-1, num_replicates)).mean(dim=-1)
    return mean.repeat_interleave(num_replicates, dim=-1)


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
    update: UpdateDirection | Float[Tensor, "head weight"] = "adam",
    step_size: float = STEP_SIZE,
) -> dict[tuple[str, str], dict[str, Float[Tensor, head]]]:
    """All scores of one projection's heads, for every ordered pair of tasks.

    The functional twin of :class:`~qkov_lightning.HeadInterference`.

    Args:
        gradients: Gradient of each sample's own loss, per head.
        tasks: Task of each sample.
        fisher: Fisher pooled over tasks, as from :meth:`EmpiricalFisher.pooled`.
        damping: Added to the Fisher, relative to its mean over the head.
        update: Direction in which a task updates the weights, see :func:`update_rate`.
        step_size: Length of the step along it: the learning rate times the number of steps.

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
    statistics = slice_statistics([gradients], indices, len(names), fisher, damping, update, step_size)
    result: dict[tuple[str, str], dict[str, Tensor]] = {(a, b): {} for a in names for b in names}
    for score in SCORES.values():
        estimate = score.function(statistics)
        for (a, b), scores in result.items():
            scores[score.name] = estimate.value[names.index(a), names.index(b)]
            scores[f"{score.name}_standard_error"] = estimate.variance[names.index(a), names.index(b)].sqrt()
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
