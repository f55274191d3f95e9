"""Gradients on their way from captured steps to a reduction, those of small steps together.

What all samples are compared with is made anew for every few that come at once. So they wait for each other,
as factors, which are smaller than gradients. How many wait depends on the heads and the steps alone, not on
which heads are swept along: so does the order of every sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.gradients import BLOCK_BYTES, owned_gradients
from qkov_lightning.measure.allotment import WAITING, SweptHeads
from qkov_lightning.measure.passes import without_autocast

STAGGERED = 8
"""Layers that do not hand over at the same time: not all of them hold most at once."""


@dataclass(eq=False)
class _Line:
    """What waits for the same heads: steps, and the places of their first samples.

    Attributes:
        max_bytes: What the steps take at most.
        max_samples: Samples that are summed at a time.
    """

    max_bytes: float
    max_samples: float
    steps: list[tuple[int, CapturedStep]] = field(default_factory=list)
    num_samples: int = 0
    num_bytes: int = 0


class WaitingGradients:
    """Hands the gradients of some heads to a reduction, as many samples at a time as are worth it.

    Args:
        heads: The heads, by their place in a sweep.
        reduce: Takes the place of some heads, gradients, and the places of their samples.
        device: Where the arithmetic runs.
    """

    def __init__(
        self,
        heads: Mapping[int, SweptHeads],
        reduce: Callable[[int, Tensor, Tensor], None],
        device: torch.device,
    ) -> None:
        self._heads, self._reduce, self._device = heads, reduce, device
        self._lines: dict[int, _Line] = {}
        self._memory = torch.empty(0)

    def take(self, first: int, step: CapturedStep) -> None:
        """Take the gradients of a step.

        Args:
            first: Place of its first sample among all.
            step: The step.
        """
        for place, heads in self._heads.items():
            name = heads.projection.module_name
            if name not in step.factors:
                continue
            num_bytes, num_samples = heads.factor_bytes(step), len(step.samples)
            if place not in self._lines:
                self._lines[place] = self._line(heads, (heads.projection.layer % STAGGERED + 1) / STAGGERED)
            line = self._lines[place]
            is_full = (
                line.num_bytes + num_bytes > line.max_bytes
                or line.num_samples + num_samples > line.max_samples
            )
            if line.steps and is_full:
                self._hand_over(place)
                line = self._lines[place]
            line.steps.append((first, replace(step, factors={name: step.factors[name]})))
            line.num_bytes += num_bytes
            line.num_samples += num_samples
            if line.num_bytes > line.max_bytes:
                self._hand_over(place)

    def flush(self) -> None:
        """Hand over what waits."""
        with torch.no_grad(), without_autocast(self._device):
            for place in sorted(self._lines):
                self._hand_over(place)

    def _line(self, heads: SweptHeads, share: float = 1.0) -> _Line:
        room = BLOCK_BYTES // (heads.size * 4)
        return _Line(share * WAITING * heads.size * 4, share * room)

    def _hand_over(self, place: int) -> None:
        line, heads = self._lines[place], self._heads[place]
        self._lines[place] = self._line(heads)
        if len(line.steps) == 1:
            first, step = line.steps[0]
            for start, block in heads.blocks(step, self._device):
                self._reduce(place, block, self._places(first + start, len(block)))
        elif line.steps:
            block = self._gradients(heads, line)
            where = [self._places(first, len(step.samples)) for first, step in line.steps]
            self._reduce(place, block, torch.cat(where))

    def _gradients(self, heads: SweptHeads, line: _Line) -> Float[Tensor, "sample head weight"]:
        """Of all that wait, in memory that is the same every time."""
        size, start = line.num_samples * heads.size, 0
        for _, step in line.steps:
            part = heads.part(step, self._device)
            if self._memory.numel() < size or self._memory.dtype != part.grad_output.dtype:
                self._memory = part.grad_output.new_empty(size)
            block = self._memory[:size].view(line.num_samples, *heads.shape)
            owned_gradients(part, out=block[start : start + len(step.samples)])
            start += len(step.samples)
        return block.view(line.num_samples, heads.projection.num_heads, -1)

    def _places(self, first: int, count: int) -> Tensor:
        return torch.arange(first, first + count, device=self._device)
