r"""Interference without each sample, with the Fisher of the rest: exact, in time linear in the samples.

The sample also leaves the Fisher, :math:`I_{-i} = I - s_i (C_i - \bar C_t)`, where it has a share. A sample
that dominates its task moves numerator and denominator together, which no derivative describes: a standard
error from derivatives would be several times too small or too large.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.scores.spans import SamplesByTask, inner


def interference_left_out(
    samples: SamplesByTask,
    gradient_square: Float[Tensor, "task head weight"],
    gradient_absolute: Float[Tensor, "task head weight"],
    slice_square: Float[Tensor, "sample head"],
    fisher: Float[Tensor, "head weight"],
    shares: Float[Tensor, sample],
    each: Float[Tensor, "head weight"],
    damping: float,
) -> Float[Tensor, "sample task_a task_b head"]:
    r"""The mean of :math:`M_{ij}` over the pairs of two tasks, with each sample left out in turn.

    Args:
        samples: Gradients of all samples.
        gradient_square: Sum of the squares over the samples of each task.
        gradient_absolute: The same of the magnitudes.
        slice_square: Mean of each sample's squares over the weights of the slice.
        fisher: Fisher pooled over tasks.
        shares: Share of each sample's square in it.
        each: How many weights of the slice each one stands for.
        damping: Added to the Fisher, relative to its mean over the slice.

    Returns:
        Means without each sample. Within a task of two samples no pair is left: NaN.
    """
    num_tasks, num_heads = len(samples.membership), len(each)
    member = samples.membership.T.bool()
    own_square = torch.tensordot(samples.membership.T, samples.membership @ slice_square, dims=1)
    own_square = own_square / torch.tensordot(samples.membership.T, samples.count, dims=1)[:, None]
    mean_fisher = (fisher * each).sum(dim=-1) / each.sum(dim=-1)
    # What is left of the other samples' shares grows, as the mean over a task of n - 1 samples does.
    lost = (shares / (1 - num_tasks * shares).clamp(min=0.5))[:, None]
    mean_left = (mean_fisher - lost * (slice_square - own_square)).clamp(min=0)
    epsilon = damping * torch.where(mean_left > 0, mean_left, mean_fisher)

    # Inner products, of what the sample does to the inverse Fisher and of the sample itself.
    changed = samples.zeros(num_tasks, num_tasks, num_heads)
    cubes_changed, sensitive, pushed = (samples.zeros(num_tasks, num_heads) for _ in range(3))
    itself = samples.zeros(num_heads)
    whole = changed.new_zeros(num_tasks, num_tasks, num_heads)
    own_whole = changed.new_zeros(num_tasks, num_heads)
    inverse = each / (fisher + (damping * mean_fisher)[:, None])
    for at, _, square, absolute in samples:
        heads = at[1]
        left, cubes = torch.empty_like(square), torch.zeros_like(gradient_square[at])
        for task, rows in samples.groups:
            mean = gradient_square[task][at] / samples.count[task].to(square)
            left[rows] = fisher[at] - lost[rows, :, None].to(square) * (square[rows] - mean)
            cubes[task] = (square[rows] * absolute[rows]).sum(dim=0)
        left = left.clamp_(min=0).add_(epsilon[:, heads, None].to(square)).reciprocal_().mul_(each[at])
        change = left - inverse[at]
        for a in range(num_tasks):
            products = gradient_square[a][at] * gradient_absolute[at]
            changed[:, a, :, heads] += inner(change, products)
            whole[a, :, heads] += (products * inverse[at]).sum(dim=-1)
        cubes_changed[..., heads] += inner(change, cubes)
        own_whole[:, heads] += (cubes * inverse[at]).sum(dim=-1)
        sensitive[..., heads] += inner(square * left, gradient_absolute[at])
        weighted = left.mul_(absolute)
        pushed[..., heads] += inner(weighted, gradient_square[at])
        itself[:, heads] += inner(weighted.mul_(square), torch.ones_like(each[at])[None])[:, 0]

    total = whole + changed
    total -= member[:, :, None, None] * sensitive[:, None]
    total -= member[:, None, :, None] * pushed[:, :, None]
    # Pairs of a sample with itself are none, neither here nor in the score.
    total.diagonal(dim1=1, dim2=2).sub_(
        (own_whole + cubes_changed - 2 * member[:, :, None] * itself[:, None]).transpose(1, 2)
    )
    left_of = samples.count - member.to(total)
    num_pairs = left_of[:, :, None] * (left_of[:, None] - torch.eye(num_tasks).to(total))
    return total / torch.where(num_pairs > 0, num_pairs, torch.nan).unsqueeze(-1)
