r"""The scores, as pure functions of one slice's per-sample gradients.

Notation of one slice (the weights k of one head of one block): :math:`g_i` is the gradient of sample
i's own loss, :math:`C_i = g_i^2` its contribution, :math:`I` the Fisher pooled over tasks, and

.. math:: u_i = C_i / (I + \epsilon), \qquad v_j = |g_j|, \qquad M_{ij} = \langle u_i, v_j \rangle .

Some scores use the update :math:`-u_B` that an optimiser would take along the mean gradient of task B
(:func:`~qkov_lightning.scores.updates.update_rate`), and what it does to the losses of A's samples,
:math:`\langle g_i, u_B \rangle`.

The mean of :math:`M_{ij}` over all pairs of a sample of task A and a sample of task B factorises into
:math:`\langle \bar u_A, \bar v_B \rangle`, and so do its marginals: no score here ever looks at a pair.

A new score is one function from :class:`~qkov_lightning.scores.statistics.SliceStatistics` to
:class:`~qkov_lightning.scores.statistics.Estimate`, and one entry of ``SCORES``, which says all that figures,
tables and the gate need to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.scores.reduction import slice_statistics
from qkov_lightning.scores.statistics import Estimate, SliceStatistics
from qkov_lightning.scores.updates import STEP_SIZE, UpdateDirection, damped


def interference(s: SliceStatistics) -> Estimate:
    r"""How hard B's gradients push on the weights that A's samples are sensitive to.

    .. math:: M_{AB} = \operatorname{mean}_{i \in A, j \in B}
              \sum_k \frac{C_{ik}}{I_k + \epsilon} |g_{jk}|

    without the pairs (i, i) where A is B. In units of gradient: it shrinks as training converges. At
    least 0.
    """
    sensitivity, push = s.without_self(s.sensitivity), s.without_self(s.push)
    value = s.task_mean(sensitivity)
    if s.left_out is not None:
        return s.left_out_estimate(value, s.left_out)
    return s.pair_estimate(value, as_a=sensitivity, as_b=push)


def relative(s: SliceStatistics) -> Estimate:
    r"""Interference per unit of B's push: how much more sensitive A is than the pool where B pushes.

    .. math:: M_{AB} \Big/ \sum_k \operatorname{mean}_{j \in B} |g_{jk}|

    Dimensionless; 1 = no more than the average task. In [0, number of tasks] if the Fisher is the mean
    over the same samples; an EMA that lags can take it further.
    """
    sensitivity, push = s.without_self(s.sensitivity), s.without_self(s.push)
    norm = s.task_mean(s.absolute_norm)
    value = s.task_mean(sensitivity) / norm
    if s.left_out is not None:
        count, own = s.count[:, None], s.membership.T[:, :, None]
        norm_left = (count * norm - own * s.absolute_norm[:, None]) / (count - own)
        return s.left_out_estimate(value, s.left_out / norm_left[:, None])
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
    counts in units of what moves the model's outputs, so that a few weights with large gradients do not
    decide alone. In [-1, 1], negative = conflict; the rest as for :func:`cosine`.
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

    with the full, not the diagonal, empirical Fisher :math:`F_A` of the slice, and :math:`d_B` the update
    direction (:func:`~qkov_lightning.scores.updates.update_rate`). To second order the step :math:`-\eta d_B`
    changes A's predictive distribution by a Kullback-Leibler divergence of :math:`\eta^2/2` times as much
    (Amari 1998; with the observed targets instead of drawn ones, Kunstner et al. 2019, arXiv:1905.12558);
    elastic weight consolidation takes the diagonal of it (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3).
    At least 0. Within one task the direction is that of the other samples.
    """
    squares = s.response.square()
    return s.pair_estimate(s.task_mean(squares), as_a=squares, as_b=s.curvature_influence)


def loss_rise(s: SliceStatistics) -> Estimate:
    r"""Rise of A's loss that a step along B's update in this cell alone predicts.

    .. math:: -\eta \langle \bar g_A, d_B \rangle + \frac{\eta^2}{2} d_B^\top F_A d_B

    the Taylor expansion of A's mean loss at the step :math:`-\eta d_B` to second order, the Hessian replaced
    by the empirical Fisher as in :func:`forgetting`. In units of loss; positive = A forgets, negative = A
    gains. Within one task the direction is that of the other samples.
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
    fisher_shares: Float[Tensor, sample] | None = None,
    groups: Int[Tensor, sample] | None = None,
) -> dict[tuple[str, str], dict[str, Float[Tensor, head]]]:
    """All scores of one projection's heads, for every ordered pair of tasks.

    The functional twin of :class:`~qkov_lightning.HeadInterference`.

    Args:
        gradients: Gradient of each sample's own loss, per head.
        tasks: Task of each sample.
        fisher: Fisher pooled over tasks, as from :meth:`EmpiricalFisher.pooled`.
        damping: Added to the Fisher, relative to its mean over the head.
        update: Direction in which a task updates the weights, see
            :func:`~qkov_lightning.scores.updates.update_rate`.
        step_size: Length of the step along it: the learning rate times the number of steps.
        fisher_shares: Share of each sample's square in the Fisher, as from :meth:`EmpiricalFisher.shares`,
            which standard errors then allow for; the Fisher is taken as known without them.
        groups: Group of each sample, counted from 0, if samples of one group are not independent.

    Returns:
        For each (task_a, task_b): the scores by name, and for each one ``<score>_standard_error``. NaN
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
    statistics = slice_statistics(
        [gradients],
        indices,
        len(names),
        fisher,
        damping,
        update,
        step_size,
        fisher_shares=fisher_shares,
        groups=groups,
    )
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
