r"""How the curvature along a task's update moves with each sample of that task.

The mean curvature of A along the direction of B is :math:`\operatorname{mean}_i T_i r_{i1} r_{i2}` with the
responses r to the directions of B's two halves. A sample j of B moves the direction d of its half, and so
the curvature by :math:`\langle y, \partial d / \partial j \rangle`, where :math:`y = \operatorname{mean}_i
T_i r_i g_i` holds the responses to the other half: a sum over all samples of A, which must be complete before
the first product with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.scores.spans import SamplesByTask
from qkov_lightning.scores.sums import Reference
from qkov_lightning.scores.updates import UpdateDirections, task_samples

Weighted = Float[Tensor, "half task_a task_b head weight"]


def weighted_gradients(
    samples: SamplesByTask,
    gradient: Float[Tensor, "sample head weight"],
    responses: Float[Tensor, "sample half task head"],
    count: Float[Tensor, task],
) -> Weighted:
    """Mean over the samples of each task A of a sample's gradient times its response; of these samples' part.

    Args:
        samples: All samples, or some.
        gradient: Their gradients, at some weights.
        responses: Their responses times their number of terms, at the heads of these weights.
        count: All samples of each task.
    """
    num_tasks = len(count)
    weighted = gradient.new_zeros(2, num_tasks, num_tasks, *gradient.shape[1:])
    for task, rows in samples.groups:
        to = responses[rows].permute(3, 1, 2, 0).flatten(1, 2)
        means = torch.bmm(to, gradient[rows].transpose(0, 1)).transpose(0, 1) / count[task]
        weighted[:, task] = means.unflatten(0, (2, num_tasks))
    return weighted


def add_weighted_gradients(
    total: Weighted,
    samples: SamplesByTask,
    responses: Float[Tensor, "sample half task head"],
    count: Float[Tensor, task],
) -> None:
    """Add the part of some samples to the means over all of them."""
    for at, gradient, _, _ in samples:
        total[at] += weighted_gradients(samples, gradient, responses[..., at[1]], count)


def curvature_influence(
    samples: SamplesByTask,
    reference: Reference,
    slice_square: Float[Tensor, "sample head"],
    weighted: Weighted | Float[Tensor, "sample half task head"],
) -> Float[Tensor, "sample task head"]:
    """How the mean curvature of each task moves with each sample of the pushing task.

    Args:
        samples: All samples, or some.
        reference: Made of all samples.
        slice_square: Mean of each sample's squares over the weights of the slice.
        weighted: The means over all samples; or, if ``samples`` are all of them, what ``weighted_gradients``
            makes these of: their responses.
    """
    num_tasks = len(reference.sums.task_count)
    curvature = samples.zeros(num_tasks, len(reference.inverse))
    for at, gradient, square, _ in samples:
        heads, moves = at[1], reference.directions(at)
        if weighted.ndim == 5:
            here = weighted[at]
        else:
            count = reference.sums.task_count
            here = weighted_gradients(samples, gradient, weighted[..., heads], count)
        for rows, part in _influence(
            samples, reference, moves, here, gradient, square, slice_square[:, heads]
        ):
            curvature[rows, :, heads] += part
    return curvature


def _influence(
    samples: SamplesByTask,
    reference: Reference,
    moves: UpdateDirections,
    weighted: Weighted,
    gradient: Float[Tensor, "sample head weight"],
    square: Float[Tensor, "sample head weight"],
    slice_square: Float[Tensor, "sample head"],
) -> Iterable[tuple[slice, Float[Tensor, "own task head"]]]:
    """The part of some weights, for the samples of each half of a task."""
    half_count, count = reference.sums.count, reference.sums.task_count
    for task, halves in task_samples(samples, gradient, square, slice_square):
        first, second = weighted[:, :, task]
        has_halves = bool((half_count[:, task] > 0).all())
        if has_halves:
            times_mean = first * moves.half_mean(1, task) + second * moves.half_mean(0, task)
        else:
            times_mean = (first + second) * moves.mean_gradient[task]
        slopes = moves.slopes(task, times_mean)
        for rows, own in halves:
            # A sample moves the direction of its own half alone, which meets the responses to the other.
            share = (half_count[own.half, task] / count[task]).to(weighted)
            vectors = weighted[1 - own.half, :, task] / share if has_halves else first + second
            yield rows, slopes(own, vectors)
