r"""Which samples are left out together: standard errors that hold where one sample can carry a whole cell.

The standard errors of the scores themselves are linear in each sample and take the Fisher as known. A sample
that dominates its task's gradients moves the Fisher with it, and a ratio that it saturates no longer feels
it: such errors come out several times too small. Leaving samples out shows what they carry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.capture.samples import Samples

MAX_GROUPS = 16
"""Groups of samples that the standard errors of a probe are made of."""

DIGITS = 6
"""Significant digits of a replicate: far more than a standard error has, and a small file."""


def num_groups_of(samples: Iterable[Samples]) -> int:
    """How many groups the task with the fewest has; a sample without a group is one of its own."""
    units: dict[str, set[object]] = {}
    for some in samples:
        for task, unit in zip(some.tasks, some.groups or some.ids, strict=True):
            units.setdefault(task, set()).add(unit)
    return min((len(own) for own in units.values()), default=0)


def unit_numbers(
    tasks: Sequence[str], ids: Sequence[str], groups: Sequence[str | None]
) -> Int[Tensor, sample]:
    """Group of each sample, counted from 0; a sample without one is its own."""
    numbers: dict[object, int] = {}
    return torch.tensor([
        numbers.setdefault((task, name) if group is None else group, len(numbers))
        for task, name, group in zip(tasks, ids, groups, strict=True)
    ])


def left_out_together(
    tasks: Sequence[str], groups: Sequence[str | None], num_groups: int
) -> Int[Tensor, sample]:
    """Which samples are left out together.

    Neighbours, of each task an equal share, and never a part of a group.

    Neighbours rather than samples dealt out in turn: where the samples of a document follow one another, they
    stay together though nobody named the document.
    """
    units = [place if group is None else group for place, group in enumerate(groups)]
    sizes = Counter(task for task, _ in set(zip(tasks, units, strict=True)))
    seen: Counter[str] = Counter()
    places: dict[object, int] = {}
    for task, unit in dict.fromkeys(zip(tasks, units, strict=True)):
        places.setdefault(unit, seen[task] * num_groups // sizes[task])
        seen[task] += 1
    return torch.tensor([places[unit] for unit in units])


def rounded(values: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """The numbers with ``DIGITS`` significant digits that are nearest."""
    magnitude = values.abs().clamp(min=torch.finfo(values.dtype).tiny).log10().floor()
    scale = 10.0 ** (DIGITS - 1 - magnitude).clamp(max=300)
    return (values * scale).round() / scale
