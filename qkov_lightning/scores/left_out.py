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
from qkov_lightning.scores.sums import Reference

Wholes = tuple[Float[Tensor, "task_a task_b head"], Float[Tensor, "task head"]]
"""Sums over pairs of samples, and over pairs of a sample with itself."""


def whole_sums(reference: Reference) -> Wholes:
    """The sums over all pairs, from which samples are left out: the same for all of these.

    Raises:
        ValueError: If the sums have no cubes.
    """
    sums = reference.sums
    if sums.cube is None:
        raise ValueError("The sums have no cubes, which pairs of a sample with itself are made of.")
    pairs = [
        [
            torch.stack([
                (a[head] * b[head] * one).double().sum() for head, one in enumerate(reference.inverse)
            ])
            for b in sums.absolute
        ]
        for a in sums.square
    ]
    itself = [(cube * reference.inverse).double().sum(dim=-1) for cube in sums.cube]
    return torch.stack([torch.stack(row) for row in pairs]), torch.stack(itself)


def interference_left_out(
    samples: SamplesByTask,
    reference: Reference,
    slice_square: Float[Tensor, "sample head"],
    shares: Float[Tensor, sample],
    wholes: Wholes,
) -> Float[Tensor, "sample task_a task_b head"]:
    r"""The mean of :math:`M_{ij}` over the pairs of two tasks, with each sample left out in turn.

    Args:
        samples: All samples, or some.
        reference: Made of all samples, with cubes.
        slice_square: Mean of each sample's squares over the weights of the slice.
        shares: Share of each sample's square in the Fisher.
        wholes: Sums over all pairs.

    Returns:
        Means without each sample. Within a task of two samples no pair is left: NaN.

    Raises:
        ValueError: If the sums have no cubes.
    """
    sums, fisher, damping = reference.sums, reference.fisher, reference.damping
    each, count = sums.each, sums.task_count
    if sums.cube is None:
        raise ValueError("The sums have no cubes, which pairs of a sample with itself are made of.")
    num_tasks, num_heads = len(samples.membership), len(each)
    member = samples.membership.T.bool()
    own_square = torch.tensordot(samples.membership.T, reference.own_square, dims=1)
    mean_fisher = (fisher * each).sum(dim=-1) / each.sum(dim=-1)
    # What is left of the other samples' shares grows, as the mean over a task of n - 1 samples does.
    lost = (shares / (1 - num_tasks * shares).clamp(min=0.5))[:, None]
    mean_left = (mean_fisher - lost * (slice_square - own_square)).clamp(min=0)
    epsilon = damping * torch.where(mean_left > 0, mean_left, mean_fisher)

    # Inner products, of what the sample does to the inverse Fisher and of the sample itself.
    changed = samples.zeros(num_tasks, num_tasks, num_heads)
    cubes_changed, sensitive, pushed = (samples.zeros(num_tasks, num_heads) for _ in range(3))
    itself = samples.zeros(num_heads)
    for at, _, square, absolute in samples:
        heads = at[1]
        left = torch.empty_like(square)
        for task, rows in samples.groups:
            mean = sums.square[task][at] / count[task].to(square)
            torch.sub(mean, square[rows], out=left[rows]).mul_(lost[rows, :, None].to(square)).add_(
                fisher[at]
            )
        left = left.clamp_(min=0).add_(epsilon[:, heads, None].to(square)).reciprocal_().mul_(each[at])
        change = left - reference.inverse[at]
        for a in range(num_tasks):
            changed[:, a, :, heads] += inner(change, sums.square[a][at] * sums.absolute[at])
        cubes_changed[..., heads] += inner(change, sums.cube[at])
        sensitive[..., heads] += inner(square * left, sums.absolute[at])
        weighted = left.mul_(absolute)
        pushed[..., heads] += inner(weighted, sums.square[at])
        itself[:, heads] += inner(weighted.mul_(square), torch.ones_like(each[at])[None])[:, 0]

    whole, own_whole = wholes
    total = whole + changed
    total -= member[:, :, None, None] * sensitive[:, None]
    total -= member[:, None, :, None] * pushed[:, :, None]
    # Pairs of a sample with itself are none, neither here nor in the score.
    total.diagonal(dim1=1, dim2=2).sub_(
        (own_whole + cubes_changed - 2 * member[:, :, None] * itself[:, None]).transpose(1, 2)
    )
    left_of = count - member.to(total)
    num_pairs = left_of[:, :, None] * (left_of[:, None] - torch.eye(num_tasks).to(total))
    return total / torch.where(num_pairs > 0, num_pairs, torch.nan).unsqueeze(-1)
