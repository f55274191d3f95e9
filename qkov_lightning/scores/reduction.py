r"""From the per-sample gradients of one slice to sums over its weights: all that the scores are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.scores.left_out import interference_left_out
from qkov_lightning.scores.spans import Place, SamplesByTask, inner
from qkov_lightning.scores.statistics import SliceStatistics
from qkov_lightning.scores.updates import STEP_SIZE, TaskSamples, UpdateDirection, UpdateDirections, damped

MAX_TASKS_IN_FISHER = 16
"""With more tasks, one sample moves the pooled Fisher too little to matter for a standard error."""


def slice_statistics(
    blocks: Iterable[Float[Tensor, "_ head _"]],
    task_indices: Int[Tensor, sample],
    num_tasks: int,
    fisher: Float[Tensor, "head weight"],
    damping: float,
    update: UpdateDirection | Float[Tensor, "head weight"] = "adam",
    step_size: float = STEP_SIZE,
    weights: Float[Tensor, "head weight"] | None = None,
    num_replicates: int = 1,
    fisher_shares: Float[Tensor, sample] | None = None,
    groups: Int[Tensor, sample] | None = None,
    num_terms: Float[Tensor, sample] | None = None,
) -> SliceStatistics:
    """Reduce per-sample gradients to sums over weights, in time and memory linear in the samples.

    They are read three times: for the sums of the tasks, for inner products with these, and for how the
    responses move with each sample.

    Args:
        blocks: Gradients of all samples, block after block of weights (a list, or an object whose
            ``__iter__`` makes them anew), so that not all of them need be in memory.
        task_indices: Task of each sample, counted from 0; -1 leaves a sample out.
        num_tasks: Number of tasks.
        fisher: Fisher pooled over tasks.
        damping: Added to the Fisher, relative to its mean over the slice.
        update: Direction in which a task updates the slice, see
            :func:`~qkov_lightning.scores.updates.update_rate`.
        step_size: Length of the step along it.
        weights: How many weights of the slice each one stands for, where only some were kept.
        num_replicates: Independent samples of the weights of each head, which stand side by side as if they
            were heads.
        fisher_shares: Share of each sample's square in the Fisher, which varies with the samples; a Fisher
            without them is known.
        groups: Group of each sample, counted from 0; every sample is one of its own without them.
        num_terms: Terms that each sample's own loss is the mean of; 1 without them.

    Returns:
        The statistics of the samples that belong to a task.

    Raises:
        ValueError: If there is not one task per sample, or not one Fisher per weight.
    """
    if groups is None:
        groups = torch.arange(len(task_indices))
    if num_terms is None:
        num_terms = torch.ones(len(task_indices), dtype=torch.float64)
    halves = halves_of(task_indices, groups.to(task_indices))
    samples = SamplesByTask(blocks, task_indices, num_tasks, fisher.shape[1], halves)
    each = torch.ones_like(fisher) if weights is None else weights.to(fisher)
    inverse = each / damped(fisher, damping, None if weights is None else each)
    sums = _task_sums(samples, each)
    count = samples.count.to(fisher)
    half_count = torch.zeros(2, num_tasks).to(fisher)
    for task, half, rows in samples.halves:
        half_count[half, task] = rows.stop - rows.start
    slice_square = sums.squared_norm / each.sum(dim=-1)
    epsilon = damping * (samples.membership @ slice_square) / count.clamp(min=1)[:, None]

    def directions(at: Place) -> UpdateDirections:
        rule = update[at] if isinstance(update, Tensor) else update
        own_epsilon = epsilon[:, at[1], None]
        return UpdateDirections(
            rule, sums.gradient[at], sums.square[at], half_count, own_epsilon, damping, each[at]
        )

    shares = None if num_tasks > MAX_TASKS_IN_FISHER else fisher_shares
    products = _inner_products(samples, sums, each, inverse, slice_square, half_count, directions)
    terms = samples.of(num_terms).to(torch.float64)
    responses = _mean_over_replicates(products["half_responses"], num_replicates)
    weighted = (responses * terms[:, None, None, None]).to(fisher)
    return SliceStatistics(
        membership=samples.membership,
        squared_norm=sums.squared_norm,
        **products,
        curvature_influence=_curvature_influence(samples, weighted, half_count, slice_square, directions),
        left_out=None
        if shares is None
        else interference_left_out(
            samples,
            sums.square,
            sums.absolute,
            slice_square,
            fisher,
            samples.of(shares).to(fisher),
            each,
            damping,
        ),
        groups=samples.of(groups),
        num_terms=terms,
        step_size=step_size,
    )


def halves_of(task_indices: Int[Tensor, sample], groups: Int[Tensor, sample]) -> Int[Tensor, sample]:
    """Half of its task that each sample is in: the groups of a task are dealt out in turn.

    A task whose samples are all of one group has one half only.
    """
    halves = torch.zeros_like(task_indices)
    for task in task_indices.unique().tolist():
        own = task_indices == task
        halves[own] = groups[own].unique(return_inverse=True)[1] % 2
    return halves


@dataclass(frozen=True, eq=False)
class _TaskSums:
    """Sums over the samples of each task (of each half of it), and the squared norm of each sample."""

    gradient: Float[Tensor, "half task head weight"]
    absolute: Float[Tensor, "task head weight"]
    square: Float[Tensor, "task head weight"]
    squared_norm: Float[Tensor, "sample head"]


def _task_sums(samples: SamplesByTask, each: Float[Tensor, "head weight"]) -> _TaskSums:
    absolute_sum, square_sum = each.new_zeros(2, len(samples.membership), *each.shape)
    gradient_sum = each.new_zeros(2, *absolute_sum.shape)
    sums = _TaskSums(gradient_sum, absolute_sum, square_sum, samples.zeros(len(each)))
    for at, gradient, square, absolute in samples:
        sums.squared_norm[:, at[1]] += inner(square, each[at][None])[:, 0]
        for task, half, rows in samples.halves:
            sums.gradient[half, task][at] = gradient[rows].sum(dim=0)
        for task, rows in samples.groups:
            sums.absolute[task][at] = absolute[rows].sum(dim=0)
            sums.square[task][at] = square[rows].sum(dim=0)
    return sums


def _inner_products(
    samples: SamplesByTask,
    sums: _TaskSums,
    each: Float[Tensor, "head weight"],
    inverse: Float[Tensor, "head weight"],
    slice_square: Float[Tensor, "sample head"],
    half_count: Float[Tensor, "half task"],
    directions: Callable[[Place], UpdateDirections],
) -> dict[str, Tensor]:
    """Of each sample with what its task and the others need."""
    num_tasks, num_heads = len(samples.membership), len(each)
    # Products with the same samples are taken at once, so that the samples are read once.
    with_gradient = samples.zeros(4 * num_tasks, num_heads)
    with_square, with_absolute = (samples.zeros(num_tasks + 1, num_heads) for _ in range(2))
    self_pair, own_response, across = (samples.zeros(num_heads) for _ in range(3))
    slope = samples.zeros(num_tasks, num_heads)
    count = samples.count.clamp(min=1).to(each)[:, None, None]
    for at, gradient, square, absolute in samples:
        heads, moves = at[1], directions(at)
        mean, one, divisor = moves.mean_gradient, each[at][None], inverse[at][None]
        pulled_by = torch.cat([mean * one, mean * divisor, moves.weighted, moves.weighted_half])
        sensitive_to = torch.cat([sums.absolute[at] / count * divisor, divisor])
        pushed_by = torch.cat([moves.mean_square * divisor, one])
        with_gradient[..., heads] += inner(gradient, pulled_by)
        with_square[..., heads] += inner(square, sensitive_to)
        with_absolute[..., heads] += inner(absolute, pushed_by)
        self_pair[:, heads] += inner(absolute.mul_(square), divisor)[:, 0]
        for rows, own in _by_task(samples, gradient, square, slice_square[:, heads]):
            slope[rows, :, heads] += moves.derivative(own, mean, mean * mean[own.task])
            # Last: it writes over all of them.
            with_all, with_other = moves.response_to_others(own, absolute[rows])
            own_response[rows, heads] += with_all
            across[rows, heads] += with_other
    alignment, whitened_alignment, response, first = with_gradient.split(num_tasks, dim=1)
    own_task = samples.membership.T.bool().unsqueeze(-1)
    own_slope = (response * own_task).sum(dim=1)
    response = torch.where(own_task, own_response[:, None], response)
    halves = _responses_to_halves(samples, half_count.double(), response, first, own_response, across)
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


def _curvature_influence(
    samples: SamplesByTask,
    responses: Float[Tensor, "sample half task head"],
    half_count: Float[Tensor, "half task"],
    slice_square: Float[Tensor, "sample head"],
    directions: Callable[[Place], UpdateDirections],
) -> Float[Tensor, "sample task head"]:
    """How the mean curvature of each task moves with each sample of the pushing task."""
    num_tasks = half_count.shape[1]
    count = half_count.sum(dim=0)
    curvature = samples.zeros(num_tasks, responses.shape[-1])
    for at, gradient, square, _ in samples:
        heads, moves = at[1], directions(at)
        # Mean over A of each sample's gradient times its response: [half of B, task_a, task_b, head, weight].
        weighted = gradient.new_zeros(2, num_tasks, num_tasks, *gradient.shape[1:])
        for task, rows in samples.groups:
            to = responses[rows][..., heads].permute(3, 1, 2, 0).flatten(1, 2)
            means = torch.bmm(to, gradient[rows].transpose(0, 1)).transpose(0, 1) / count[task]
            weighted[:, task] = means.unflatten(0, (2, num_tasks))
        for rows, own in _by_task(samples, gradient, square, slice_square[:, heads]):
            first, second = weighted[:, :, own.task]
            mean = moves.half_mean[:, own.task]
            # A sample moves the direction of its own half alone, which meets the responses to the other.
            has_halves = half_count[1 - own.half, own.task] > 0
            share = half_count[own.half, own.task] / count[own.task]
            vectors = weighted[1 - own.half, :, own.task] / share if has_halves else first + second
            curvature[rows, :, heads] += moves.derivative(own, vectors, first * mean[1] + second * mean[0])
    return curvature


def _by_task(
    samples: SamplesByTask, gradient: Tensor, square: Tensor, slice_square: Tensor
) -> Iterator[tuple[slice, TaskSamples]]:
    """Where the samples of each half of a task stand, and what a direction needs of them."""
    for task, half, rows in samples.halves:
        yield rows, TaskSamples(task, half, gradient[rows], square[rows], slice_square[rows])


def _mean_over_replicates(
    response: Float[Tensor, "sample half task head"], num_replicates: int
) -> Float[Tensor, "sample half task head"]:
    """The response of a whole head in the place of each of its replicates."""
    mean = response.unflatten(-1, (-1, num_replicates)).mean(dim=-1)
    return mean.repeat_interleave(num_replicates, dim=-1)
