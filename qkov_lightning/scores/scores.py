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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.scores.statistics import Estimate, SliceStatistics


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
    r"""Curvature of A's loss along B's update: how strongly a step moves A, in either direction.

    .. math:: \operatorname{mean}_{i \in A} T_i \langle g_i, d_B \rangle^2 \approx d_B^\top F_A d_B

    with the full, not the diagonal, Fisher :math:`F_A` of the slice, and :math:`d_B` the update direction
    (:func:`~qkov_lightning.scores.updates.update_rate`). To second order the step :math:`-\eta d_B` changes
    A's predictive distribution by a Kullback-Leibler divergence of :math:`\eta^2/2` times as much (Amari
    1998; with the observed targets instead of drawn ones, Kunstner et al. 2019, arXiv:1905.12558); elastic
    weight consolidation takes the diagonal of it (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3).

    **The number of terms.** Where a sample's loss is the mean over T targets, :math:`g_i = \frac{1}{T} \sum_t
    g_{it}`. The gradient of each target's log-likelihood has mean zero given the targets before it, if these
    are drawn from the model, so that products of different targets vanish in expectation:

    .. math:: \operatorname{E} \langle g_i, d \rangle^2
              = \frac{1}{T^2} \sum_t \operatorname{E} \langle g_{it}, d \rangle^2
              = \frac{1}{T} \Big( \frac{1}{T} \sum_t d^\top F_{it} d \Big)

    The bracket is the Fisher of the mean loss, which is its generalised Gauss-Newton matrix (Martens 2020,
    arXiv:1412.1193, section 9): T times the mean square. Of a loss that is a sum, or has one target a sample,
    the factor is 1 (:class:`~qkov_lightning.capture.reductions.Joining`). For a squared error it is 2
    :math:`\sigma^2` times the Gauss-Newton matrix, with the variance :math:`\sigma^2` of the residuals.

    **The noise of the direction.** A square of the estimated :math:`d_B` would also count its noise, about
    :math:`1/n_B` of the mean square, however small the true direction. Instead, :math:`\langle g_i, d_B^{(1)}
    \rangle \langle g_i, d_B^{(2)} \rangle` with the directions of two halves of B's samples, whose groups are
    dealt out in turn: without bias up to the noise of the rates, which both share. So an estimate may be
    below 0: the samples then show no curvature. Within one task the direction is that of the other samples.
    Fewer than two samples a half (but for the sample itself) leave the square as it is.
    """
    return s.pair_estimate(s.task_mean(s.curvature), as_a=s.curvature, as_b=s.curvature_influence)


def loss_rise(s: SliceStatistics) -> Estimate:
    r"""Rise of A's loss that a step along B's update in this cell alone predicts.

    .. math:: -\eta \langle \bar g_A, d_B \rangle + \frac{\eta^2}{2} d_B^\top F_A d_B

    the Taylor expansion of A's mean loss at the step :math:`-\eta d_B` to second order, the Hessian replaced
    by the Fisher as in :func:`forgetting`. In units of loss; positive = A forgets, negative = A gains. Within
    one task the direction is that of the other samples.
    """
    rise, as_b = _rise(s)
    return s.pair_estimate(s.task_mean(rise), as_a=rise, as_b=as_b)


def exchange(s: SliceStatistics) -> Estimate:
    r"""Harm to A per benefit to B: A's predicted rise for each unit by which B's loss is to fall.

    .. math:: \Delta_{AB} \big/ \eta \langle \bar g_B, d_B \rangle

    with :math:`\Delta_{AB}` the :func:`loss_rise`, and below it what B gains to first order, on the samples
    that set the direction. Above 1, the step in this cell costs A more than it gives B. Within one task -1
    where the gain holds on other samples, and nearer to 0 or above it where it does not; the standard error
    is too small there, since the two move together.
    """
    rise, influence = _rise(s)
    gain = s.step_size * s.task_mean(s.own_slope)
    value = s.task_mean(rise) / gain
    own = (s.membership.T[..., None] * s.slope_influence).sum(dim=1)
    gain_influence = s.step_size * (s.own_slope + own)[:, None]
    as_b = (influence - s.of_own_task(value.transpose(0, 1)) * gain_influence) / s.of_own_task(gain)[:, None]
    return s.pair_estimate(value, as_a=rise / gain, as_b=as_b)


def _rise(s: SliceStatistics) -> tuple[Tensor, Tensor]:
    """Rise of each sample's loss along each task's update, and the influence of that task's samples on it."""
    step = s.step_size
    rise = -step * s.response + step**2 / 2 * s.curvature
    return rise, -step * s.slope_influence + step**2 / 2 * s.curvature_influence


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
        Score("loss_rise", loss_rise, "predicted rise of the loss, below 0 = it falls", signed=True),
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
        Score("interference", interference, "in units of gradient"),
        Score("forgetting", forgetting, "curvature of the loss along the update"),
        Score("exchange", exchange, "rise of A's loss per gain of B", signed=True),
    )
}
"""Every score; the first is the one that is shown first."""

HARM = next(iter(SCORES))
"""The score that says how much a task is hurt: the only one in units of its loss, and shown first."""
