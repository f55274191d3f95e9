"""Tests over samples: is interference between tasks more than within them, and how sure is a score?

Both work on the interference :math:`M_{ij}` of all pairs of samples in some cells (``sample_pairs``), so that a
permutation or a resample of the samples costs two small matrix products per cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor


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

    The difference of the means of :math:`M_{ij}` over the pairs with i in A and j in B, and over the pairs (i, j),
    i unlike j, within A or within B, each task with the same weight. Where the tasks interfere with each other no more
    than with themselves, labels are exchangeable, and the p-value is exact (Phipson & Smyth 2010).

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
    count_a = int(is_a.sum())
    count_b = len(is_a) - count_a
    differences = torch.stack([_difference(cell, labels, count_a, count_b) for cell in pairs])
    observed = differences[:, :1]
    # Labellings that tie with the observed one up to rounding count as at least as large.
    margin = 1e-6 * differences.abs().amax(dim=1, keepdim=True)
    p_value = (differences >= observed - margin).double().mean(dim=1)
    adjusted = torch.from_numpy(stats.false_discovery_control(p_value.numpy()))
    return PermutationTest(observed.squeeze(1), p_value, adjusted)


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
    means = [((weights[0] @ cell[is_a][:, ~is_a]) * weights[1]).sum(dim=1) for cell in pairs]
    return torch.stack(means).std(dim=1)


def _difference(
    cell: Float[Tensor, "sample sample"],
    in_a: Float[Tensor, "labelling sample"],
    count_a: int,
    count_b: int,
) -> Float[Tensor, labelling]:
    """Of every labelling, from two sums each: over all pairs of A, and over the rows and columns of A."""
    cell = (cell + cell.T) / 2  # both directions of a pair
    cell = cell - cell.diag().diag()
    row = cell.sum(dim=1)
    within_a = ((in_a @ cell) * in_a).sum(dim=1)
    from_a = in_a @ row
    across = from_a - within_a
    within_b = row.sum() - within_a - 2 * across
    within = within_a / (count_a * (count_a - 1)) + within_b / (count_b * (count_b - 1))
    return across / (count_a * count_b) - within / 2


def _check(pairs: Tensor, is_a: Tensor) -> None:
    counts = int(is_a.sum()), int((~is_a).sum())
    if min(counts) < 2 or pairs.shape[1] != len(is_a):
        raise ValueError(
            f"{counts[0]} samples of task A and {counts[1]} of task B for pairs of {pairs.shape[1]} samples, expected one "
            "label per sample and at least two samples of each task."
        )
    if not bool(pairs.isfinite().all()):
        raise ValueError("The interference of a pair is not finite: leave out cells without data.")
