"""Scores from independent samples of the weights, with the error that the sampling adds."""

from __future__ import annotations

from dataclasses import replace

import torch

from qkov_lightning.scores.scores import Score
from qkov_lightning.scores.statistics import WITHOUT_HEADS, Estimate, SliceStatistics

LEAST_SHARE = 0.5
"""Of the variance over samples that remains when the error of the weights has been taken off it."""


def num_variants(num_replicates: int) -> int:
    """The mean over all replicates, and over all but each one; a single one is all there is."""
    return 1 if num_replicates == 1 else num_replicates + 1


def sampled_estimate(score: Score, statistics: SliceStatistics, num_replicates: int) -> Estimate:
    r"""A score from independent samples of the weights, their spread added to its variance.

    Every replicate estimates each sum over weights without bias, and so does their mean. The sampling
    variance of the score comes from leaving one of the R replicates out (Quenouille 1949, Tukey 1958):

    .. math:: s^2 = \frac{R - 1}{R} \sum_{r=1}^{R} (\theta_{-r} - \bar\theta)^2

    and so does the bias of a score that is no sum, :math:`(R - 1)(\bar\theta - \theta)`, which is taken off
    where the score has no natural range to leave: exact for squares of sums.

    Args:
        score: The score.
        statistics: Of the mean over all replicates and over all but one, as from ``leave_out_replicates``.
        num_replicates: R.

    Returns:
        The score of every head.
    """
    estimate = score.function(statistics)
    if num_replicates == 1:  # every weight was kept
        return estimate
    value, *left_out = estimate.value.unflatten(-1, (-1, num_variants(num_replicates))).unbind(-1)
    variance, *variances = estimate.variance.unflatten(-1, (-1, num_variants(num_replicates))).unbind(-1)
    values = torch.stack(left_out)
    sampling_variance = values.var(dim=0, correction=0) * (num_replicates - 1)
    # The variance over samples contains each sample's own share of the sampling error, which falls as 1 / R.
    # What is taken off for it is an estimate, too: where it is large, an error could come out as zero.
    mean_variance = torch.stack(variances).mean(dim=0)
    corrected = num_replicates * variance - (num_replicates - 1) * mean_variance
    variance = torch.maximum(corrected, LEAST_SHARE * variance)
    if score.natural_range is None:
        value = num_replicates * value - (num_replicates - 1) * values.mean(dim=0)
    return Estimate(value, variance + sampling_variance)


def leave_out_replicates(statistics: SliceStatistics, num_replicates: int) -> SliceStatistics:
    """Means of the statistics over replicates.

    Over all of them, and over all but each one, side by side as if they were heads.

    Args:
        statistics: Statistics in which the replicates of a head stand side by side as if they were heads.
        num_replicates: R; of a single one there is nothing to leave out.
    """
    if num_replicates == 1:
        return statistics
    shares = torch.full(
        (num_variants(num_replicates), num_replicates), 1 / (num_replicates - 1), dtype=torch.float64
    )
    shares[0] = 1 / num_replicates
    shares[1:].fill_diagonal_(0)
    means = {
        name: (value.unflatten(-1, (-1, num_replicates)) @ shares.T.to(value)).flatten(-2)
        for name, value in vars(statistics).items()
        if name not in WITHOUT_HEADS and value is not None
    }
    return replace(statistics, **means)
