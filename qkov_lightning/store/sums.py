"""Sums over the samples of each task at every weight, kept while training captures.

Three numbers for each weight and task: of the gradients, of their magnitudes and of their squares. The thread
of the writer adds to them; whatever else is done with them waits for it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.gradients import gradient_blocks, owned_part
from qkov_lightning.heads.projections import Projection
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.generations import Generation, read_sums, write_manifest
from qkov_lightning.store.sampling import Coordinates, stored_name
from qkov_lightning.store.sum_memory import SumMemory, Sums, sums_disk_bytes
from qkov_lightning.store.sums_on_disk import SumsOnDisk


class RunningSums:
    """The sums of this process, a generation after the other for each task.

    A generation lasts until half of the samples came that a heatmap may rest on. The one before it stays on
    disk. A sample that comes again while its generation lasts is not added again.

    Args:
        directory: Where they go.
        rank: This process.
        world_size: How many there are; this one stands for those that are no more.
        projections: Whose gradients are summed.
        coordinates: Says how many weights their heads have.
        max_samples: Samples of a task in two generations of this process.
        max_memory_bytes: What may be in memory; the rest is mapped from files.
        max_disk_bytes: What this process may have on disk, its samples included.

    Attributes:
        closed: The generation of each task before the current one; several where processes were joined.
        current: The generation of each task that takes samples.
        is_given_up: Whether there was no room for the sums; then generations tell who the samples are.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        projections: Sequence[Projection],
        coordinates: Coordinates,
        max_samples: int,
        max_memory_bytes: int,
        max_disk_bytes: int,
    ) -> None:
        self._disk = SumsOnDisk(directory, rank, world_size)
        self._rank, self._world_size = rank, world_size
        drawn = coordinates.slices
        self._projections = [one for one in projections if stored_name(one) in drawn]
        sizes = {
            stored_name(one): (one.num_heads, drawn[stored_name(one)].slice_size) for one in self._projections
        }
        self._num_weights = sum(heads * size for heads, size in sizes.values())
        self._memory = SumMemory(directory / f"mapped-{rank:05d}", sizes, max_memory_bytes)
        self._max_samples = max_samples
        self._max_memory_bytes, self._max_disk_bytes = max_memory_bytes, max_disk_bytes
        self.closed: dict[str, list[Generation]] = {}
        self.current: dict[str, Generation] = {}
        self.is_given_up = False
        self._sums: dict[str, Sums] = {}
        self._disk_bytes = 0  # that the sums of these tasks may take
        self._needed_later: dict[int, list[Generation]] = {}

    # Training

    def add(self, step: int, captured: Sequence[CapturedStep]) -> None:
        """Take the samples of a captured step.

        Raises:
            CacheError: If a generation cannot be written or read.
        """
        counts = Counter(task for one in captured for task in one.samples.tasks)
        example = next((f.grad_output for one in captured for f in one.factors.values()), None)
        if example is None:
            return
        for task, count in counts.items():
            self._finish_full(task, count)
            self._bring_to_memory(task, example)
        known = {task: self.current[task].ids for task in counts}
        new: dict[str, list[str]] = {task: [] for task in counts}
        summed: dict[str, Counter[str]] = {task: Counter() for task in counts}
        for one in captured:
            rows: dict[str, list[int]] = {task: [] for task in one.samples.tasks}
            for row, (task, name) in enumerate(zip(one.samples.tasks, one.samples.ids, strict=True)):
                if name not in known[task]:
                    known[task].add(name)
                    new[task].append(name)
                    rows[task].append(row)
            for projection in self._projections:
                if projection.module_name in one.factors:
                    self._add_projection(one, projection, rows)
                    for task, own in rows.items():
                        summed[task][stored_name(projection)] += len(own)
        for task, count in counts.items():
            self.current[task].num_seen += count
            if new[task]:
                self.current[task].take((step, self._rank), new[task], summed[task])

    def _finish_full(self, task: str, count: int) -> None:
        """Begin the next generation of a task where the current one has no room for some more samples."""
        one = self.current.setdefault(task, Generation(task))
        if one.num_seen and one.num_seen + count > max(1, self._max_samples // 2):
            self.closed[task] = []
            self._remove_unneeded()
            self.closed[task] = [one.copy(self._written(task))] if one.members else []
            self._begin(task)

    def _begin(self, task: str) -> None:
        self.current[task] = Generation(task)
        for sums in self._sums.get(task, {}).values():
            sums.zero_()

    def _bring_to_memory(self, task: str, example: Tensor) -> None:
        """The sums of the current generation, which may have to be read."""
        self.closed.setdefault(task, [])
        if task in self._sums or self.is_given_up:
            return
        dtype = torch.promote_types(example.dtype, torch.float32)
        num_tasks = len(self._sums) + 1
        needed = sums_disk_bytes(self._num_weights, num_tasks, self._max_memory_bytes, dtype.itemsize)
        if needed > self._max_disk_bytes:
            self._give_up(
                f"those of {num_tasks} tasks need {needed * self._world_size / 2**30:.3g} GiB of disk, and the samples more. "
                "Raise max_cache_gb"
            )
            return
        self._disk_bytes = needed
        self._sums[task] = self._memory.allocate(dtype, example.device)
        one = self.current[task]
        for name in [name for name, count in one.counts.items() if count]:
            self._sums[task][name].copy_(read_sums(self._disk.directory / one.folder, name))

    def _add_projection(self, step: CapturedStep, projection: Projection, rows: dict[str, list[int]]) -> None:
        if self.is_given_up:
            return
        factors = step.factors[projection.module_name]
        part = owned_part(factors, projection, step.scales, factors.activation.device)
        for start, block in gradient_blocks(part, projection.num_heads):
            for task, own in rows.items():
                sums = self._sums[task][stored_name(projection)]
                here = [row - start for row in own if start <= row < start + len(block)]
                if not here:
                    continue
                is_elsewhere = sums.device != block.device
                total = torch.zeros_like(sums, device=block.device) if is_elsewhere else sums
                for gradient in (block[row] for row in here):
                    total[0].add_(gradient)
                    total[2].addcmul_(gradient, gradient)
                    total[1].add_(gradient.abs_())
                if is_elsewhere:
                    sums.add_(total.to(sums.device))

    def _give_up(self, reason: str) -> None:
        """Go on without sums.

        Warns:
            UserWarning: Always.
        """
        self.is_given_up, self._disk_bytes = True, 0
        self._drop_memory()
        for one in self.generations:
            one.folder = ""
        warnings.warn(
            f"InterferenceMonitor: summed storage goes on without its sums, and scores come from the sampled weights alone: "
            f"{reason}.",
            stacklevel=2,
        )

    def fit_records(self, num_bytes_of: Callable[[Collection[int]], int]) -> None:
        """Let the oldest generations go until the records of all others fit beside the sums.

        A rare task holds the records of many steps, with the samples of all others in them.

        Args:
            num_bytes_of: What the records of some steps take.
        """
        limit = (self._max_disk_bytes - self._disk_bytes) // 2  # checkpoints may need as many more
        while num_bytes_of(_steps(self.generations)) > limit:
            with_members = [one for one in self.generations if one.members]
            oldest = min(with_members, key=lambda one: one.first_step)
            if oldest.first_step == max(one.last_step for one in with_members):
                return  # a single step, which the cache itself bounds
            if self.current[oldest.task] is oldest:
                self._begin(oldest.task)
            else:
                self.closed[oldest.task].remove(oldest)

    # Measurements and restarts

    @property
    def directory(self) -> Path:
        """Where the sums are."""
        return self._disk.directory

    @property
    def generations(self) -> list[Generation]:
        """All of them that describe the present."""
        return [*(one for some in self.closed.values() for one in some), *self.current.values()]

    @property
    def needed_steps(self) -> set[int]:
        """Captured steps whose samples are in one of the generations, now or at a checkpoint."""
        return _steps(self._needed)

    def in_memory(self, task: str, name: str) -> Float[Tensor, "3 head weight"] | None:
        """The current sums of a projection; None if there are none."""
        return self._sums.get(task, {}).get(name)

    def snapshot(self, step: int, needed: Collection[int]) -> list[Generation]:
        """Write what a measurement or a restart before ``step`` needs, and remove what none does.

        Args:
            step: Captured steps before it are in.
            needed: Steps of earlier snapshots that stay.

        Returns:
            The generations, all of them on disk.

        Raises:
            CacheError: If the disk refuses.
        """
        self._needed_later = {at: some for at, some in self._needed_later.items() if at in needed}
        self._remove_unneeded()
        current = [one.copy(self._written(one.task)) for one in self.current.values() if one.members]
        closed = [one.copy(one.folder) for some in self.closed.values() for one in some]
        write_manifest(self._disk.manifest(step), closed, current)
        self._needed_later[step] = [*closed, *current]
        return self._needed_later[step]

    def resume(self, step: int, source: Path) -> None:
        """Go on from a snapshot, perhaps of another directory and of more processes.

        Raises:
            CacheError: If there is none, or something cannot be read or written.
        """
        self._needed_later[step] = []
        for closed, current in self._disk.adopt(step, source):
            for one in (*closed, *current):
                self.is_given_up |= not one.folder
                self.closed.setdefault(one.task, [])
            for one in closed:
                self.closed[one.task].append(one)
            for one in current:
                # That of a process that is no more takes no more samples.
                if one.task in self.current:
                    self.closed[one.task].append(one)
                else:
                    self.current[one.task] = one
            self._needed_later[step] += [one.copy(one.folder) for one in (*closed, *current)]
        for task in self.closed:
            self.current.setdefault(task, Generation(task))
        self._remove_unneeded()

    def begin(self) -> None:
        """Remove what an earlier training left in the directory.

        Raises:
            CacheError: If the disk refuses.
        """
        self._remove_unneeded()

    def close(self, keep: bool) -> None:
        """Let go of the memory; what is kept is read again when training goes on.

        Args:
            keep: Whether training may go on.
        """
        for task, one in self.current.items():
            if one.members and not one.folder and not self.is_given_up:
                try:
                    one.folder = self._written(task) if keep else ""
                except CacheError as error:
                    warnings.warn(f"{error} Its samples are left out.", stacklevel=2)
                if not one.folder:
                    self.current[task] = Generation(task)
        self._drop_memory()

    def _drop_memory(self) -> None:
        self._sums.clear()
        self._memory.release()

    def _written(self, task: str) -> str:
        """Folder of the current generation of a task, which is written as far as it is not yet.

        Empty if there are no sums.

        Raises:
            CacheError: If the disk refuses.
        """
        one = self.current[task]
        if self.is_given_up or one.folder:
            return one.folder
        return self._disk.write(one, self._sums[task])

    def _remove_unneeded(self) -> None:
        self._disk.remove_all_but({one.folder for one in self._needed}, self._needed_later)

    @property
    def _needed(self) -> list[Generation]:
        """All of the present, and those of checkpoints."""
        return [*self.generations, *(one for some in self._needed_later.values() for one in some)]


def _steps(generations: Sequence[Generation]) -> set[int]:
    return {step for one in generations for step, _ in one.members}
