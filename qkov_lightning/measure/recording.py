"""The recording of a training run: its taps and its store, from the first step to the last, over restarts.

One class, whose methods are the moments of a run: apart they would share all of their state.

An error of the disk never stops training: the recording switches itself off in all processes, with a warning.
"""

from __future__ import annotations

import random
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.samples import Labels
from qkov_lightning.capture.taps import GradientCapture
from qkov_lightning.heads.projections import Projection
from qkov_lightning.measure.folding import fold_fisher
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.measurement import Rates, measure_interference
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.store.files import CacheError, sweep
from qkov_lightning.store.fitting import Budget
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.run import RunStore, Storage

NOTHING_STORED = {"cache": "", "fisher_step": 0, "storage": ""}
"""What a checkpoint says of the store of a recording that has switched itself off."""


def is_captured(batch: int, every_n_steps: int) -> bool:
    """Whether a batch is the one that is captured of its window of ``every_n_steps`` batches.

    The first batch of the run, and then one at random in each window, the same in every process and after
    every restart: tasks that take turns would otherwise meet the same place of every window, or never.
    """
    window, place = divmod(batch, every_n_steps)
    return place == (random.Random(f"window {window}").randrange(every_n_steps) if window else 0)


class Recording:
    """Captures every n-th training step, keeps it, and measures what it kept.

    Args:
        storage: What to keep of a captured step.
        budget: What it may use.

    Attributes:
        capture: The taps; None where nothing is captured.
        store: What is on disk; None before training, and after an error in another process.
        num_batches: Training batches seen.
        has_news: Whether something was captured since this was last set to False.
    """

    def __init__(self, storage: Storage, budget: Budget) -> None:
        self._storage: Storage = storage
        self._budget = budget
        self.capture: GradientCapture | None = None
        self.store: RunStore | None = None
        self._run_id = ""
        self._switched_off = False
        self._joined: str | None = None
        self.has_news = False
        self._counters = dict.fromkeys(("batches", "captured_steps", "non_finite_steps"), 0)

    @property
    def num_batches(self) -> int:
        """Training batches seen, over the whole run."""
        return self._counters["batches"]

    # From the model to the disk

    def tap(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        loss_reduction: ReductionChoice,
        processes: Processes,
    ) -> None:
        """Install the taps; samples without an identifier go on to be numbered."""
        numbering = self.capture.numbering if self.capture else Counter()
        self.capture = GradientCapture(model, projections, loss_reduction, processes.rank, processes.count)
        self.capture.numbering = numbering

    def open(
        self,
        directory: Path,
        projections: Sequence[Projection],
        processes: Processes,
        state: Mapping[str, Any] | None,
    ) -> None:
        """Open the store of a new run, or of that of a checkpoint, in all processes or in none.

        Args:
            directory: Holds a folder for each run.
            projections: What is captured.
            processes: Those of the run.
            state: What the checkpoint holds of the ``state`` of its run.

        Raises:
            ValueError: If the processes do not share the directory, or the checkpoint's run stored something
                else.
        """
        self._switched_off = False
        # A recording that had switched itself off names no cache: what it left behind is no start for a new
        # one.
        known = state["run_id"] if state and state["cache"] else uuid.uuid4().hex[:8]
        self._run_id = processes.from_first(known)
        self._counters = {key: int(state[key]) if state else 0 for key in self._counters}
        if self.capture:
            self.capture.numbering = Counter(state["numbering"] if state else {})
        if processes.is_first:
            sweep(directory)
        try:
            self.store = RunStore(
                directory / self._run_id, projections, processes, self._storage, self._budget
            )
            if state:
                self.store.resume(state, self.num_batches, processes)
        except CacheError as error:
            self.switch_off(error)
        self._agree(processes)
        if self.store:
            self.store.check_shared(processes)

    def reopen(self, projections: Sequence[Projection]) -> bool:
        """Go on in the store of the last ``fit``; False if there is none."""
        self._switched_off = False
        if self.store is None:
            return False
        self.store.open(projections)
        return True

    def start(self, every_n_steps: int) -> None:
        """Watch the batch that begins, if it is the one of its window."""
        if self.capture and not self._switched_off and is_captured(self.num_batches, every_n_steps):
            self.capture.start()

    def note_loss(self, loss: Tensor, accumulated: int, scaler: Any) -> None:
        """Show the taps how the loss joins its samples, and what it was divided by and multiplied with.

        Args:
            loss: Before its backward pass.
            accumulated: Number of batches that it was divided by.
            scaler: The gradient scaler that it was multiplied with; None without one.
        """
        if self.capture and self.capture.active:
            # What the scaler makes of 1, on the device: asking for its scale would wait for the forward pass.
            scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
            self.capture.scale = lambda: accumulated / (1.0 if scale is None else float(scale))
            self.capture.note_loss(loss)

    def pause(self) -> None:
        """Watch no further forward pass of the batch."""
        if self.capture:
            self.capture.pause()

    def finish(self, labels: Callable[[], Labels] | None, processes: Processes) -> None:
        """Hand over what was captured of the batch that ends, to be written.

        Args:
            labels: Gives the labels of the batch; None if it was skipped.
            processes: Those of the run.
        """
        step = self.num_batches
        self._counters["batches"] += 1
        if not (self.capture and self.capture.active):
            return
        if labels is None:
            self.capture.discard()
        captured = [] if labels is None else self.capture.finish(labels)
        self.has_news = True
        if self.capture.joined is not None and self._joined is None:
            self._joined = self.capture.joined.reduction
            joined = self.capture.joined
            rank_zero_info(f"InterferenceMonitor: the loss is {joined}; {joined.own_loss}.")
        if self.store:
            try:
                self.store.submit(step, captured, processes)
            except CacheError as error:
                self.switch_off(error)

    def discard(self) -> None:
        """Forget what is being captured of a batch."""
        if self.capture:
            self.capture.discard()

    def explain_nothing(self) -> None:
        """Say why there is no heatmap at the end of a training.

        Warns:
            UserWarning: If training batches were seen at all.
        """
        batches, captured, dropped = self._counters.values()
        if not batches or self._switched_off:
            return
        reason = f"{captured} of {batches} training batches were captured"
        if not captured and dropped:
            reason = f"a gradient was not finite in any of the {dropped} captured steps"
        warnings.warn(f"There is no interference heatmap of this training: {reason}.", stacklevel=3)

    def drain(self) -> None:
        """Wait for what is on its way to the cache, and count it."""
        if self.store and not self._switched_off:
            try:
                written, dropped = self.store.drain()
            except CacheError as error:
                self.switch_off(error)
            else:
                self._counters["captured_steps"] += written
                self._counters["non_finite_steps"] += dropped

    # From the disk to a heatmap

    @property
    def fold_is_due(self) -> bool:
        """Whether the Fisher must take what was captured, before the budget ends for it."""
        return self.store is not None and not self._switched_off and self.store.fold_is_due

    def fold(
        self, projections: Sequence[Projection], decay: float, processes: Processes, device: torch.device
    ) -> None:
        """Let the Fisher take what was captured since the last time; called by all processes.

        Args:
            projections: Whose Fisher.
            decay: Of its moving average.
            processes: Those of the run.
            device: Where the arithmetic runs.
        """
        if not self.is_ready(processes) or self.store is None:
            return
        try:
            with torch.no_grad():
                fold_fisher(self.store.until(self.num_batches), projections, decay, processes, device)
        except CacheError as error:
            self.switch_off(error)
        else:
            self.store.note_fisher(self.num_batches, processes)

    def is_ready(self, processes: Processes) -> bool:
        """Whether all processes can measure, which then have written what they captured."""
        self.drain()
        self._agree(processes)
        if self.store is None:
            return False
        processes.wait()
        return True

    def measure(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        settings: ScoreSettings,
        processes: Processes,
        rates: Rates | None,
        on_projection: Callable[[], None],
    ) -> InterferenceHeatmap | None:
        """Measure what is stored.

        Args:
            model: The model.
            projections: What was captured.
            settings: What the scores depend on.
            processes: Those of the run, all of them ready.
            rates: What the optimiser multiplies a gradient with, instead of the direction of the settings.
            on_projection: Called when one of the projections is done.

        Returns:
            The heatmap; None if there is nothing to measure, or it cannot be measured.
        """
        if self.store is None:
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                stored = self.store.until(self.num_batches)
                heatmap = measure_interference(
                    stored, projections, model, settings, processes, rates, on_projection
                )
        except CacheError as error:
            self.switch_off(error)
            return None
        self.store.note_fisher(self.num_batches, processes)
        if heatmap is None:
            if self._counters["captured_steps"] and not self.store.is_waiting:
                self.switch_off(
                    CacheError(f"The cache {self.store.cache.directory} is empty: were its files deleted?")
                )
            return None
        return replace(heatmap, notes={**self._counters, **self.store.notes()})

    # Restarts and errors

    def state(self) -> dict[str, Any]:
        """Counters, and where the cache is; nothing before the first training."""
        if not self._run_id:
            return {}
        self.drain()
        return {
            **self._counters,
            **(self.store.state() if self.store else NOTHING_STORED),
            "run_id": self._run_id,
            "numbering": dict(self.capture.numbering) if self.capture else {},
        }

    def note_checkpoint(self) -> None:
        """Keep what a restart from a checkpoint of this moment needs."""
        self.drain()
        if self.store and not self._switched_off:
            try:
                self.store.note_checkpoint(self.num_batches)
            except CacheError as error:
                self.switch_off(error)

    def switch_off(self, error: CacheError) -> None:
        """Stop recording, and say why.

        Warns:
            UserWarning: Always.
        """
        self._switched_off = True
        self._release(goes_on=False)
        warnings.warn(
            f"The interference monitor switched itself off; training goes on. {error}", stacklevel=4
        )

    def clear(self, processes: Processes) -> None:
        """Remove the cache, unless a checkpoint needs it to go on; called by all processes."""
        if self.store is None or self._switched_off:
            return
        self.drain()
        self._release(goes_on=self.store.is_needed)
        processes.wait()
        if self.store.is_needed:
            rank_zero_info(
                f"InterferenceMonitor: the gradient cache stays in {self.store.cache.directory} for the checkpoints of this "
                f"training; `qkov clean {self.store.cache.directory.parent}` removes it."
            )
            return
        if processes.is_first:
            self.store.remove()
        self.store = None

    def close(self) -> None:
        """Write what is on its way, and leave the model as it was found."""
        try:
            self.drain()
        finally:
            self._release(goes_on=not self._switched_off)

    def _release(self, goes_on: bool) -> None:
        if self.store:
            self.store.close(goes_on)
        if self.capture:
            self.capture.discard()

    def _agree(self, processes: Processes) -> None:
        """Either all processes measure or none: a measurement waits for all of them."""
        if not processes.all(not self._switched_off):
            if not self._switched_off:
                self.switch_off(CacheError("Another process switched its own off, and says why."))
            self.store = None
