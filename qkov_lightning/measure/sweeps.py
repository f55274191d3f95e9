r"""A probe that streams: passes over its samples, in which every gradient is summed or compared and forgotten.

The first pass sums the gradients of each task, the second takes the products of each sample with these sums,
and the third, where errors come from what each sample moves, the products with the responses of the second.
Only the sums have the size of the weights. As many heads as ``max_bytes`` holds the sums of are swept at a
time, the topmost layers first, so that their backward passes end early.

The errors of a heatmap come from replicates, each without one group of samples:

- exact: every replicate has sums of its own, from which its group is missing, and a Fisher of its own;
- linear: what a group moves a score by, summed over its samples. Interference and ``relative`` take the exact
  change by each sample, with the Fisher of the rest; the other scores its derivative.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.gradients import owned_gradients, owned_part, select_samples
from qkov_lightning.heads.inspection import module_sizes
from qkov_lightning.heads.projections import BLOCKS, Projection
from qkov_lightning.measure.jackknife import left_out_together, unit_numbers
from qkov_lightning.measure.passes import ProbePasses, ProbeSamples
from qkov_lightning.scores.reduction import MAX_TASKS_IN_FISHER, SliceReduction
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.scores.statistics import SliceStatistics
from qkov_lightning.store.streaming import SUMMED_BYTES, restricted

BLOCK_BYTES = 64 * 2**20
"""Per-sample gradients that are in memory at once."""

Replicates = Literal["exact", "linear"]
"""How the replicates are made that the standard errors come from."""


@dataclass(frozen=True, eq=False)
class SweptHeads:
    """Some heads of a projection, and what was found of them.

    Attributes:
        projection: The heads.
        first_head: The first of them, among the projection's.
        num_weights: Weights of one head.
    """

    projection: Projection
    first_head: int
    num_weights: int

    @property
    def size(self) -> int:
        """Weights of all heads."""
        return self.projection.num_heads * self.num_weights


@dataclass(frozen=True, eq=False)
class Found:
    """Scores of some heads.

    Attributes:
        layer: Their layer.
        block: Place of their block in ``BLOCKS``.
        first_head: The first of them.
        num_samples: Samples of each task.
        values: Scores by name.
        variances: Sampling variances of the scores, in which all samples count as independent.
        replicates: Scores without each group of samples.
    """

    layer: int
    block: int
    first_head: int
    num_samples: Float[Tensor, task]
    values: dict[str, Float[Tensor, "task_a task_b head"]]
    variances: dict[str, Float[Tensor, "task_a task_b head"]]
    replicates: dict[str, Float[Tensor, "group task_a task_b head"]]


def heads_of(model: nn.Module, projections: Sequence[Projection], itemsize: int) -> list[SweptHeads]:
    """All heads, a few megabytes of weights together, those of the last layers first."""
    result = []
    for projection in sorted(projections, key=lambda one: (-one.layer, BLOCKS.index(one.block))):
        inputs, outputs = module_sizes(model, projection.module_name)
        num_weights = projection.head_dim * (outputs if projection.block == "O" else inputs)
        together = max(1, SUMMED_BYTES // (num_weights * itemsize))
        for first in range(0, projection.num_heads, together):
            heads = restricted(projection, slice(first, first + together))
            result.append(SweptHeads(heads, first, num_weights))
    return result


def numbers_per_weight(num_tasks: int, replicates: Replicates, num_groups: int) -> int:
    """Sums that a streamed probe keeps of every weight.

    Exact replicates: of each task the gradients of both halves, their magnitudes and their squares, once for
    all samples and once without each group. Linear ones: the same once, the cubes, and for each ordered pair
    of tasks a sum for each half.
    """
    if replicates == "exact":
        return 4 * num_tasks * (1 + num_groups)
    cubes = num_tasks if num_tasks <= MAX_TASKS_IN_FISHER else 0
    return 4 * num_tasks + cubes + 2 * num_tasks**2


def split_into_sweeps(heads: Sequence[SweptHeads], max_weights: int) -> list[list[SweptHeads]]:
    """As many heads at a time as fit.

    Raises:
        ValueError: If some do not fit alone.
    """
    sweeps: list[list[SweptHeads]] = []
    room = 0
    for some in heads:
        if some.size > max_weights:
            raise ValueError(
                f"max_memory_gb holds the sums of {max_weights:,} weights at a time, expected at least {some.size:,}, "
                f"those of {some.projection.num_heads} heads of `{some.projection.module_name}`. Raise max_memory_gb."
            )
        if some.size > room:
            sweeps.append([])
            room = max_weights
        sweeps[-1].append(some)
        room -= some.size
    return sweeps


class ProbeSweeps:
    """The sweeps over a probe that measure some projections.

    Args:
        passes: Runs the model.
        samples: Who the samples are.
        settings: What the scores depend on.
        replicates: How replicates are made; None for no replicates.
        num_groups: Groups of samples that replicates leave out.
    """

    def __init__(
        self,
        passes: ProbePasses,
        samples: ProbeSamples,
        settings: ScoreSettings,
        replicates: Replicates | None,
        num_groups: int,
    ) -> None:
        self._passes, self._settings, self._kind = passes, settings, replicates
        device = passes.device
        self.tasks = sorted(set(samples.tasks))
        self._indices = torch.tensor([self.tasks.index(task) for task in samples.tasks], device=device)
        units = unit_numbers(samples.tasks, samples.ids, samples.groups)
        self._groups = units.to(device)
        self._num_terms = torch.ones(len(samples), dtype=torch.float64, device=device)
        self._dropped: Int[Tensor, sample] | None = None
        if replicates is not None:
            self._dropped = left_out_together(samples.tasks, samples.groups, num_groups).to(device)
        self._num_groups = num_groups

    def measure(self, sweeps: Sequence[Sequence[SweptHeads]]) -> tuple[list[Found], set[int]]:
        """The scores of all heads, and the batches in which none of them took part."""
        found: list[Found] = []
        unseen: set[int] | None = None
        began = time.monotonic()
        for number, sweep in enumerate(sweeps):
            reductions: dict[int, list[SliceReduction]] = {}
            stages = ["add", "compare"] + (["derive"] if self._kind != "exact" else [])
            for stage in stages:
                missed = self._passes.run(
                    [heads.projection for heads in sweep], self._visitor(sweep, reductions, stage)
                )
                if stage == "add":
                    unseen = missed if unseen is None else unseen & missed
                if stage == "add" and not number and len(sweeps) > 1:
                    minutes = (time.monotonic() - began) * len(sweeps) * len(stages) / 60
                    rank_zero_info(f"Probe: the first of {len(sweeps) * len(stages)} passes is done; about "
                                   f"{minutes:.3g} minutes in all.")  # fmt: skip
            for place, heads in enumerate(sweep):
                if place in reductions:
                    found.append(self._found(heads, reductions.pop(place)))
        return found, unseen or set()

    def _visitor(
        self, sweep: Sequence[SweptHeads], reductions: dict[int, list[SliceReduction]], stage: str
    ) -> Callable[[int, CapturedStep], None]:
        def visit(first: int, step: CapturedStep) -> None:
            self._num_terms[first : first + len(step.samples)] = step.num_terms.to(self._num_terms)
            for place, heads in enumerate(sweep):
                if heads.projection.module_name not in step.factors:
                    continue
                for start, block in _blocks(heads, step, self._passes.device):
                    if place not in reductions:
                        reductions[place] = self._open(block)
                    for reduction in reductions[place]:
                        getattr(reduction, stage)(block, first + start)

        return visit

    def _open(self, block: Float[Tensor, "sample head weight"]) -> list[SliceReduction]:
        """The reduction of all samples, and those without each group."""
        everyone = [(self._indices, self._groups)]
        if self._kind == "exact" and self._dropped is not None:
            alone = torch.arange(len(self._indices), device=self._indices.device)
            everyone += [
                (self._indices.masked_fill(self._dropped == group, -1), alone)
                for group in range(self._num_groups)
            ]
        settings = self._settings
        return [
            SliceReduction(
                indices, len(self.tasks), groups, self._num_terms, block.new_ones(()).expand(block.shape[1:]),
                settings.damping, settings.update, settings.step_size, with_influence=self._kind != "exact",
            )
            for indices, groups in everyone
        ]  # fmt: skip

    def _found(self, heads: SweptHeads, reductions: Sequence[SliceReduction]) -> Found:
        dropped = None
        if self._kind == "linear" and self._dropped is not None:
            dropped = torch.nn.functional.one_hot(self._dropped, self._num_groups).double()
        whole, *others = [reduction.statistics(dropped) for reduction in reductions]
        values, variances, replicates = {}, {}, {}
        for name, score in SCORES.items():
            estimate = score.function(whole)
            values[name], variances[name] = estimate.value.cpu(), estimate.variance.cpu()
            if others:
                replicates[name] = torch.stack([score.function(other).value.cpu() for other in others])
            elif estimate.replicates is not None:
                replicates[name] = estimate.replicates.cpu()
        return Found(
            heads.projection.layer, BLOCKS.index(heads.projection.block), heads.first_head, whole.count.cpu(),
            values, variances, replicates,
        )  # fmt: skip


def _blocks(
    heads: SweptHeads, step: CapturedStep, device: torch.device
) -> Iterator[tuple[int, Float[Tensor, "sample head weight"]]]:
    """Gradients of a step at some heads, a few samples at a time, and the first of these."""
    projection = heads.projection
    part = owned_part(step.factors[projection.module_name], projection, step.scales, device)
    together = max(1, BLOCK_BYTES // (heads.size * 4))
    for start in range(0, len(step.samples), together):
        gradients = owned_gradients(select_samples(part, start, min(start + together, len(step.samples))))
        yield start, gradients.view(len(gradients), projection.num_heads, -1)
