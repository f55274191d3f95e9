r"""From the per-sample gradients of one slice to sums over its weights: all that the scores are made of.

``slice_statistics`` reads all samples at some weights, block after block. ``SliceReduction`` takes some samples
at all weights. The sums and products are the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.scores.curvature import add_weighted_gradients, curvature_influence
from qkov_lightning.scores.left_out import Wholes, interference_left_out, whole_sums
from qkov_lightning.scores.products import inner_products
from qkov_lightning.scores.spans import SamplesByTask
from qkov_lightning.scores.statistics import SliceStatistics
from qkov_lightning.scores.sums import Reference, TaskSums, halves_of
from qkov_lightning.scores.updates import STEP_SIZE, UpdateDirection

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
    shares = None if num_tasks > MAX_TASKS_IN_FISHER else fisher_shares
    sums = TaskSums(num_tasks, each, with_cubes=shares is not None)
    squared_norm = sums.add(samples)
    slice_square = squared_norm / each.sum(dim=-1)
    own_square = (samples.membership @ slice_square) / samples.count.clamp(min=1)[:, None]
    whole_slice = None if weights is None else each
    reference = Reference.of(sums, own_square, fisher, damping, update, whole_slice)
    products = inner_products(samples, reference, slice_square)
    terms = samples.of(num_terms).to(torch.float64)
    responses = _mean_over_replicates(products["half_responses"], num_replicates)
    weighted = (responses * terms[:, None, None, None]).to(fisher)
    left_out = None
    if shares is not None:
        own_shares = samples.of(shares).to(fisher)
        left_out = interference_left_out(samples, reference, slice_square, own_shares, whole_sums(reference))
    return SliceStatistics(
        membership=samples.membership,
        squared_norm=squared_norm,
        **products,
        curvature_influence=curvature_influence(samples, reference, slice_square, weighted),
        left_out=left_out,
        groups=samples.of(groups),
        num_terms=terms,
        step_size=step_size,
    )


def _mean_over_replicates(
    response: Float[Tensor, "sample half task head"], num_replicates: int
) -> Float[Tensor, "sample half task head"]:
    """The response of a whole head in the place of each of its replicates."""
    mean = response.unflatten(-1, (-1, num_replicates)).mean(dim=-1)
    return mean.repeat_interleave(num_replicates, dim=-1)


class SliceReduction:
    """Reduces the gradients of some heads, a few samples at a time: nothing is kept of a sample but numbers.

    The same samples come again and again: all of them to ``add``, then all to ``compare``, and, where errors
    are wanted, all to ``derive``. The Fisher is the plain mean over the samples of each task, then over tasks.

    Args:
        task_indices: Task of each sample of all, counted from 0; -1 leaves a sample out.
        num_tasks: Number of tasks.
        groups: Group of each sample, counted from 0.
        num_terms: Terms that each sample's own loss is the mean of.
        ones: 1 for each weight of the heads.
        damping: Added to the Fisher, relative to its mean over the slice.
        update: Direction in which a task updates the slice.
        step_size: Length of the step along it.
        with_influence: Whether it is asked what each sample moves the scores by; without it, ``derive`` has
            nothing to do, and the statistics say that no sample moves anything.
    """

    def __init__(
        self,
        task_indices: Int[Tensor, sample],
        num_tasks: int,
        groups: Int[Tensor, sample],
        num_terms: Float[Tensor, sample],
        ones: Float[Tensor, "head weight"],
        damping: float,
        update: UpdateDirection,
        step_size: float,
        with_influence: bool,
    ) -> None:
        self._tasks, self._num_tasks, self._groups = task_indices, num_tasks, groups
        self._halves, self._num_terms = halves_of(task_indices, groups), num_terms
        self._damping, self._update, self._step_size = damping, update, step_size
        self._with_influence = with_influence
        self._with_left_out = with_influence and num_tasks <= MAX_TASKS_IN_FISHER
        self._sums: TaskSums | None = TaskSums(num_tasks, ones, self._with_left_out)
        self._seen = torch.zeros_like(task_indices, dtype=torch.bool)
        self._per_sample: dict[str, Tensor] = {}
        self._weighted: Tensor | None = None
        self._wholes: Wholes | None = None
        self._own_square: Tensor | None = None

    def add(self, block: Float[Tensor, "some head weight"], first: int) -> None:
        """Take some samples into the sums of their tasks.

        Args:
            block: Their gradients.
            first: Place of the first of them among all samples.
        """
        samples, places = self._of(block, first)
        self._keep({"squared_norm": self._open_sums.add(samples)}, places)
        self._seen[places] = True

    def compare(self, block: Float[Tensor, "some head weight"], first: int) -> None:
        """Take the products of some samples with the complete sums."""
        samples, places = self._of(block, first)
        reference, slice_square = self._reference(), self._slice_square[places]
        found = inner_products(samples, reference, slice_square, self._with_influence)
        if self._with_left_out:
            if self._wholes is None:
                self._wholes = whole_sums(reference)
            shares = 1 / (reference.sums.task_count * (reference.sums.task_count > 0).sum())
            own = shares[self._tasks[places]].to(block)
            found["left_out"] = interference_left_out(samples, reference, slice_square, own, self._wholes)
        if self._with_influence:
            if self._weighted is None:
                shape = (2, self._num_tasks, self._num_tasks, *reference.inverse.shape)
                self._weighted = reference.inverse.new_zeros(shape)
            terms = self._num_terms[places][:, None, None, None]
            responses = (found["half_responses"] * terms).to(block)
            add_weighted_gradients(self._weighted, samples, responses, reference)
        self._keep(found, places)

    def derive(self, block: Float[Tensor, "some head weight"], first: int) -> None:
        """Tell what some samples move the curvature by, from the complete products."""
        if self._weighted is not None:
            samples, places = self._of(block, first)
            reference, slice_square = self._reference(), self._slice_square[places]
            influence = curvature_influence(samples, reference, slice_square, self._weighted)
            self._keep({"curvature_influence": influence}, places)

    def statistics(self, dropped: Float[Tensor, "sample group"] | None = None) -> SliceStatistics:
        """The statistics of all samples that came and belong to a task, in the order in which they came.

        Args:
            dropped: 1 where a replicate leaves a sample out, if replicates are wanted.
        """
        kept = self._seen.nonzero().flatten()
        found = {name: values[kept] for name, values in self._per_sample.items()}
        found.setdefault("curvature_influence", torch.zeros_like(found["sensitivity"]))
        found.setdefault("left_out", None)  # type: ignore[arg-type]
        membership = torch.nn.functional.one_hot(self._tasks[kept], self._num_tasks).T.double()
        return SliceStatistics(
            membership=membership,
            **found,
            groups=self._groups[kept],
            num_terms=self._num_terms[kept],
            step_size=self._step_size,
            dropped=None if dropped is None else dropped[kept],
        )

    def release(self) -> None:
        """Let go of everything that has the size of the weights."""
        self._sums = self._weighted = None

    @property
    def _open_sums(self) -> TaskSums:
        if self._sums is None:
            raise ValueError("The sums were released: no sample can come any more.")
        return self._sums

    @property
    def _slice_square(self) -> Float[Tensor, "sample head"]:
        return self._per_sample["squared_norm"] / self._open_sums.each.shape[1]

    def _reference(self) -> Reference:
        """What samples are compared with, made of the sums for a few samples at a time and not kept."""
        sums = self._open_sums
        if self._own_square is None:
            member = torch.nn.functional.one_hot(self._tasks.clamp(min=0), self._num_tasks).T.double()
            member = member * self._seen
            self._own_square = member @ self._slice_square / sums.task_count.clamp(min=1)[:, None]
        return Reference.of(sums, self._own_square, sums.plain_fisher(), self._damping, self._update)

    def _of(self, block: Tensor, first: int) -> tuple[SamplesByTask, Int[Tensor, kept]]:
        """Some samples by task, and their places among all."""
        some = slice(first, first + len(block))
        samples = SamplesByTask(
            [block], self._tasks[some], self._num_tasks, block.shape[2], self._halves[some]
        )
        return samples, first + samples.order

    def _keep(self, values: dict[str, Tensor], places: Int[Tensor, kept]) -> None:
        for name, value in values.items():
            if name not in self._per_sample:
                self._per_sample[name] = value.new_zeros(len(self._tasks), *value.shape[1:])
            self._per_sample[name][places] = value
