"""Inner products of samples with the sums of the tasks, over the weights of a slice."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.scores.spans import SamplesByTask, inner
from qkov_lightning.scores.sums import Reference
from qkov_lightning.scores.updates import task_samples


def inner_products(
    samples: SamplesByTask,
    reference: Reference,
    slice_square: Float[Tensor, "sample head"],
    with_influence: bool = True,
) -> dict[str, Tensor]:
    """Of each sample with what its task and the others need.

    Args:
        samples: All samples, or some.
        reference: Made of all samples.
        slice_square: Mean of each sample's squares over the weights of the slice.
        with_influence: Whether to tell how the responses move with each sample, which only errors need.

    Returns:
        Statistics of :class:`~qkov_lightning.scores.statistics.SliceStatistics`, by name.
    """
    sums = reference.sums
    each, inverse = sums.each, reference.inverse
    num_tasks, num_heads = len(samples.membership), len(each)
    # Products with the same samples are taken at once, so that the samples are read once.
    with_gradient = samples.zeros(4 * num_tasks, num_heads)
    with_square, with_absolute = (samples.zeros(num_tasks + 1, num_heads) for _ in range(2))
    self_pair, own_response, across = (samples.zeros(num_heads) for _ in range(3))
    slope = samples.zeros(num_tasks, num_heads)
    count = sums.task_count.clamp(min=1).to(sums.square)[:, None, None]
    for at, gradient, square, absolute in samples:
        heads, moves = at[1], reference.directions(at)
        mean, one, divisor = moves.mean_gradient, each[at][None], inverse[at][None]
        pulled_by = mean.new_empty(4, *mean.shape)
        torch.mul(mean, one, out=pulled_by[0])
        torch.mul(mean, divisor, out=pulled_by[1])
        moves.weighted(out=pulled_by[2])
        moves.weighted_half(out=pulled_by[3])
        sensitive_to, pushed_by = mean.new_empty(2, num_tasks + 1, *mean.shape[1:])
        torch.div(sums.absolute[at], count, out=sensitive_to[:-1]).mul_(divisor)
        torch.mul(moves.mean_square, divisor, out=pushed_by[:-1])
        sensitive_to[-1:], pushed_by[-1:] = divisor, one
        with_gradient[..., heads] += inner(gradient, pulled_by.flatten(0, 1))
        with_square[..., heads] += inner(square, sensitive_to)
        with_absolute[..., heads] += inner(absolute, pushed_by)
        self_pair[:, heads] += inner(absolute.mul_(square), divisor)[:, 0]
        for task, own_halves in task_samples(samples, gradient, square, slice_square[:, heads]):
            slopes = moves.slopes(task, mean * mean[task]) if with_influence else None
            for rows, own in own_halves:
                if slopes is not None:
                    slope[rows, :, heads] += slopes(own, mean)
                # Last: it writes over all of them.
                with_all, with_other = moves.response_to_others(own, absolute[rows])
                own_response[rows, heads] += with_all
                across[rows, heads] += with_other
    alignment, whitened_alignment, response, first = with_gradient.split(num_tasks, dim=1)
    own_task = samples.membership.T.bool().unsqueeze(-1)
    own_slope = (response * own_task).sum(dim=1)
    response = torch.where(own_task, own_response[:, None], response)
    halves = _responses_to_halves(samples, sums.count, response, first, own_response, across)
    return {
        "sensitivity": with_square[:, :num_tasks],
        "push": with_absolute[:, :num_tasks],
        "self_pair": self_pair,
        "absolute_norm": with_absolute[:, num_tasks],
        "alignment": alignment,
        "whitened_alignment": whitened_alignment,
        "whitened_squared_norm": with_square[:, num_tasks],
        "response": response,
        "own_slope": own_slope,
        "half_responses": halves,
        "slope_influence": slope,
    }


def _responses_to_halves(
    samples: SamplesByTask,
    half_count: Float[Tensor, "half task"],
    response: Float[Tensor, "sample task head"],
    first: Float[Tensor, "sample task head"],
    own_response: Float[Tensor, "sample head"],
    across: Float[Tensor, "sample head"],
) -> Float[Tensor, "sample half task head"]:
    """Responses to the direction of each half of each task; to that of the whole where a half is empty.

    Args:
        samples: The samples.
        half_count: Samples of each half.
        response: To the whole.
        first: To the first half, whatever the task of the sample.
        own_response: To the others of a sample's own task.
        across: To the other half of its own task.
    """
    in_first, in_second = half_count[..., None]
    both = (in_first > 0) & (in_second > 0)
    first = torch.where(both, first, response)
    second = ((in_first + in_second) * response - in_first * first) / in_second.clamp(min=1)
    halves = torch.stack([first, torch.where(both, second, response)], dim=1)
    for task, half, rows in samples.halves:
        inside, other = half_count[half, task] - 1, half_count[1 - half, task]
        if inside > 0 and other > 0:
            halves[rows, 1 - half, task] = across[rows]
            halves[rows, half, task] = ((inside + other) * own_response[rows] - other * across[rows]) / inside
        else:
            halves[rows, :, task] = own_response[rows, None]
    return halves
