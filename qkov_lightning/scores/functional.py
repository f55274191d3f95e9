"""The scores of one projection's gradients, without a metric, a cache or a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.scores.reduction import slice_statistics
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.updates import STEP_SIZE, UpdateDirection, damped


def sample_pairs(
    gradients_a: Float[Tensor, "sample_a weight"],
    gradients_b: Float[Tensor, "sample_b weight"],
    fisher: Float[Tensor, weight],
    damping: float = 1e-3,
) -> Float[Tensor, "sample_a sample_b"]:
    r""":math:`M_{ij}` of every pair of samples in one slice: one matrix product."""
    sensitivity = gradients_a.square() / damped(fisher[None], damping)
    return sensitivity @ gradients_b.abs().T


def pair_harm(
    gradients_a: Float[Tensor, "sample_a weight"],
    gradients_b: Float[Tensor, "sample_b weight"],
    rate: Float[Tensor, weight],
    step_size: float = STEP_SIZE,
) -> Float[Tensor, "sample_a sample_b"]:
    r"""Rise of sample i's loss when one step is taken along the gradient of sample j, in one slice.

    .. math:: H_{ij} = -\eta \, \langle g_i, \rho \, g_j \rangle

    Its mean over pairs is the slope in ``loss_rise``. Below 0, the step of j helps i.

    Args:
        gradients_a: Gradients of the samples that are hurt.
        gradients_b: Gradients of the samples that push.
        rate: What the optimiser multiplies a gradient with, as from
            :func:`~qkov_lightning.scores.updates.update_rate`.
        step_size: Length of the step.
    """
    return -step_size * (gradients_a * rate) @ gradients_b.T


def head_interference(
    gradients: Float[Tensor, "sample head weight"],
    tasks: Sequence[str],
    fisher: Float[Tensor, "head weight"],
    damping: float = 1e-3,
    update: UpdateDirection | Float[Tensor, "head weight"] = "adam",
    step_size: float = STEP_SIZE,
    fisher_shares: Float[Tensor, sample] | None = None,
    groups: Int[Tensor, sample] | None = None,
    num_terms: Float[Tensor, sample] | None = None,
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
        num_terms: Terms (target tokens) that the loss of each sample is the mean of; 1 without them, as for a
            sum.

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
        num_terms=num_terms,
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
