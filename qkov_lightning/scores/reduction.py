r"""From the per-sample gradients of one slice to sums over its weights: all that the scores are made of.

``slice_statistics`` reads all samples at some weights, block after block. ``SliceReduction`` takes some
samples at all weights. The sums and products are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Deal:
    """How all samples of a measurement are dealt out.

    Attributes:
        task_indices: Task of each sample, counted from 0; -1 leaves a sample out.
        halves: Half of its task that each sample is in.
        groups: Group of each sample, counted from 0.
        num_terms: Terms that each sample's own loss is the mean of.
        num_tasks: Number of tasks.
    """

    task_indices: Int[Tensor, sample]
    halves: Int[Tensor, sample]
    groups: Int[Tensor, sample]
    num_terms: Float[Tensor, sample]
    num_tasks: int

    @classmethod
    def of(
        cls,
        task_indices: Int[Tensor, sample],
        groups: Int[Tensor, sample],
        num_terms: Float[Tensor, sample],
        num_tasks: int,
    ) -> Deal:
        """With the groups of each task dealt out to its halves in turn."""
        return cls(task_indices, halves_of(task_indices, groups), groups, num_terms, num_tasks)


class SliceReduction:
    """Reduces the gradients of some heads, a few samples at a time: nothing is kept of a sample but numbers.

    The same samples come again and again: all of them to ``add``, then all to ``compare``, and, where it is
    asked what each sample moves the scores by, all to ``weigh``, which each may do as soon as it is compared,
    and all to ``derive``. The Fisher is the plain mean over the samples of each task, then the mean over the
    tasks.

    Args:
        deal: How all samples are dealt out. Their number of terms may be set until they come.
        ones: 1 for each weight of the heads.
        damping: Added to the Fisher, relative to its mean over the slice.
        update: Direction in which a task updates the slice.
        step_size: Length of the step along it.
        with_influence: Whether it is asked what each sample moves the scores by; without it, and without
            ``derive``, the statistics say that no sample moves anything.
    """

    def __init__(
        self,
        deal: Deal,
        ones: Float[Tensor, "head weight"],
        damping: float,
        update: UpdateDirection,
        step_size: float,
        with_influence: bool,
    ) -> None:
        self._deal = deal
        self._damping, self._update, self._step_size = damping, update, step_size
        self._with_influence = with_influence
        self._with_left_out = with_influence and deal.num_tasks <= MAX_TASKS_IN_FISHER
        self._sums = TaskSums(deal.num_tasks, ones, self._with_left_out)
        self._seen = torch.zeros_like(deal.task_indices, dtype=torch.bool)
        self._per_sample: dict[str, Tensor] = {}
        self._weighted: Tensor | None = None
        self._wholes: Wholes | None = None
        self._own_square: Tensor | None = None

    def add(self, block: Float[Tensor, "some head weight"], where: Int[Tensor, some]) -> None:
        """Take some samples into the sums of their tasks.

        Args:
            block: Their gradients.
            where: Their places among all samples.
        """
        samples, places = self._of(block, where)
        self._keep({"squared_norm": self._sums.add(samples)}, places)
        self._seen[places] = True

    def compare(self, block: Float[Tensor, "some head weight"], where: Int[Tensor, some]) -> None:
        """Take the products of some samples with the complete sums."""
        samples, places = self._of(block, where)
        reference, slice_square = self._reference(), self._slice_square[places]
        found = inner_products(samples, reference, slice_square, self._with_influence)
        if self._with_left_out:
            if self._wholes is None:
                self._wholes = whole_sums(reference)
            count = reference.sums.task_count
            shares = (1 / count / (count > 0).sum())[self._deal.task_indices[places]].to(block)
            found["left_out"] = interference_left_out(samples, reference, slice_square, shares, self._wholes)
        self._keep(found, places)

    def compared(self) -> None:
        """All samples are compared: free what only that needs."""
        self._wholes = None
        self._sums.drop_magnitudes()

    def weigh(self, block: Float[Tensor, "some head weight"], where: Int[Tensor, some]) -> None:
        """Take some samples, which were compared, into the means of a gradient times its response."""
        samples, places = self._of(block, where)
        if self._weighted is None:
            sums = self._sums
            self._weighted = sums.each.new_zeros(2, self._deal.num_tasks, *sums.square.shape)
        terms = self._deal.num_terms[places][:, None, None, None]
        responses = (self._per_sample["half_responses"][places] * terms).to(block)
        add_weighted_gradients(self._weighted, samples, responses, self._sums.task_count)

    def derive(self, block: Float[Tensor, "some head weight"], where: Int[Tensor, some]) -> None:
        """Tell what some samples move the curvature by, once all samples were weighed.

        Raises:
            ValueError: If none was.
        """
        if self._weighted is None:
            raise ValueError("No sample was weighed, which the curvature is made of.")
        samples, places = self._of(block, where)
        reference, slice_square = self._reference(), self._slice_square[places]
        influence = curvature_influence(samples, reference, slice_square, self._weighted)
        self._keep({"curvature_influence": influence}, places)

    def statistics(self, dropped: Float[Tensor, "sample group"] | None = None) -> SliceStatistics:
        """The statistics of all samples that came and belong to a task, in the order of their places.

        Args:
            dropped: 1 where a replicate leaves a sample out, if replicates are wanted.
        """
        kept = self.places
        found = {name: values[kept] for name, values in self._per_sample.items()}
        found.setdefault("curvature_influence", torch.zeros_like(found["sensitivity"]))
        membership = torch.nn.functional.one_hot(self._deal.task_indices[kept], self._deal.num_tasks).T
        return SliceStatistics(
            membership=membership.double(),
            left_out=found.pop("left_out", None),
            **found,
            groups=self._deal.groups[kept],
            num_terms=self._deal.num_terms[kept],
            step_size=self._step_size,
            dropped=None if dropped is None else dropped[kept],
        )

    @property
    def places(self) -> Int[Tensor, kept]:
        """Places of the samples that came and belong to a task."""
        return self._seen.nonzero().flatten()

    @property
    def _slice_square(self) -> Float[Tensor, "sample head"]:
        return self._per_sample["squared_norm"] / self._sums.each.shape[1]

    def _reference(self) -> Reference:
        """What samples are compared with, made of the sums for a few samples at a time and not kept."""
        if self._own_square is None:
            indices = self._deal.task_indices.clamp(min=0)
            member = torch.nn.functional.one_hot(indices, self._deal.num_tasks).T.double() * self._seen
            self._own_square = member @ self._slice_square / self._sums.task_count.clamp(min=1)[:, None]
        fisher = self._sums.plain_fisher()
        return Reference.of(self._sums, self._own_square, fisher, self._damping, self._update)

    def _of(self, block: Tensor, where: Int[Tensor, some]) -> tuple[SamplesByTask, Int[Tensor, kept]]:
        """Some samples by task, and their places among all."""
        deal = self._deal
        samples = SamplesByTask(
            [block], deal.task_indices[where], deal.num_tasks, block.shape[2], deal.halves[where]
        )
        return samples, where[samples.order]

    def _keep(self, values: dict[str, Tensor], places: Int[Tensor, kept]) -> None:
        for name, value in values.items():
            if name not in self._per_sample:
                shape = (len(self._deal.task_indices), *value.shape[1:])
                self._per_sample[name] = value.new_zeros(shape)
            self._per_sample[name][places] = value
