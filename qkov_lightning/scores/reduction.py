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

    Returns:
        The statistics of the samples that belong to a task.

    Raises:
        ValueError: If there is not one task per sample, or not one Fisher per weight.
    """
    samples = SamplesByTask(blocks, task_indices, num_tasks, fisher.shape[1])
    each = torch.ones_like(fisher) if weights is None else weights.to(fisher)
    inverse = each / damped(fisher, damping, None if weights is None else each)
    sums = _task_sums(samples, each)
    count = samples.count.to(fisher)
    slice_square = sums.squared_norm / each.sum(dim=-1)
    epsilon = damping * (samples.membership @ slice_square) / count.clamp(min=1)[:, None]

    def directions(at: Place) -> UpdateDirections:
        rule = update[at] if isinstance(update, Tensor) else update
        own_epsilon = epsilon[:, at[1], None]
        return UpdateDirections(
            rule, sums.gradient[at], sums.square[at], count, own_epsilon, damping, each[at]
        )

    shares = None if num_tasks > MAX_TASKS_IN_FISHER else fisher_shares
    products = _inner_products(samples, sums, each, inverse, slice_square, directions)
    response = _mean_over_replicates(products["response"], num_replicates).to(fisher)
    return SliceStatistics(
        membership=samples.membership,
        squared_norm=sums.squared_norm,
        **products,
        curvature_influence=_curvature_influence(samples, response, count, slice_square, directions),
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
        groups=samples.of(torch.arange(len(task_indices)) if groups is None else groups),
        step_size=step_size,
    )


@dataclass(frozen=True, eq=False)
class _TaskSums:
    """Sums over the samples of each task, and the squared norm of each sample."""

    gradient: Float[Tensor, "task head weight"]
    absolute: Float[Tensor, "task head weight"]
    square: Float[Tensor, "task head weight"]
    squared_norm: Float[Tensor, "sample head"]


def _task_sums(samples: SamplesByTask, each: Float[Tensor, "head weight"]) -> _TaskSums:
    gradient_sum, absolute_sum, square_sum = each.new_zeros(3, len(samples.membership), *each.shape)
    sums = _TaskSums(gradient_sum, absolute_sum, square_sum, samples.zeros(len(each)))
    for at, gradient, square, absolute in samples:
        sums.squared_norm[:, at[1]] += inner(square, each[at][None])[:, 0]
        for task, rows in samples.groups:
            sums.gradient[task][at] = gradient[rows].sum(dim=0)
            sums.absolute[task][at] = absolute[rows].sum(dim=0)
            sums.square[task][at] = square[rows].sum(dim=0)
    return sums


def _inner_products(
    samples: SamplesByTask,
    sums: _TaskSums,
    each: Float[Tensor, "head weight"],
    inverse: Float[Tensor, "head weight"],
    slice_square: Float[Tensor, "sample head"],
    directions: Callable[[Place], UpdateDirections],
) -> dict[str, Tensor]:
    """Of each sample with what its task and the others need."""
    num_tasks, num_heads = len(samples.membership), len(each)
    # Products with the same samples are taken at once, so that the samples are read once.
    with_gradient = samples.zeros(3 * num_tasks, num_heads)
    with_square, with_absolute = (samples.zeros(num_tasks + 1, num_heads) for _ in range(2))
    self_pair, own_response = (samples.zeros(num_heads) for _ in range(2))
    slope = samples.zeros(num_tasks, num_heads)
    count = samples.count.clamp(min=1).to(each)[:, None, None]
    for at, gradient, square, absolute in samples:
        heads, moves = at[1], directions(at)
        mean, one, divisor = moves.mean_gradient, each[at][None], inverse[at][None]
        pulled_by = torch.cat([mean * one, mean * divisor, moves.weighted])
        sensitive_to = torch.cat([sums.absolute[at] / count * divisor, divisor])
        pushed_by = torch.cat([moves.mean_square * divisor, one])
        with_gradient[..., heads] += inner(gradient, pulled_by)
        with_square[..., heads] += inner(square, sensitive_to)
        with_absolute[..., heads] += inner(absolute, pushed_by)
        self_pair[:, heads] += inner(absolute.mul_(square), divisor)[:, 0]
        for rows, own in _by_task(samples, gradient, square, slice_square[:, heads]):
            slope[rows, :, heads] += moves.derivative(own, mean)
            # Last: it writes over all of them.
            own_response[rows, heads] += moves.response_to_others(own, absolute[rows])
    alignment, whitened_alignment, response = with_gradient.split(num_tasks, dim=1)
    own_task = samples.membership.T.bool().unsqueeze(-1)
    return {
        "sensitivity": with_square[:, :num_tasks],
        "push": with_absolute[:, :num_tasks],
        "self_pair": self_pair,
        "absolute_norm": with_absolute[:, num_tasks],
        "alignment": alignment,
        "whitened_alignment": whitened_alignment,
        "whitened_squared_norm": with_square[:, num_tasks],
        "response": torch.where(own_task, own_response[:, None], response),
        "slope_influence": slope,
    }


def _curvature_influence(
    samples: SamplesByTask,
    response: Float[Tensor, "sample task head"],
    count: Float[Tensor, task],
    slice_square: Float[Tensor, "sample head"],
    directions: Callable[[Place], UpdateDirections],
) -> Float[Tensor, "sample task head"]:
    """How the mean squared response of each task moves with each sample of the pushing task."""
    num_tasks = len(count)
    curvature = samples.zeros(*response.shape[1:])
    for at, gradient, square, _ in samples:
        heads, moves = at[1], directions(at)
        # Mean over A of each sample's gradient times its response to B: [task_a, task_b, head, weight].
        weighted = gradient.new_zeros(num_tasks, num_tasks, *gradient.shape[1:])
        for task, rows in samples.groups:
            to = response[rows, :, heads].permute(2, 1, 0)
            weighted[task] = torch.bmm(to, gradient[rows].transpose(0, 1)).transpose(0, 1) / count[task]
        for rows, own in _by_task(samples, gradient, square, slice_square[:, heads]):
            curvature[rows, :, heads] += 2 * moves.derivative(own, weighted[:, own.task])
    return curvature


def _by_task(
    samples: SamplesByTask, gradient: Tensor, square: Tensor, slice_square: Tensor
) -> Iterator[tuple[slice, TaskSamples]]:
    """Where the samples of each task stand, and what a direction needs of them."""
    for task, rows in samples.groups:
        yield rows, TaskSamples(task, gradient[rows], square[rows], slice_square[rows])


def _mean_over_replicates(
    response: Float[Tensor, "sample task head"], num_replicates: int
) -> Float[Tensor, "sample task head"]:
    """The response of a whole head in the place of each of its replicates."""
    mean = response.unflatten(-1, (-1, num_replicates)).mean(dim=-1)
    return mean.repeat_interleave(num_replicates, dim=-1)
