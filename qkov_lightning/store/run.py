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
from qkov_lightning.store.fitting import Budget, Demand, StorageFit
from qkov_lightning.store.generations import Generation
from qkov_lightning.store.leftovers import MARKER, owner_note, remove_cache
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.records import StepSize
from qkov_lightning.store.sampling import Coordinates, sampled_bytes
from qkov_lightning.store.stored import StoredGradients
from qkov_lightning.store.sums import RunningSums
from qkov_lightning.store.window import Window
from qkov_lightning.store.writer import CacheWriter

Storage = Literal["auto", "factors", "summed", "sampled"]
"""What is kept: exact factors; sums at all weights and samples at some; the latter alone; or what fits."""


FISHER = "mean over the heatmap's samples"
"""Which Fisher summed storage takes, for the notes of a heatmap."""


class RunStore:
    """The cache of a run, its writer, the sampled weights, and a Fisher for each measurement.

    Args:
        directory: Of this run and no other.
        projections: What is captured.
        processes: All of them open the same directory.
        storage: What to keep.
        budget: What it may use.

    Attributes:
        cache: The captured steps.
        coordinates: Weights that are kept of each head; None if all are.
        sums: Of all samples of this process at all weights, where they are kept.
        chosen: "factors", "summed" or "sampled"; empty until the first captured step decides.
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
        budget: Budget,
    ) -> None:
        self._storage: Storage = storage
        self._budget, self._processes = budget, processes
        self._is_new = not directory.is_dir()
        self.cache = GradientCache(
            directory,
            rank=processes.rank,
            world_size=processes.count,
            max_samples_per_task=budget.max_samples_per_task,
            max_bytes=budget.max_bytes,
        )
        self.coordinates: Coordinates | None = None
        self.sums: RunningSums | None = None
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
        self._keep()

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
        return bool(self.chosen) and self.sums is None and self._since_fold >= self._fold_every

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

    def close(self, goes_on: bool) -> None:
        """Write what is on its way, end the writer's thread, and let go of memory.

        Args:
            goes_on: Whether training may go on with what is stored.
        """
        if self._writer:
            self._writer.close()
            self._writer = None
        if self.sums:
            self.sums.close(goes_on)

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

    @property
    def is_waiting(self) -> bool:
        """Whether sums are kept that hold no sample of this process yet."""
        return self.sums is not None and not any(one.members for one in self.sums.generations)

    # Exact or sampled

    def _choose(self, captured: list[CapturedStep], processes: Processes) -> list[CapturedStep]:
        """Exact or sampled, the same in all processes, from the first captured step.

        Returns:
            What to write of this step: nothing while the first process has seen no finite gradient.

        Raises:
            CacheError: If the drawn weights cannot be written.
        """
        usable = bool(captured) and all(one.is_finite for one in captured)
        everyone = processes.gather([StepSize.of(captured, self._projections)] if usable else [])
        if not processes.from_first(usable):
            self._num_unusable += bool(captured)
            return []
        size = StepSize.total(everyone)
        chosen = self._smaller(size) if self._storage == "auto" else self._storage
        self._fold_every = max(1, self._budget.max_samples_per_task // max(1, size.num_samples))
        if chosen == "factors":
            self._fold_every = max(
                1, min(self._fold_every, self._budget.max_bytes // 2 // max(1, size.num_bytes))
            )
        else:
            path, failure = self._coordinates_path(), ""
            if processes.is_first:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_durably(path, *Coordinates.draw(captured, self._projections).to_file())
                except (CacheError, OSError) as error:
                    failure = str(error)
            if failure := processes.from_first(failure):
                raise CacheError(failure)
            self.coordinates = _loaded(path)
            if chosen == "summed":
                self._sum(self.coordinates).begin()
        self.chosen = chosen
        self._keep()
        return captured if usable else []

    def _sum(self, coordinates: Coordinates) -> RunningSums:
        """Keep sums, whose Fisher is that of their own samples: no captured step waits to be folded."""
        self.sums = RunningSums(
            self.cache.directory / "sums",
            self._processes.rank,
            self._processes.count,
            self._projections,
            coordinates,
            max(2, self._budget.max_samples_per_task // self._processes.count),
            self._budget.max_memory_bytes,
            self._budget.max_bytes // self._processes.count,
        )
        self.cache.keep_from(None)
        return self.sums

    def _smaller(self, size: StepSize) -> str:
        """What fits into the budget; the choice is logged."""
        demand = Demand(
            size.bytes_per_sample,
            sampled_bytes(self._projections, size.itemsize),
            size.num_weights,
            max(2, len(size.tasks)),  # batches may hold one task each
            size.itemsize,
        )
        fit = StorageFit.of(demand, self._budget, self._processes.count)
        rank_zero_info(f"InterferenceMonitor: {fit}.")
        return fit.chosen

    def _keep(self) -> None:
        """Tell the writer what to keep."""
        coordinates = self.coordinates
        if self._writer and coordinates:
            self._writer.store = lambda step: coordinates.sample(step, self._projections)
            self._writer.sums = self.sums

    def _coordinates_path(self, cache: Path | None = None) -> Path:
        return (cache or self.cache.directory) / "sampling" / "coordinates.safetensors"

    # What a measurement reads

    def until(self, step: int) -> StoredGradients:
        """All captured steps before ``step``, with the newest Fisher; called by all processes.

        Raises:
            CacheError: If the sums cannot be written for the other processes.
        """
        return StoredGradients(
            self.cache,
            fisher_directory=self.fisher_directory(step),
            previous_fisher=self.fisher_directory(self.fisher_step),
            folded_until=self.fisher_step,
            coordinates=self.coordinates,
            window=None if self.sums is None else self._window(self.sums, step),
        )

    def _window(self, sums: RunningSums, step: int) -> Window:
        """The sums of all processes: of one process from its memory, of several from their disk."""
        if self._processes.count == 1:
            return Window(sums.generations, sums.directory, sums.in_memory)
        generations: list[Generation] = []
        failure: CacheError | None = None
        try:
            generations = sums.snapshot(step, [at for at, _ in self._checkpointed])
        except CacheError as error:
            failure = error
        self._processes.agree(failure)
        return Window(self._processes.gather(generations), sums.directory, lambda *_: None)

    def notes(self) -> dict[str, Any]:
        """How the gradients were stored, for the notes of a heatmap."""
        notes: dict[str, Any] = {"storage": self.chosen}
        if self.sums is not None:
            notes["fisher"] = FISHER
            if self.sums.is_given_up:
                notes["sums"] = "none: max_cache_gb has no room for them"
        return notes if self.coordinates is None else {**notes, "sampling": self.coordinates.description}

    def fisher_directory(self, step: int, cache: Path | None = None) -> Path:
        """Where the Fisher goes that holds all captured steps before ``step``."""
        return (cache or self.cache.directory) / f"fisher-{step:010d}"

    def note_fisher(self, step: int, processes: Processes) -> None:
        """Go on from the Fisher of ``step``, and remove those that no restart needs."""
        self.fisher_step, self._since_fold = step, 0
        if self.sums is None:
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
        if self.sums is not None:
            self.sums.snapshot(step, [at for at, _ in self._checkpointed])
            self.cache.hold(self.sums.needed_steps)
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
        if stored in {"summed", "sampled"} and drawn.exists():
            if moved:
                adopt_directory(drawn.parent, self._coordinates_path().parent)
            self.coordinates = _loaded(self._coordinates_path())
            if stored == "summed":
                self._resume_sums(self.coordinates, step, (old or new) / "sums")
            self._keep()
        self.chosen = stored if stored == "factors" or self.coordinates else ""
        self._checkpointed, self.is_needed = [(step, self.fisher_step)], True

    def _resume_sums(self, coordinates: Coordinates, step: int, source: Path) -> None:
        sums = self._sum(coordinates)
        try:
            sums.resume(step, source)
        except CacheError as error:
            warnings.warn(f"{error} The next heatmap rests on new samples only.", stacklevel=2)
            sums = self._sum(coordinates)
            sums.begin()
        self.cache.hold(sums.needed_steps)


def _loaded(path: Path) -> Coordinates:
    try:
        return Coordinates.load(path)
    except ValueError as error:
        raise CacheError(str(error)) from error
