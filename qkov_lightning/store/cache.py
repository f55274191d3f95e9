"""The contribution cache: one append-only safetensors file per process and captured step."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.store.files import CacheError, link_or_copy
from qkov_lightning.store.records import CacheRecord, open_record, write_record
from qkov_lightning.store.sampling import SampledStep


class GradientCache:
    """Captured steps on disk, within a budget of samples and bytes that keeps the newest.

    A file is written under a temporary name, synced and renamed: a file that exists is complete. Nothing
    is ever unpickled.

    Args:
        directory: Holds the files of all processes of a run, and of no other run.
        rank: This process; it writes and removes its own files only.
        world_size: Processes that share the directory and its byte budget.
        max_samples_per_task: Samples of each task that stay readable, the newest ones. A sample that is
            captured again replaces its earlier self.
        max_bytes: Disk space for all processes. Half holds the newest samples, half those that a
            restart from the last checkpoint would need.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        max_samples_per_task: int = 128,
        max_bytes: int = 10 * 2**30,
    ) -> None:
        self.directory = Path(directory)
        self._rank, self._world_size = rank, world_size
        self._max_samples_per_task = max_samples_per_task
        self._window_bytes = max_bytes // world_size // 2
        self._checkpoints: list[tuple[int, int]] = []
        self._unfolded_from: int | None = None
        self._held: frozenset[int] = frozenset()
        self._unreadable: set[Path] = set()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f".*-{rank:05d}-*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise CacheError(f"The cache directory {self.directory} cannot be written: {error}") from error
        self._own = self._scan_own()

    def append(self, step: int, captured: Sequence[CapturedStep | SampledStep]) -> None:
        """Add one training step, or more samples of it, then drop what the budget no longer covers.

        Args:
            step: Training batch, counted from 0 over the whole run.
            captured: What was captured from it.

        Raises:
            CacheError: If the file cannot be written, or is larger than the whole budget.
        """
        earlier_parts = sum(record.step == step for record in self._own)
        for part, one in enumerate(captured, start=earlier_parts):
            path = self.directory / f"{step:010d}-{self._rank:05d}-{part:03d}.safetensors"
            self._own.append(write_record(path, one, step, self._rank, self._window_bytes))
        self._evict()

    def keep_from(self, step: int | None) -> None:
        """Keep all records of ``step`` and later, also beyond the budget: the Fisher lacks them."""
        self._unfolded_from = step

    def hold(self, steps: Collection[int]) -> None:
        """Keep the records of these steps, also beyond the budget: they are in sums."""
        self._held = frozenset(steps)

    def num_bytes_of(self, steps: Collection[int]) -> int:
        """What the records of these steps take, of this process."""
        return sum(record.num_bytes for record in self._own if record.step in steps)

    def unfolded(self) -> list[CacheRecord]:
        """Records that the Fisher does not hold yet, of all processes, oldest first."""
        return (
            [] if self._unfolded_from is None else [r for r in self._scan() if r.step >= self._unfolded_from]
        )

    def records(
        self, masks_of: Callable[[Sequence[CacheRecord]], Sequence[Bool[Tensor, sample]]] | None = None
    ) -> list[tuple[CacheRecord, Bool[Tensor, sample]]]:
        """Readable records of all processes, oldest first, with a mask of the samples that count.

        Args:
            masks_of: Says which samples of the records count; by default those within the budget.
        """
        by_rank: dict[int, list[CacheRecord]] = {}
        found = self._scan()
        self._tell_of_lost(found)
        if masks_of is not None:
            masks = masks_of(found)
            return [(one, mask) for one, mask in zip(found, masks, strict=True) if bool(mask.any())]
        for record in found:
            by_rank.setdefault(record.rank % self._world_size, []).append(record)
        within = [record for records in by_rank.values() for record in self._within_bytes(records)]
        return self._newest(sorted(within, key=lambda record: record.path.name))

    def note_checkpoint(self, step: int) -> None:
        """Keep what a restart at ``step`` needs, until two later checkpoints exist.

        Two, because the newest may still be on its way to disk.
        """
        unfolded = step if self._unfolded_from is None else self._unfolded_from
        self._checkpoints = [*(one for one in self._checkpoints if one[0] != step), (step, unfolded)][-2:]
        self._evict()

    def restart_at(self, step: int) -> None:
        """Forget the records of ``step`` and later: a run that restarts there captures them again."""
        for record in self._own:
            if record.step >= step:
                _remove(record)
        self._own = [record for record in self._own if record.step < step]
        self._checkpoints = [(step, step if self._unfolded_from is None else self._unfolded_from)]

    def adopt(self, other: str | Path, before: int) -> None:
        """Take over this process' records up to a step from the directory of an earlier run, by hard link.

        Raises:
            CacheError: If a file can be neither linked nor copied.
        """
        for path in sorted(Path(other).glob("*.safetensors")):
            step, rank, _ = path.name.split("-")
            target = self.directory / path.name
            if int(step) < before and int(rank) % self._world_size == self._rank and not target.exists():
                link_or_copy(path, target)
        self._own = self._scan_own()

    def _scan_own(self) -> list[CacheRecord]:
        """Records of this process, and of the processes that it stands for if there were more."""
        return [record for record in self._scan() if record.rank % self._world_size == self._rank]

    def _scan(self) -> list[CacheRecord]:
        records = []
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                records.append(open_record(path))
            except CacheError as error:
                if path not in self._unreadable:
                    self._unreadable.add(path)
                    warnings.warn(f"{error} Its samples are left out.", stacklevel=3)
        return records

    def _tell_of_lost(self, found: Sequence[CacheRecord]) -> None:
        """Warn of own records that somebody else removed."""
        paths = {record.path for record in found} | self._unreadable
        lost = [record for record in self._own if record.path not in paths]
        if lost and found:  # an empty cache speaks for itself
            warnings.warn(
                f"{len(lost)} files of the cache {self.directory} are gone, {lost[0].path.name} the first of them: were they "
                "deleted? Their samples are left out.",
                stacklevel=3,
            )
            self._own = [record for record in self._own if record.path in paths]

    def _within_bytes(self, records: Sequence[CacheRecord]) -> list[CacheRecord]:
        """The newest records of one process that fit into its window; tasks with few samples come first."""
        left = sorted(records, key=lambda record: record.path.name)
        if sum(record.num_bytes for record in left) <= self._window_bytes:
            return left
        counts = Counter(dict.fromkeys((task for record in left for task in record.samples.tasks), 0))
        kept, total = [], 0
        while left:
            rarest = min(counts.values())
            wanted = {task for task, count in counts.items() if count == rarest}
            record = next((one for one in reversed(left) if not wanted.isdisjoint(one.samples.tasks)), None)
            if record is None:  # all that there is of these tasks
                for task in wanted:
                    del counts[task]
                continue
            total += record.num_bytes
            if total > self._window_bytes:
                break
            left.remove(record)
            kept.append(record)
            counts.update(task for task in record.samples.tasks if task in counts)
        return sorted(kept, key=lambda record: record.path.name)

    def _newest(self, records: Sequence[CacheRecord]) -> list[tuple[CacheRecord, Bool[Tensor, sample]]]:
        """Records that hold some of the newest samples of a task, each sample counted once."""
        counts: Counter[str] = Counter()
        seen: set[tuple[str, str]] = set()
        selected = []
        for record in reversed(records):
            mask = torch.zeros(len(record.samples), dtype=torch.bool)
            for index in reversed(range(len(record.samples))):
                key = (record.samples.tasks[index], record.samples.ids[index])
                if key not in seen and counts[key[0]] < self._max_samples_per_task:
                    seen.add(key)
                    counts[key[0]] += 1
                    mask[index] = True
            if bool(mask.any()):
                selected.append((record, mask))
        return selected[::-1]

    def _evict(self) -> None:
        now = max((record.step for record in self._own), default=0) + 1
        folded = now if self._unfolded_from is None else self._unfolded_from
        needed = {record.path for record in self._own if record.step in self._held}
        for until, unfolded_from in ((now, folded), *self._checkpoints):
            records = [record for record in self._own if record.step < until]
            needed |= {record.path for record in records if record.step >= unfolded_from}
            needed |= {record.path for record, _ in self._newest(self._within_bytes(records))}
        for record in self._own:
            if record.path not in needed:
                _remove(record)
        self._own = [record for record in self._own if record.path in needed]


def _remove(record: CacheRecord) -> None:
    try:
        record.path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"Cache file {record.path} cannot be removed: {error}") from error
