"""Tests over samples: is interference between tasks more than within them, and how sure is a score?

Both work on the interference :math:`M_{ij}` of all pairs of samples in some cells (``sample_pairs``). A
labelling or a resample of the samples weights the pairs, so that all of them over all cells are one matrix
product.

Example:
    >>> from qkov_lightning import bootstrap_standard_error, permutation_test, sample_pairs
    >>> gradients = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(0))  # [sample, head, weight]
    >>> is_math = torch.arange(40) < 20
    >>> gradients[is_math, 1, :8] *= 0.1  # in head 1, math trains one half of the weights ...
    >>> gradients[~is_math, 1, 8:] *= 0.1  # ... and code the other
    >>> fisher = gradients.square().mean(dim=0)
    >>> pairs = torch.stack([sample_pairs(gradients[:, h], gradients[:, h], fisher[h]) for h in range(2)])
    >>> bool(permutation_test(-pairs, is_math).adjusted_p_value[1] < 0.01)  # less across the tasks than within
    True
    >>> bootstrap_standard_error(pairs, is_math).shape  # of the mean of math x code, in each cell
    torch.Size([2])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

DRAWS_AT_ONCE = 256
"""Draws whose weights of all pairs are in memory together: 20 MB at 200 samples."""


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """Whether interference between two tasks exceeds that within them.

    Attributes:
        difference: Mean over pairs of different tasks less the mean over pairs of one task.
        p_value: Share of labellings with a difference at least as large.
        adjusted_p_value: The same, adjusted for the number of cells (Benjamini & Hochberg 1995).
    """

    difference: Float[Tensor, cell]
    p_value: Float[Tensor, cell]
    adjusted_p_value: Float[Tensor, cell]


def permutation_test(
    pairs: Float[Tensor, "cell sample sample"],
    is_a: Bool[Tensor, sample],
    *,
    num_permutations: int = 1000,
    seed: int = 0,
) -> PermutationTest:
    r"""Compare cross-task with within-task interference under permuted TASK LABELS of the pooled samples.

    The difference of the means of :math:`M_{ij}` over the pairs with i in A and j in B, and over the pairs
    (i, j), i unlike j, within A or within B, each task with the same weight. Where the tasks interfere with
    each other no more than with themselves, labels are exchangeable, and the p-value is exact (Phipson &
    Smyth 2010).

    Args:
        pairs: :math:`M_{ij}` of all samples of both tasks, in some cells.
        is_a: Which samples are of task A; the others are of task B.
        num_permutations: Labellings that are drawn, beside the true one.
        seed: Of the labellings.

    Returns:
        Test of every cell.

    Raises:
        ValueError: If a task has fewer than two samples, or a value is not finite.
    """
    _check(pairs, is_a)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(num_permutations, len(is_a), generator=generator).argsort(dim=1)
    labels = torch.cat([is_a[None], is_a[draws]]).to(pairs)
    differences = _differences(pairs, labels)
    observed = differences[:1]
    # Labellings that tie with the observed one up to rounding count as at least as large.
    margin = torch.finfo(pairs.dtype).eps ** 0.5 * differences.abs().amax(dim=0)
    p_value = (differences >= observed - margin).double().mean(dim=0)
    adjusted = torch.from_numpy(stats.false_discovery_control(p_value.numpy()))
    return PermutationTest(observed.squeeze(0), p_value, adjusted)


def bootstrap_standard_error(
    pairs: Float[Tensor, "cell sample sample"],
    is_a: Bool[Tensor, sample],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Float[Tensor, cell]:
    """Standard error of the mean interference of A x B, from resampling the samples of each task (Efron 1979).

    Args:
        pairs: Interference of all samples of both tasks, in some cells.
        is_a: Which samples are of task A; the others are of task B.
        num_resamples: Resamples that are drawn.
        seed: Of the resamples.

    Returns:
        Standard error of every cell, the Fisher taken as known.

    Raises:
        ValueError: If a task has fewer than two samples, or a value is not finite.
    """
    _check(pairs, is_a)
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for count in (int(is_a.sum()), int((~is_a).sum())):
        drawn = torch.randint(count, (num_resamples, count), generator=generator)
        ones = torch.ones_like(drawn, dtype=pairs.dtype)
        weights.append(torch.zeros_like(ones).scatter_add_(1, drawn, ones) / count)
    a, b = is_a.nonzero().flatten(), (~is_a).nonzero().flatten()
    first, second = torch.cartesian_prod(torch.arange(len(a)), torch.arange(len(b))).T
    means = _weighted_sums(weights[0], weights[1], first, second, pairs[:, a[first], b[second]])
    return means.std(dim=0)


def _differences(
    pairs: Float[Tensor, "cell sample sample"], in_a: Float[Tensor, "labelling sample"]
) -> Float[Tensor, "labelling cell"]:
    """Across less within of every labelling, from two sums each: over all pairs of A, and over the rows of A."""
    num_samples = pairs.shape[1]
    first, second = torch.triu_indices(num_samples, num_samples, offset=1)
    both = pairs[:, first, second] + pairs[:, second, first]  # both directions of a pair
    both -= both.mean(dim=1, keepdim=True)  # shifts all means alike, and leaves less to cancel
    total = both.sum(dim=1)
    rows = both.new_zeros(len(both), num_samples).index_add_(1, first, both).index_add_(1, second, both)
    within_a = _weighted_sums(in_a, in_a, first, second, both)
    across = in_a @ rows.T - 2 * within_a
    within_b = total - within_a - across
    count_a = int(in_a[0].sum())
    count_b = num_samples - count_a
    within = within_a / (count_a * (count_a - 1)) + within_b / (count_b * (count_b - 1))
    return across / (2 * count_a * count_b) - within / 2


def _weighted_sums(
    left: Float[Tensor, "draw left"],
    right: Float[Tensor, "draw right"],
    first: Int[Tensor, pair],
    second: Int[Tensor, pair],
    values: Float[Tensor, "cell pair"],
) -> Float[Tensor, "draw cell"]:
    """Sum over pairs of the pair's value times the weights of its two samples, for every draw."""
    chunks = zip(left.split(DRAWS_AT_ONCE), right.split(DRAWS_AT_ONCE), strict=True)
    return torch.cat([(one[:, first] * other[:, second]) @ values.T for one, other in chunks])


def _check(pairs: Tensor, is_a: Tensor) -> None:
    counts = int(is_a.sum()), int((~is_a).sum())
    if min(counts) < 2 or pairs.shape[1] != len(is_a):
        raise ValueError(
            f"{counts[0]} samples of task A and {counts[1]} of task B for pairs of {pairs.shape[1]} samples, expected one "
            "label per sample and at least two samples of each task."
        )
    if not bool(pairs.isfinite().all()):
        raise ValueError("The interference of a pair is not finite: leave out cells without data.")
