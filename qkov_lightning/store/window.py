"""Which samples a measurement of summed storage rests on, and what they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qkov_lightning.store.generations import KINDS, Generation, read_sums
from qkov_lightning.store.records import CacheRecord

InMemory = Callable[[str, str], "Tensor | None"]
"""Gives the sums of a task at a projection that are not on disk."""


class Window:
    """The generations of all tasks and processes at one moment, as far as they share no sample.

    Of generations that share one, the larger counts, and of two of a size the newer.

    Args:
        generations: All of them.
        directory: Where their sums are.
        in_memory: Gives those that are not there.
    """

    def __init__(self, generations: Sequence[Generation], directory: Path, in_memory: InMemory) -> None:
        self._directory, self._in_memory = directory, in_memory
        self._generations: list[Generation] = []
        known: set[tuple[str, str]] = set()
        with_members = [one for one in generations if one.members]
        for one in sorted(with_members, key=lambda one: (one.count, one.last_step), reverse=True):
            own = {(one.task, name) for name in one.ids}
            if own.isdisjoint(known):
                known |= own
                self._generations.append(one)
        # Oldest first: sums in float32 depend on the order.
        self._generations.sort(key=lambda one: (one.task, one.first_step, *min(one.members)))

    def masks(self, records: Sequence[CacheRecord]) -> list[Bool[Tensor, sample]]:
        """Which samples of each record count: one that a step holds twice counts where it comes first."""
        missing = {
            (one.task, name, *member)
            for one in self._generations
            for member, names in one.members.items()
            for name in names
        }
        masks = []
        for record in records:
            mask = torch.zeros(len(record.samples), dtype=torch.bool)
            for index, (task, name) in enumerate(zip(record.samples.tasks, record.samples.ids, strict=True)):
                key = (task, name, record.step, record.rank)
                mask[index] = key in missing
                missing.discard(key)
            masks.append(mask)
        return masks

    def means(
        self, name: str, tasks: Sequence[str], counts: Sequence[int]
    ) -> Float[Tensor, "3 task head weight"] | None:
        """Means of gradients, magnitudes and squares over the samples of each task.

        Args:
            name: Of the stored projection.
            tasks: The tasks; zeros for one without samples.
            counts: Samples of each that a measurement has.

        Returns:
            The means; None where the sums are not known, or are not those of these samples.

        Raises:
            CacheError: If they cannot be read.
        """
        summed = Counter(dict.fromkeys(tasks, 0))
        for one in self._generations:
            summed[one.task] += one.counts.get(name, 0)
        if any(summed[task] != count for task, count in zip(tasks, counts, strict=True)):
            return None
        found: Tensor | None = None
        for one in self._generations:
            if one.task in tasks and one.counts.get(name, 0):
                sums = (
                    read_sums(self._directory / one.folder, name)
                    if one.folder
                    else self._in_memory(one.task, name)
                )
                if sums is None:
                    return None
                if found is None:
                    found = sums.new_zeros(len(KINDS), len(tasks), *sums.shape[1:], device="cpu")
                found[:, tasks.index(one.task)].add_(sums.cpu())
        if found is not None:
            found.div_(torch.tensor(counts, dtype=found.dtype).clamp(min=1)[:, None, None])
        return found
