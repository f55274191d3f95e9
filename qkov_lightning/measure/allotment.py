"""How many heads of a probe are measured at a time: what their sums take, and what memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import gradient_blocks, owned_part
from qkov_lightning.heads.maps import find_map
from qkov_lightning.heads.projections import BLOCKS, Projection
from qkov_lightning.scores.reduction import MAX_TASKS_IN_FISHER
from qkov_lightning.store.streaming import SUMMED_BYTES, restricted

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

    @property
    def shape(self) -> tuple[int, int]:
        """Features that all heads own, and those of the other side."""
        own = self.projection.head_features.numel()
        return own, self.size // own

    def factor_bytes(self, step: CapturedStep) -> int:
        """What these heads keep of a step as long as its gradients are not formed."""
        activation = step.factors[self.projection.module_name].activation
        return len(activation) * sum(self.shape) * activation.element_size()

    def part(self, step: CapturedStep, device: torch.device) -> GradientFactors:
        """What these heads own of a step."""
        factors = step.factors[self.projection.module_name]
        return owned_part(factors, self.projection, step.scales, device)

    def blocks(
        self, step: CapturedStep, device: torch.device
    ) -> Iterator[tuple[int, Float[Tensor, "sample head weight"]]]:
        """Gradients of a step, a few samples at a time, and the first of these."""
        return gradient_blocks(self.part(step, device), self.projection.num_heads)


def heads_of(model: nn.Module, projections: Sequence[Projection], itemsize: int) -> list[SweptHeads]:
    """All heads, a few megabytes of weights together, those of the last layers first."""
    result = []
    for projection in sorted(projections, key=lambda one: (-one.layer, BLOCKS.index(one.block))):
        one = find_map(model, projection)
        num_weights = projection.head_dim * (one.num_outputs if projection.block == "O" else one.num_inputs)
        together = max(1, SUMMED_BYTES // (num_weights * itemsize))
        for first in range(0, projection.num_heads, together):
            heads = restricted(projection, slice(first, first + together))
            result.append(SweptHeads(heads, first, num_weights))
    return result


Stage = Literal["add", "compare", "weigh", "derive"]
"""What a pass over the samples does, see :class:`~qkov_lightning.scores.reduction.SliceReduction`."""

WAITING = 4
"""Numbers per weight that gradients take at most while they wait for each other."""


def numbers_per_weight(num_tasks: int, stages: Sequence[Stage], num_groups: int = 0) -> int:
    """Numbers that a streamed probe keeps of every weight in a pass, those of waiting gradients included.

    Of each task the gradients of both halves and their squares. To add and to compare samples, their
    magnitudes, too, and for the errors the cubes of these. To weigh samples and to derive, for each ordered
    pair of tasks a sum for each half.

    Args:
        num_tasks: Number of tasks.
        stages: What the pass does.
        num_groups: Groups that exact replicates leave out: the sums are kept once for all samples and once
            without each group. Without them, replicates are linear.
    """
    numbers = 3 * num_tasks
    if {"add", "compare"} & set(stages):
        with_cubes = not num_groups and num_tasks <= MAX_TASKS_IN_FISHER
        numbers += 2 * num_tasks if with_cubes else num_tasks
    if {"weigh", "derive"} & set(stages):
        numbers += 2 * num_tasks**2
    return WAITING + numbers * (1 + num_groups)


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass over the samples does.

    Attributes:
        stages: What becomes of the heads that take part, by their place in the sweep.
        numbers: Numbers that it keeps of their weights, of all together.
    """

    stages: Mapping[int, tuple[Stage, ...]]
    numbers: int


@dataclass(frozen=True, eq=False)
class Sweep:
    """Heads that are measured at a time, and how.

    Attributes:
        heads: The heads, topmost layers first.
        passes: The passes over the samples.
    """

    heads: Sequence[SweptHeads]
    passes: Sequence[Pass]


@dataclass(frozen=True, eq=False)
class Plan:
    """In which passes over the samples heads are measured.

    Where memory allows, samples are weighed as soon as they are compared, in three passes. Otherwise those of
    some heads are weighed when comparing is done, and what only that needs is free again. These are the
    topmost ones, whose backward passes end early, since they take a fourth pass.

    Attributes:
        sweeps: One after the other.
    """

    sweeps: Sequence[Sweep]

    @classmethod
    def of(
        cls,
        heads: Sequence[SweptHeads],
        num_tasks: int,
        replicates: Replicates,
        num_groups: int,
        max_numbers: int,
    ) -> Plan:
        """The plan of the fewest passes.

        Args:
            heads: What is measured.
            num_tasks: Number of tasks.
            replicates: How replicates are made.
            num_groups: Groups that exact ones leave out.
            max_numbers: Numbers that fit into memory.

        Raises:
            ValueError: If some heads do not fit alone.
        """

        def numbers(*stages: Stage) -> int:
            return numbers_per_weight(num_tasks, stages, num_groups if replicates == "exact" else 0)

        def swept(own: Sequence[SweptHeads], rows: Sequence[Mapping[int, tuple[Stage, ...]]]) -> Sweep:
            kept = (sum(own[place].size * numbers(*stages) for place, stages in row.items()) for row in rows)
            return Sweep(own, list(map(Pass, rows, kept)))

        if replicates == "exact":
            stages: tuple[Stage, ...] = ("add", "compare")
            parts = split_into_sweeps(heads, max_numbers // numbers("compare"))
            return cls([
                swept(own, [dict.fromkeys(range(len(own)), (one,)) for one in stages]) for own in parts
            ])
        least = max(numbers("compare"), numbers("derive"))
        plans = []
        for most in (numbers("compare", "weigh"), least):
            if most == least or all(one.size * most <= max_numbers for one in heads):
                parts = split_into_sweeps(heads, max_numbers // most)
                plans.append(cls([swept(own, _three_or_four(own, numbers, max_numbers)) for own in parts]))
        return min(plans, key=lambda plan: plan.num_passes)

    @property
    def num_passes(self) -> int:
        """Passes over the samples, of all sweeps."""
        return sum(len(sweep.passes) for sweep in self.sweeps)

    @property
    def max_numbers(self) -> int:
        """Numbers that the largest pass keeps."""
        return max((one.numbers for sweep in self.sweeps for one in sweep.passes), default=0)

    def __str__(self) -> str:
        return (
            f"{len(self.sweeps)} {'sweep' if len(self.sweeps) == 1 else 'sweeps'}, {self.num_passes} passes"
        )


def _three_or_four(
    heads: Sequence[SweptHeads], numbers: Callable[..., int], max_numbers: int
) -> list[dict[int, tuple[Stage, ...]]]:
    """The passes of a sweep with linear replicates, with as few heads in the fourth as memory allows."""
    left = max_numbers - sum(one.size for one in heads) * numbers("compare", "weigh")
    saved = numbers("compare", "weigh") - numbers("compare")
    num_late = 0
    while left < 0:
        left += heads[num_late].size * saved
        num_late += 1
    late, early = range(num_late), range(num_late, len(heads))
    passes: list[dict[int, tuple[Stage, ...]]] = [
        dict.fromkeys(range(len(heads)), ("add",)),
        {**dict.fromkeys(late, ("compare",)), **dict.fromkeys(early, ("compare", "weigh"))},
        {**dict.fromkeys(late, ("weigh",)), **dict.fromkeys(early, ("derive",))},
        dict.fromkeys(late, ("derive",)),
    ]
    return [one for one in passes if one]


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
