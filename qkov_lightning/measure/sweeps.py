r"""A probe that streams: passes over its samples, which sum or compare every gradient and forget it.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.allotment import Replicates, SweptHeads
from qkov_lightning.measure.cells import Cell, SamplePair
from qkov_lightning.measure.jackknife import left_out_together, unit_numbers
from qkov_lightning.measure.pairs import pairs_of_head
from qkov_lightning.measure.passes import ProbePasses, ProbeSamples, without_autocast
from qkov_lightning.scores.reduction import Deal, SliceReduction
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.scores.statistics import SliceStatistics


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


class ProbeSweeps:
    """The sweeps over a probe that measure some projections.

    Args:
        passes: Runs the model.
        samples: Who the samples are.
        settings: What the scores depend on.
        replicates: How replicates are made; None for no replicates.
        num_groups: Groups of samples that replicates leave out.
        together: Samples whose gradients may wait for each other, so that they are summed at once.
    """

    def __init__(
        self,
        passes: ProbePasses,
        samples: ProbeSamples,
        settings: ScoreSettings,
        replicates: Replicates | None,
        num_groups: int,
        together: int,
    ) -> None:
        self._passes, self._settings, self._together = passes, settings, together
        self._num_batches, self._with_influence = len(samples.steps), replicates != "exact"
        device = passes.summing_device
        tasks = sorted(set(samples.tasks))
        indices = torch.tensor([tasks.index(task) for task in samples.tasks], device=device)
        units = unit_numbers(samples.tasks, samples.ids, samples.groups).to(device)
        self._num_terms = torch.ones(len(samples), dtype=torch.float64, device=device)
        self._deals = [Deal.of(indices, units, self._num_terms, len(tasks))]
        self._dropped: Float[Tensor, "sample group"] | None = None
        if replicates is not None:
            groups = left_out_together(samples.tasks, samples.groups, num_groups).to(device)
            if replicates == "linear":
                self._dropped = torch.nn.functional.one_hot(groups, num_groups).double()
            else:
                alone = torch.arange(len(indices), device=device)
                others = (indices.masked_fill(groups == one, -1) for one in range(num_groups))
                self._deals += [Deal.of(some, alone, self._num_terms, len(tasks)) for some in others]

    def measure(self, sweeps: Sequence[Sequence[SweptHeads]]) -> tuple[list[Found], set[int]]:
        """The scores of all heads, and the batches in which none of them took part."""
        found: list[Found] = []
        unseen = set(range(self._num_batches))
        began = time.monotonic()
        stages = ["add", "compare", *(["derive"] if self._with_influence else [])]
        for number, sweep in enumerate(sweeps):
            reductions: dict[int, list[SliceReduction]] = {}
            for stage in stages:
                reduce = partial(self._reduce, reductions, stage)
                stream = _Stream(sweep, reduce, self._together, self._passes.summing_device)
                missed = self._passes.run([heads.projection for heads in sweep], partial(self._visit, stream))
                stream.flush()
                unseen -= set(range(self._num_batches)) - missed
                if number == 0 and stage == "add" and len(sweeps) > 1:
                    minutes = (time.monotonic() - began) * len(sweeps) * len(stages) / 60
                    rank_zero_info(f"Probe: the first of {len(sweeps) * len(stages)} passes is done; about "
                                   f"{minutes:.3g} minutes in all.")  # fmt: skip
            found += self._found(sweep, reductions)
        return found, unseen

    def _visit(self, stream: _Stream, first: int, step: CapturedStep) -> None:
        self._num_terms[first : first + len(step.samples)] = step.num_terms.to(self._num_terms)
        stream.take(first, step)

    def _reduce(
        self,
        reductions: dict[int, list[SliceReduction]],
        stage: str,
        place: int,
        block: Float[Tensor, "some head weight"],
        where: Int[Tensor, some],
    ) -> None:
        """Hand some gradients to the reduction of all samples, and to those without each group."""
        if place not in reductions:
            settings, ones = self._settings, block.new_ones(()).expand(block.shape[1:])
            reductions[place] = [
                SliceReduction(
                    deal, ones, settings.damping, settings.update, settings.step_size, self._with_influence
                )
                for deal in self._deals
            ]
        for reduction in reductions[place]:
            getattr(reduction, stage)(block, where)

    def _found(
        self, sweep: Sequence[SweptHeads], reductions: dict[int, list[SliceReduction]]
    ) -> Iterator[Found]:
        """The scores, of all heads that saw the same samples at once."""
        alike: dict[tuple[int, ...], list[int]] = {}
        statistics = {}
        for place in sorted(reductions):
            own = reductions.pop(place)
            alike.setdefault(tuple(own[0].places.tolist()), []).append(place)
            statistics[place] = [one.statistics(self._dropped) for one in own]
        for places in alike.values():
            whole, *others = [
                SliceStatistics.side_by_side(parts)
                for parts in zip(*(statistics.pop(place) for place in places), strict=True)
            ]
            values, variances, replicates = {}, {}, {}
            for name, score in SCORES.items():
                estimate = score.function(whole)
                values[name], variances[name] = estimate.value.cpu(), estimate.variance.cpu()
                if others:
                    replicates[name] = torch.stack([score.function(other).value.cpu() for other in others])
                elif estimate.replicates is not None:
                    replicates[name] = estimate.replicates.cpu()
            start = 0
            for place in places:
                heads = sweep[place]
                part = slice(start, start + heads.projection.num_heads)
                yield Found(
                    heads.projection.layer,
                    BLOCKS.index(heads.projection.block),
                    heads.first_head,
                    whole.count.cpu(),
                    *(
                        {name: every[..., part] for name, every in one.items()}
                        for one in (values, variances, replicates)
                    ),
                )
                start = part.stop


class _Stream:
    """Gradients on their way from captured steps to a reduction, those of small steps together.

    How many wait for each other depends on the model alone, so that the order of every sum does, too.

    Args:
        sweep: The heads.
        reduce: Takes the place of some heads in the sweep, gradients, and the places of their samples.
        together: Samples that may wait for each other.
        device: Where the arithmetic runs.
    """

    def __init__(
        self,
        sweep: Sequence[SweptHeads],
        reduce: Callable[[int, Tensor, Tensor], None],
        together: int,
        device: torch.device,
    ) -> None:
        self._sweep, self._reduce, self._together, self._device = sweep, reduce, together, device
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._num_waiting = 0

    def take(self, first: int, step: CapturedStep) -> None:
        """Take the gradients of a step."""
        if self._num_waiting + len(step.samples) > self._together:
            self.flush()
        waits = len(step.samples) <= self._together
        self._num_waiting += len(step.samples) if waits else 0
        for place, heads in enumerate(self._sweep):
            if heads.projection.module_name in step.factors:
                for start, block in heads.blocks(step, self._device):
                    where = torch.arange(first + start, first + start + len(block), device=self._device)
                    if waits:
                        self._waiting.setdefault(place, []).append((block, where))
                    else:
                        self._reduce(place, block, where)

    def flush(self) -> None:
        """Hand over what waits."""
        for place in sorted(self._waiting):
            blocks, where = zip(*self._waiting.pop(place), strict=True)
            with torch.no_grad(), without_autocast(self._device):
                self._reduce(place, torch.cat(blocks), torch.cat(where))
        self._num_waiting = 0


def held_pairs(
    passes: ProbePasses,
    samples: ProbeSamples,
    wanted: Sequence[tuple[SweptHeads, Sequence[Cell]]],
    settings: ScoreSettings,
) -> list[SamplePair]:
    """The sample pairs of the most harm in the cells of some heads, whose gradients are held in memory."""
    held: dict[int, Tensor] = {}
    seen = torch.zeros(len(wanted), len(samples), dtype=torch.bool)

    def visit(first: int, step: CapturedStep) -> None:
        for place, (heads, _) in enumerate(wanted):
            if heads.projection.module_name not in step.factors:
                continue
            for start, block in heads.blocks(step, passes.summing_device):
                if place not in held:
                    held[place] = block.new_zeros(len(samples), heads.num_weights)
                rows = slice(first + start, first + start + len(block))
                held[place][rows], seen[place, rows] = block[:, 0], True

    passes.run([heads.projection for heads, _ in wanted], visit)
    pairs: list[SamplePair] = []
    for place, (heads, cells) in enumerate(wanted):
        rows = seen[place].nonzero().flatten().tolist()
        tasks, ids, texts = (
            [values[row] for row in rows] for values in (samples.tasks, samples.ids, samples.texts)
        )
        own = held.pop(place)[rows]
        pairs += pairs_of_head(heads.projection, cells, own, tasks, ids, texts, settings)
    return pairs
