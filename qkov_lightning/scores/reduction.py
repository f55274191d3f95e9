r"""From the per-sample gradients of one slice to sums over its weights: all that the scores are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.scores.left_out import interference_left_out
from qkov_lightning.scores.spans import Place, SamplesByTask, inner
from qkov_lightning.scores.updates import STEP_SIZE, TaskSamples, UpdateDirection, UpdateDirections, damped

MIN_SAMPLES = 2
"""A task with fewer samples in a slice has no score there: a variance needs two."""

MAX_TASKS_IN_FISHER = 16
"""With more tasks, one sample moves the pooled Fisher too little to matter for a standard error."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A score of every ordered task pair (a, b) and head, NaN where a task has fewer than two samples.

    Attributes:
        value: The score.
        variance: Its sampling variance over samples of both tasks, and over all samples that the Fisher
            holds.
    """

    value: Float[Tensor, "task_a task_b head"]
    variance: Float[Tensor, "task_a task_b head"]


@dataclass(frozen=True, eq=False)
class SliceStatistics:
    r"""What the scores are made of: sums over weights, per sample, in float64.

    The samples stand in the order of their tasks.

    Attributes:
        membership: 1 where a sample belongs to a task.
        sensitivity: :math:`\langle u_i, \bar v_t \rangle` for each sample i and task t.
        push: :math:`\langle \bar u_t, v_i \rangle`.
        self_pair: :math:`\langle u_i, v_i \rangle`.
        absolute_norm: :math:`\sum_k |g_{ik}|`.
        alignment: :math:`\langle g_i, \bar g_t \rangle`.
        squared_norm: :math:`\sum_k g_{ik}^2`.
        whitened_alignment: :math:`\langle g_i, \bar g_t / (I + \epsilon) \rangle`.
        whitened_squared_norm: :math:`\sum_k g_{ik}^2 / (I_k + \epsilon)`.
        response: :math:`r_{it} = \langle g_i, d_t \rangle` with the update direction :math:`d_t` of each task
            t; for a sample's own task, that of its other samples.
        slope_influence: How the mean response of each task t to the direction of a sample's own task moves
            with that sample, :math:`\langle \bar g_t, \partial d / \partial j \rangle`.
        curvature_influence: The same of the mean squared response.
        left_out: :math:`\langle \bar u_a, \bar v_b \rangle` without each sample, and with the Fisher of the
            rest; None where the Fisher is known.
        groups: Group of each sample, counted from 0: samples of one group vary together.
        step_size: Length of the step along the update direction.
    """

    membership: Float[Tensor, "task sample"]
    sensitivity: Float[Tensor, "sample task head"]
    push: Float[Tensor, "sample task head"]
    self_pair: Float[Tensor, "sample head"]
    absolute_norm: Float[Tensor, "sample head"]
    alignment: Float[Tensor, "sample task head"]
    squared_norm: Float[Tensor, "sample head"]
    whitened_alignment: Float[Tensor, "sample task head"]
    whitened_squared_norm: Float[Tensor, "sample head"]
    response: Float[Tensor, "sample task head"]
    slope_influence: Float[Tensor, "sample task head"]
    curvature_influence: Float[Tensor, "sample task head"]
    left_out: Float[Tensor, "sample task_a task_b head"] | None
    groups: Int[Tensor, sample]
    step_size: float

    @property
    def count(self) -> Float[Tensor, task]:
        """Samples of each task."""
        return self.membership.sum(dim=1)

    def task_mean(self, per_sample: Float[Tensor, sample * rest]) -> Float[Tensor, task * rest]:
        """Mean over the samples of each task."""
        return torch.tensordot(self.membership, per_sample, dims=1) / _column(self.count, per_sample.ndim)

    def of_own_task(self, per_task: Float[Tensor, task * rest]) -> Float[Tensor, sample * rest]:
        """The entry of each sample's own task."""
        return torch.tensordot(self.membership.T, per_task, dims=1)

    def without_self(
        self, per_sample: Float[Tensor, "sample task head"]
    ) -> Float[Tensor, "sample task head"]:
        """Marginals with the pair (i, i) taken out of the mean over the sample's own task."""
        own = self.membership.T.unsqueeze(-1).bool()
        count = self.of_own_task(self.count)[:, None, None]
        return torch.where(own, (count * per_sample - self.self_pair[:, None]) / (count - 1), per_sample)

    def pair_estimate(
        self,
        value: Float[Tensor, "task_a task_b head"],
        as_a: Float[Tensor, "sample task_b head"],
        as_b: Float[Tensor, "sample task_a head"],
    ) -> Estimate:
        """A score with its sampling variance, from the influence of each sample on it.

        Args:
            value: The score.
            as_a: Influence of a sample as a member of its task A, on the pair with each task B.
            as_b: Influence as a member of task B, on the pair with each task A.
        """
        as_a, as_b = self._centred(as_a), self._centred(as_b)
        member = self.membership.T.unsqueeze(-1)
        variances = [
            self._variance(member[:, a, None] * as_a + member * as_b[:, a, None])
            for a in range(len(self.count))
        ]
        return self._estimate(value, variances)

    def left_out_estimate(
        self,
        value: Float[Tensor, "task_a task_b head"],
        left_out: Float[Tensor, "sample task_a task_b head"],
    ) -> Estimate:
        """A score with its sampling variance, from its values without each sample (Tukey 1958)."""
        count = self.of_own_task(self.count)[:, None, None]
        return self._estimate(
            value, [self._variance(-(count - 1) * self._centred(left_out[:, a])) for a in range(len(value))]
        )

    def _estimate(
        self,
        value: Float[Tensor, "task_a task_b head"],
        variances: Sequence[Float[Tensor, "task_b head"]],
    ) -> Estimate:
        variance = torch.stack(list(variances))
        no_data = self.count < MIN_SAMPLES
        no_data = (no_data[:, None] | no_data[None, :]).unsqueeze(-1)
        return Estimate(value.masked_fill(no_data, torch.nan), variance.masked_fill(no_data, torch.nan))

    def _variance(self, influence: Float[Tensor, "sample task head"]) -> Float[Tensor, "task head"]:
        r"""Sampling variance of a score, from what each sample moves it by.

        .. math:: \sum_g \Big( \sum_{i \in g} c_i \, \psi_i \Big)^2

        with :math:`\psi_i` of mean zero over the task of sample i, summed over each group g of samples (Liang
        & Zeger 1986), and :math:`c_i^2 = n / (n - 1)` with the n groups of its task. Every sample is a group
        of its own where none are given.
        """
        grouped = influence.new_zeros(int(self.groups.max()) + 1, *influence.shape[1:])
        grouped.index_add_(0, self.groups, influence * self._correction())
        return grouped.square().sum(dim=0)

    def _centred(self, influence: Float[Tensor, "sample task head"]) -> Float[Tensor, "sample task head"]:
        """Influence on a mean over a task: less its own mean, and divided by the number of samples."""
        count = self.of_own_task(self.count)[:, None, None]
        return (influence - self.of_own_task(self.task_mean(influence))) / count

    def _correction(self) -> Float[Tensor, "sample 1 1"]:
        """Of the degree of freedom that the mean of each task takes."""
        seen = torch.zeros(len(self.count), int(self.groups.max()) + 1).to(self.membership)
        seen.scatter_add_(1, self.groups.expand(len(self.count), -1), self.membership)
        number = (seen > 0).sum(dim=1).to(self.membership)
        return _column(self.of_own_task((number / (number - 1).clamp(min=1)).sqrt()), 3)


def _column(values: Tensor, ndim: int) -> Tensor:
    return values.view(-1, *(1,) * (ndim - 1))


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
