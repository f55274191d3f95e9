"""Tests over samples: is interference between tasks more than within them, and how sure is a score?

Example:
    >>> from qkov_lightning import permutation_test
    >>> generator = torch.Generator().manual_seed(0)
    >>> gradients = torch.randn(40, 2, 16, generator=generator)  # [sample, head, weight]
    >>> is_math = torch.arange(40) < 20
    >>> gradients[is_math, 1, :8] *= 0.1  # in head 1, math trains one half of the weights ...
    >>> gradients[~is_math, 1, 8:] *= 0.1  # ... and code the other
    >>> test = permutation_test(gradients, is_math)
    >>> bool(test.adjusted_p_value[1] < 0.01)
    True
    >>> bool(test.difference[1] < 0)  # less across the tasks than within
    True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from qkov_lightning.scores.updates import damped

MAX_ELEMENTS = 2**22
"""Numbers that are in memory together for each sum of the labellings: 32 MB."""


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """Whether interference between two tasks differs from that within them.

    Attributes:
        difference: Mean over pairs of different tasks less the mean over pairs of one task.
        p_value: Share of labellings with a difference at least as far from zero.
        adjusted_p_value: The same, adjusted for the number of cells (Benjamini & Hochberg 1995).
    """

    difference: Float[Tensor, cell]
    p_value: Float[Tensor, cell]
    adjusted_p_value: Float[Tensor, cell]


def permutation_test(
    gradients: Float[Tensor, "sample cell weight"],
    is_a: Bool[Tensor, sample],
    *,
    damping: float = 1e-3,
    num_permutations: int = 1000,
    seed: int = 0,
) -> PermutationTest:
    r"""Compare cross-task with within-task interference under permuted TASK LABELS of the pooled samples.

    The difference is that of the mean of :math:`M_{ij}` over the pairs of different tasks, in both
    directions, and the mean over the pairs within A and within B, i unlike j, each task with the same weight.
    The gradient of each sample is divided by its norm in the cell first, so that tasks with larger losses do
    not differ by that alone. The Fisher is the mean of the two tasks' means, made anew for every labelling.
    So nothing but the labels differs between labellings: where they do not matter, the p-value is exact
    (Phipson & Smyth 2010).

    Args:
        gradients: Gradient of each sample's own loss in some cells.
        is_a: Which samples are of task A; the others are of task B.
        damping: Added to the Fisher, relative to its mean over the cell.
        num_permutations: Labellings that are drawn, in addition to the true one.
        seed: Of the labellings.

    Returns:
        Test of every cell, two-sided.

    Raises:
        ValueError: If a task has fewer than two samples, or a gradient is zero or not finite.
    """
    _check(gradients.transpose(0, 1), is_a, "gradient")
    norm = gradients.double().norm(dim=-1, keepdim=True)
    if not bool((norm > 0).all()):
        raise ValueError("A gradient is zero in a whole cell: leave out that sample or cell.")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(num_permutations, len(is_a), generator=generator).argsort(dim=1)
    labels = torch.cat([is_a[None], is_a[draws]]).double().to(gradients.device)
    unit = (gradients.double() / norm).unbind(dim=1)
    differences = torch.stack([_differences(one, labels, damping) for one in unit], dim=1).cpu()
    observed = differences[:1]
    # Labellings that tie with the observed one up to rounding count as at least as large.
    margin = 1e-9 * differences.abs().amax(dim=0)
    p_value = (differences.abs() >= observed.abs() - margin).double().mean(dim=0)
    adjusted = torch.from_numpy(stats.false_discovery_control(p_value.numpy()))
    return PermutationTest(observed.squeeze(0), p_value, adjusted)


def bootstrap_standard_error(
    pairs: Float[Tensor, "cell sample sample"],
    is_a: Bool[Tensor, sample],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Float[Tensor, cell]:
    """Standard error of the mean interference of A x B, from resampled samples of each task (Efron 1979).

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
    _check(pairs, is_a, "pair")
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for count in (int(is_a.sum()), int((~is_a).sum())):
        drawn = torch.randint(count, (num_resamples, count), generator=generator)
        ones = torch.ones_like(drawn, dtype=pairs.dtype)
        weights.append(torch.zeros_like(ones).scatter_add_(1, drawn, ones) / count)
    values = pairs[:, is_a][:, :, ~is_a]
    return torch.einsum("da,cab,db->dc", weights[0], values, weights[1]).std(dim=0)


def _differences(
    gradients: Float[Tensor, "sample weight"], labels: Float[Tensor, "labelling sample"], damping: float
) -> Float[Tensor, labelling]:
    """Across less within, of every labelling: three sums over its samples of A, and three over the others."""
    square, absolute = gradients.square(), gradients.abs()
    parts = (square, absolute, square * absolute)
    count_a = float(labels[0].sum())
    count_b = labels.shape[1] - count_a
    result = []
    for some in labels.split(max(1, MAX_ELEMENTS // gradients.shape[1])):
        square_a, absolute_a, own_a = (some @ part for part in parts)
        square_b, absolute_b, own_b = ((1 - some) @ part for part in parts)
        fisher = (square_a / count_a + square_b / count_b) / 2
        inverse = 1 / damped(fisher, damping)
        across = ((square_a * absolute_b + square_b * absolute_a) * inverse).sum(dim=1) / (
            2 * count_a * count_b
        )
        within_a = ((square_a * absolute_a - own_a) * inverse).sum(dim=1) / (count_a * (count_a - 1))
        within_b = ((square_b * absolute_b - own_b) * inverse).sum(dim=1) / (count_b * (count_b - 1))
        result.append(across - (within_a + within_b) / 2)
    return torch.cat(result)


def _check(values: Float[Tensor, "cell sample _"], is_a: Bool[Tensor, sample], what: str) -> None:
    counts = int(is_a.sum()), int((~is_a).sum())
    if min(counts) < 2 or values.shape[1] != len(is_a):
        raise ValueError(
            f"{counts[0]} samples of task A and {counts[1]} of task B for the {what}s of {values.shape[1]} samples, expected "
            "one label per sample and at least two samples of each task."
        )
    if not bool(values.isfinite().all()):
        raise ValueError(f"A {what} is not finite: leave out cells without data.")
