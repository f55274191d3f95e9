r"""A probe that streams: passes over its samples, which sum or compare every gradient and forget it.

The first pass sums the gradients of each task, the second takes the products of each sample with these sums,
and the last, where errors come from what each sample moves, the products with the responses of the second.
Only the sums have the size of the weights. As many heads as fit into memory are swept at a time, the topmost
layers first, so that their backward passes end early.

The errors of a heatmap come from replicates, each without one group of samples:

- exact: every replicate has sums of its own, from which its group is missing, and a Fisher of its own;
- linear: what a group moves a score by, summed over its samples. Interference and ``relative`` take the exact
  change by each sample, with the Fisher of the rest; the other scores its derivative.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.heads.projections import BLOCKS, Projection
from qkov_lightning.measure.allotment import Pass, Plan, Replicates, Stage, SweptHeads
from qkov_lightning.measure.held import HeldGradients, HotHead
from qkov_lightning.measure.jackknife import left_out_together, unit_numbers
from qkov_lightning.measure.memory import release
from qkov_lightning.measure.passes import ProbePasses, ProbeSamples
from qkov_lightning.measure.waiting import WaitingGradients
from qkov_lightning.scores.reduction import Deal, SliceReduction
from qkov_lightning.scores.scores import HARM, SCORES
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


@dataclass(frozen=True, eq=False)
class Measured:
    """What the sweeps found.

    Attributes:
        found: Scores of all heads.
        unseen: Batches in which none of them took part.
        held: Gradients of the heads that were chosen.
    """

    found: list[Found]
    unseen: set[int]
    held: HeldGradients | None


Choose = Callable[[list[Found], Pass], list[HotHead]]
"""Takes scores and a pass, and gives the heads whose gradients that pass shall hold."""


class ProbeSweeps:
    """The sweeps over a probe that measure some projections.

    Args:
        passes: Runs the model.
        projections: All that have gradients.
        samples: Who the samples are.
        settings: What the scores depend on.
        replicates: How replicates are made; None for no replicates.
        num_groups: Groups of samples that replicates leave out.
    """

    def __init__(
        self,
        passes: ProbePasses,
        projections: Sequence[Projection],
        samples: ProbeSamples,
        settings: ScoreSettings,
        replicates: Replicates | None,
        num_groups: int,
    ) -> None:
        self._passes, self._projections, self._settings = passes, projections, settings
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

    def measure(self, plan: Plan, choose: Choose | None = None) -> Measured:
        """The scores of all heads.

        Args:
            plan: Which heads are swept in which passes.
            choose: Takes the scores before samples are derived, with errors that miss what only that tells,
                and that pass; gives the heads whose gradients the pass shall hold.
        """
        found: list[Found] = []
        held: HeldGradients | None = None
        unseen = set(range(self._num_batches))
        release()
        began, num_done = time.monotonic(), 0
        for sweep in plan.sweeps:
            reductions: dict[int, list[SliceReduction]] = {}
            for one in sweep.passes:
                holds = held is None and sweep is plan.sweeps[-1] and ("derive",) in one.stages.values()
                if choose and holds:
                    harm = self._found(sweep.heads, dict(reductions), [HARM])
                    wanted = choose([*found, *harm], one)
                    held = HeldGradients(wanted, len(self._num_terms), self._passes.summing_device)
                unseen &= self._pass(sweep.heads, one, reductions, held if holds else None)
                num_done += 1
                if num_done == 1 and len(plan.sweeps) > 1:
                    minutes = (time.monotonic() - began) * plan.num_passes / 60
                    rank_zero_info(f"Probe: the first of {plan.num_passes} passes is done; about {minutes:.3g} "
                                   "minutes in all.")  # fmt: skip
            found += self._found(sweep.heads, reductions)
        return Measured(found, unseen, held)

    def _pass(
        self,
        heads: Sequence[SweptHeads],
        one: Pass,
        reductions: dict[int, list[SliceReduction]],
        held: HeldGradients | None,
    ) -> set[int]:
        """One pass over the samples; the batches in which none of the heads took part."""
        active = {place: heads[place] for place in one.stages}
        reduce = partial(self._reduce, reductions, one.stages)
        waiting = WaitingGradients(active, reduce, self._passes.summing_device)

        def visit(first: int, step: CapturedStep) -> None:
            self._num_terms[first : first + len(step.samples)] = step.num_terms.to(self._num_terms)
            waiting.take(first, step)
            if held:
                held.take(first, step)

        captured = [*active.values(), *(held.heads if held else ())]
        missed = self._passes.run(same_layers(self._projections, captured), visit)
        waiting.flush()
        if any("compare" in stages for stages in one.stages.values()):
            for reduction in itertools.chain.from_iterable(reductions.values()):
                reduction.compared()
        release()
        return missed

    def _reduce(
        self,
        reductions: dict[int, list[SliceReduction]],
        stages: Mapping[int, tuple[Stage, ...]],
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
            for stage in stages[place]:
                getattr(reduction, stage)(block, where)

    def _found(
        self,
        sweep: Sequence[SweptHeads],
        reductions: dict[int, list[SliceReduction]],
        scores: Iterable[str] = SCORES,
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
            for name in scores:
                score = SCORES[name]
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


def same_layers(projections: Sequence[Projection], heads: Iterable[SweptHeads]) -> list[Projection]:
    """All projections of the layers of some heads.

    Which tokens of an input add nothing depends on who else reads it. So that the gradients of a head have
    the same bits in every pass, those of its whole layer are captured along with them.
    """
    layers = {one.projection.layer for one in heads}
    return [one for one in projections if one.layer in layers]
