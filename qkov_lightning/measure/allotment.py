"""How many heads of a probe are measured at a time: what their sums take, and what memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qkov_lightning.capture.factors import CapturedStep
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

    def blocks(
        self, step: CapturedStep, device: torch.device
    ) -> Iterator[tuple[int, Float[Tensor, "sample head weight"]]]:
        """Gradients of a step, a few samples at a time, and the first of these."""
        factors = step.factors[self.projection.module_name]
        part = owned_part(factors, self.projection, step.scales, device)
        return gradient_blocks(part, self.projection.num_heads)


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
