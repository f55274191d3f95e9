"""What one run keeps on disk, over all processes and restarts: captured steps, weights and Fishers."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.heads.projections import Projection
from qkov_lightning.store.cache import GradientCache
from qkov_lightning.store.files import CacheError, adopt_directory, write_durably
from qkov_lightning.store.leftovers import MARKER, owner_note, remove_cache
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.records import StepSize
from qkov_lightning.store.sampling import Coordinates, sampled_bytes
from qkov_lightning.store.stored import StoredGradients
from qkov_lightning.store.writer import CacheWriter

Storage = Literal["auto", "factors", "sampled"]
"""What the cache keeps: exact factors, gradients at sampled weights, or whichever fits."""


class RunStore:
    """The cache of a run, its writer, the sampled weights, and a Fisher for each measurement.

    Args:
        directory: Of this run and no other.
        projections: What is captured.
        processes: All of them open the same directory.
        storage: What to keep.
        max_samples_per_task: Budget of the cache.
        max_bytes: Budget of the cache.

    Attributes:
        cache: The captured steps.
        coordinates: Weights that are kept of each head; None if all are.
        chosen: "factors" or "sampled"; empty until the first captured step decides.
        fisher_step: First captured step that the newest Fisher does not hold.
        is_needed: Whether a checkpoint of this run says where the cache is.

    Raises:
        CacheError: If the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        projections: Sequence[Projection],
        processes: Processes,
        storage: Storage,
        max_samples_per_task: int,
        max_bytes: int,
    ) -> None:
        self._storage: Storage = storage
        self._max_samples_per_task, self._max_bytes = max_samples_per_task, max_bytes
        self._is_new = not directory.is_dir()
        self.cache = GradientCache(
            directory,
            rank=processes.rank,
            world_size=processes.count,
            max_samples_per_task=max_samples_per_task,
            max_bytes=max_bytes,
        )
        self.coordinates: Coordinates | None = None
        self.chosen = ""
        self.fisher_step = 0
        self.cache.keep_from(0)
        self._fold_every, self._since_fold = 1, 0  # captured steps
        self._checkpointed = [(0, 0)]  # batches and Fisher of the last two checkpoints
        self.is_needed = False
        self._num_unusable = 0  # steps seen before the choice that have no finite gradient
        self._marker = directory / MARKER
        if processes.is_first:
            try:
                self._marker.write_text(owner_note(), encoding="utf-8")
            except OSError as error:
                raise CacheError(f"The cache directory {directory} cannot be written: {error}") from error
        self.open(projections)

    def open(self, projections: Sequence[Projection]) -> None:
        """Begin to write, at first and whenever training starts again."""
        self._projections = projections
        self._writer: CacheWriter | None = CacheWriter(self.cache)
        self._keep(self.coordinates)

    def check_shared(self, processes: Processes) -> None:
        """See that every process sees what the first one writes.

        Raises:
            ValueError: If one does not; in all of them, since one that went on alone would wait for the
                others.
        """
        if not processes.all(self._marker.exists()):
            raise ValueError(
                f"Not every process sees the cache directory {self.cache.directory} of process 0. Give a `cache_dir` on a file "
                "system that all processes share."
            )

    def submit(self, step: int, captured: list[CapturedStep], processes: Processes) -> None:
        """Write a captured step soon; the first one decides what is kept, which all processes do together.

        Raises:
            CacheError: If an earlier step, or the drawn weights, could not be written.
        """
        if not self.chosen:
            captured = self._choose(captured, processes)
        self._since_fold += 1
        if self._writer and captured:
            self._writer.submit(step, captured)

    @property
    def fold_is_due(self) -> bool:
        """Whether the budget ends soon for steps that the Fisher does not hold, the same in all processes."""
        return bool(self.chosen) and self._since_fold >= self._fold_every

    def drain(self) -> tuple[int, int]:
        """Wait for what is on its way to the cache.

        Returns:
            Steps written since the last time, and steps dropped because a gradient was not finite.

        Raises:
            CacheError: If a step could not be written.
        """
        written, dropped = self._writer.drain() if self._writer else (0, 0)
        dropped, self._num_unusable = dropped + self._num_unusable, 0
        return written, dropped

    def close(self) -> None:
        """Write what is on its way and end the writer's thread."""
        if self._writer:
            self._writer.close()
            self._writer = None

    def remove(self) -> None:
        """Remove the cache; what cannot be removed stays.

        Warns:
            UserWarning: If the disk refuses.
        """
        try:
            remove_cache(self.cache.directory)
        except OSError as error:
            warnings.warn(
                f"The gradient cache {self.cache.directory} could not be removed: {error}", stacklevel=2
            )

    # Exact or sampled

    def _choose(self, captured: list[CapturedStep], processes: Processes) -> list[CapturedStep]:
        """Exact or sampled, the same in all processes, from the first captured step.

        Returns:
            What to write of this step: nothing while the first process has seen no finite gradient.

        Raises:
            CacheError: If the drawn weights cannot be written.
        """
        usable = bool(captured) and all(one.is_finite for one in captured)
        everyone = processes.gather([StepSize.of(captured)] if usable else [])
        if not processes.from_first(usable):
            self._num_unusable += bool(captured)
            return []
        size = StepSize.total(everyone)
        chosen = self._smaller(size) if self._storage == "auto" else self._storage
        self._fold_every = max(1, self._max_samples_per_task // max(1, size.num_samples))
        if chosen == "factors":
            self._fold_every = max(1, min(self._fold_every, self._max_bytes // 2 // max(1, size.num_bytes)))
        if chosen == "sampled":
            path, failure = self._coordinates_path(), ""
            if processes.is_first:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_durably(path, *Coordinates.draw(captured, self._projections).to_file())
                except (CacheError, OSError) as error:
                    failure = str(error)
            if failure := processes.from_first(failure):
                raise CacheError(failure)
            self._keep(_loaded(path))
        self.chosen = chosen
        return captured if usable else []

    def _smaller(self, size: StepSize) -> str:
        """What fits into the budget; the choice is logged."""
        budget = self._max_bytes // 2
        num_tasks = max(2, len(size.tasks))  # batches may hold one task each
        needed = size.bytes_per_sample * self._max_samples_per_task * num_tasks
        sampled = sampled_bytes(self._projections)
        chosen = fitting_storage(
            size.bytes_per_sample, sampled, self._max_samples_per_task, num_tasks, self._max_bytes
        )
        how = "exact" if chosen == "factors" else chosen
        rank_zero_info(
            f"InterferenceMonitor: {how} storage; exact gradients take {needed / 2**30:.3g} GiB for "
            f"{self._max_samples_per_task} samples of {num_tasks} tasks, and max_cache_gb={self._max_bytes / 2**30:g} "
            f"leaves {budget / 2**30:.3g} GiB for them."
        )
        return chosen

    def _keep(self, coordinates: Coordinates | None) -> None:
        self.coordinates = coordinates
        if self._writer and coordinates:
            self._writer.store = lambda step: coordinates.sample(step, self._projections)

    def _coordinates_path(self, cache: Path | None = None) -> Path:
        return (cache or self.cache.directory) / "sampling" / "coordinates.safetensors"

    # What a measurement reads

    def until(self, step: int) -> StoredGradients:
        """All captured steps before ``step``, with the newest Fisher."""
        return StoredGradients(
            self.cache,
            fisher_directory=self.fisher_directory(step),
            previous_fisher=self.fisher_directory(self.fisher_step),
            folded_until=self.fisher_step,
            coordinates=self.coordinates,
        )

    def notes(self) -> dict[str, Any]:
        """How the gradients were stored, for the notes of a heatmap."""
        notes: dict[str, Any] = {"storage": self.chosen}
        return notes if self.coordinates is None else {**notes, "sampling": self.coordinates.description}

    def fisher_directory(self, step: int, cache: Path | None = None) -> Path:
        """Where the Fisher goes that holds all captured steps before ``step``."""
        return (cache or self.cache.directory) / f"fisher-{step:010d}"

    def note_fisher(self, step: int, processes: Processes) -> None:
        """Go on from the Fisher of ``step``, and remove those that no restart needs."""
        self.fisher_step, self._since_fold = step, 0
        self.cache.keep_from(step)
        if processes.is_first:
            steps = {step, *(fisher_step for _, fisher_step in self._checkpointed)}
            needed = {self.fisher_directory(step) for step in steps}
            for directory in set(self.cache.directory.glob("fisher-*")) - needed:
                shutil.rmtree(directory, ignore_errors=True)

    # Restarts

    def note_checkpoint(self, step: int) -> None:
        """Keep what a restart at ``step`` needs.

        Raises:
            CacheError: If the cache cannot be written.
        """
        self.is_needed = True
        self._checkpointed = [*self._checkpointed, (step, self.fisher_step)][-2:]
        self.cache.note_checkpoint(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the store."""
        return {
            "cache": str(self.cache.directory),
            "fisher_step": self.fisher_step,
            "storage": self.chosen,
            "fold_every": self._fold_every,
            "since_fold": self._since_fold,
        }

    def resume(self, state: Mapping[str, Any], step: int, processes: Processes) -> None:
        """Take over what the run of a checkpoint stored.

        Args:
            state: What its ``state`` was.
            step: Training batches that the checkpoint has seen.
            processes: All of them resume.

        Raises:
            ValueError: If its run stored something else.
            CacheError: If something cannot be read or written.

        Warns:
            UserWarning: If the cache is gone.
        """
        stored = str(state.get("storage", "factors"))
        if stored and self._storage not in {"auto", stored}:
            raise ValueError(
                f"InterferenceMonitor: storage is {self._storage!r}, but the checkpoint's run stores {stored!r}. Go on with "
                f'storage="{stored}" (or "auto"), or give the new run no checkpoint.'
            )
        new = self.cache.directory
        self.fisher_step = int(state["fisher_step"])
        self._fold_every, self._since_fold = int(state.get("fold_every", 1)), int(state.get("since_fold", 0))
        self.cache.keep_from(self.fisher_step)
        # No name if the monitor had switched itself off by then.
        old = Path(state["cache"]) if state["cache"] else None
        moved = old is not None and old != new
        if old is None or not old.is_dir() or (old == new and self._is_new):
            warnings.warn(
                f"The gradient cache of the checkpoint{f', {old},' if old else ''} is gone: the next heatmap rests on new "
                "samples only.",
                stacklevel=2,
            )
        elif moved:
            self.cache.adopt(old, before=step)
            if processes.is_first:
                adopt_directory(
                    self.fisher_directory(self.fisher_step, old), self.fisher_directory(self.fisher_step)
                )
        self.cache.restart_at(step)
        drawn = self._coordinates_path(old)
        if stored == "sampled" and drawn.exists():
            if moved:
                adopt_directory(drawn.parent, self._coordinates_path().parent)
            self._keep(_loaded(self._coordinates_path()))
        self.chosen = stored if stored == "factors" or self.coordinates else ""
        self._checkpointed, self.is_needed = [(step, self.fisher_step)], True


def fitting_storage(
    exact: int | float, sampled: int | float, num_samples: int, num_tasks: int, max_bytes: int
) -> Literal["factors", "sampled"]:
    """Exact storage, unless it exceeds its budget and sampled storage is smaller.

    Args:
        exact: Bytes of a sample in exact storage.
        sampled: Bytes of a sample in sampled storage.
        num_samples: Samples of each task.
        num_tasks: Tasks.
        max_bytes: Of the cache; half of it is for what checkpoints need.
    """
    too_much = exact * num_samples * num_tasks > max_bytes // 2
    return "sampled" if too_much and sampled < exact else "factors"


def _loaded(path: Path) -> Coordinates:
    try:
        return Coordinates.load(path)
    except ValueError as error:
        raise CacheError(str(error)) from error
