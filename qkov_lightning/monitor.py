"""The Lightning callback: when to capture, measure and show, never what.

Most of the file is the list of arguments, which stays flat for the sake of YAML, and the hooks of Lightning.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from qkov_lightning.capture.first_batch import VERIFY, Verify, place_heads
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.samples import Labels, read_labels, tasks_at_hand
from qkov_lightning.capture.strategies import check_strategy
from qkov_lightning.heads.maps import find_map
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.weights import adaptive_rates
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.measurement import Rates
from qkov_lightning.measure.passes import Probe
from qkov_lightning.measure.probe import MAX_MEMORY_GB, find_probe, probe_interference
from qkov_lightning.measure.recording import Recording
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.settings import ScoreSettings, check_values, number_rules
from qkov_lightning.scores.updates import STEP_SIZE, UpdateDirection
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.fitting import Budget
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.run import Storage
from qkov_lightning.views.bars import print_beside_bar, progress_task
from qkov_lightning.views.loggers import send, send_scalars
from qkov_lightning.views.publication import Publication, charts, scalars, write_files
from qkov_lightning.views.results import Results, is_remote, results_folder
from qkov_lightning.views.screen import epoch_lines
from qkov_lightning.views.watched import stand_in, watched_scalars


class InterferenceMonitor(Callback):
    """Shows where in a transformer the tasks of a training run interfere.

    Captures per-sample gradients of the attention projections from ordinary backward passes, and at each
    validation epoch (at each training epoch without validation) computes the interference of every ordered
    pair of tasks in every layer, head and block. Training itself is bit-identical with and without it.
    (Captured steps of compiled modules run eagerly, with the rounding and the random numbers of eager
    execution.)

    The result goes to ``heatmap``, to scalars (``interference/rise``, ``interference/<a>__<b>/rise``, ...,
    where ``<b>`` pushes on ``<a>``), to figures in the loggers, to the terminal, and to
    ``<run>/interference/latest.json``.

    Args:
        task_of: Batch key (or attribute), or function of the batch, that gives the task of each sample:
            strings or ints, one per sample or one for the whole batch. Not needed where forward passes run
            inside ``with qkov_lightning.task(...)``.
        sample_id_of: The same for sample identifiers. Samples are numbered per task without them.
        loss_reduction: How the training loss joins its samples: "auto" reads it from the loss itself, "mean"
            over samples, "token_mean" over all target tokens of the batch, or "sum".
        num_target_tokens_of: Like ``task_of``, for the target tokens of each sample; only "token_mean" needs
            it.
        token_samples_of: Like ``task_of``, for packed sequences and flattened inputs: the sample (counted
            from 0) of every token of the model's input, -1 for padding. Rows of the batch are the samples
            without it.
        group_of: Like ``task_of``, for the group of each sample (its document, its user): standard errors
            then allow for samples of one group that are alike. Samples are independent without it.
        sample_text_of: Like ``task_of``, for a text of each sample: its first 120 characters are stored and
            shown beside its identifier. No text leaves the batch without it.
        every_n_steps: Capture one training batch of every n: the first, then one at random in each n.
        max_samples_per_task: Samples of each task that a heatmap rests on: the newest.
        max_cache_gb: Disk for the cache, in GiB, over all processes.
        storage: "exact" keeps whole gradients, as factors ("factors" says the same). "summed" keeps the sums
            of each task at all weights (gradients, magnitudes, squares), and the gradient of each sample at
            512 weights of each head, drawn once per run: scores of two tasks are exact but for the curvature.
            "sampled" keeps the latter alone, with a sampling error that is part of every standard error.
            "auto" takes the first of the three that fits, and says so at the first captured step.
        cache_dir: Where the cache goes; in the folder of the results by default. All processes must see it.
        fisher_decay: Decay of the Fisher's EMA per captured step. In summed storage, as in a probe, the
            Fisher is the mean over the heatmap's own samples.
        damping: Added to the Fisher, relative to its mean over a slice.
        update_direction: Direction in which a task would update the weights, for ``forgetting`` and
            ``loss_rise``: "adam", "sgd", the one of the trainer's optimiser ("auto"), or the mean gradient
            divided by the second moments that the optimiser holds at the moment ("state").
        step_size: Length of the step that ``loss_rise`` predicts: the learning rate times the number of
            steps.
        num_hot_cells: Cells per task pair whose strongest sample pairs are searched.
        figures: Scores to draw for every task pair after each epoch, besides the overview and ``loss_rise``
            of the five worst pairs.
        projections: Head map; by default the one that names give, or derivatives where names are wrong or
            unknown.
        verify: "first_batch" proves the head map on the first sample of the first batch, by derivatives,
            before the first step: it stops at a head that is not where it is said to be, or goes on with the
            right map. Takes about two forward passes of one sample. "off" leaves it out.
        probe: Samples to measure at the current weights, instead of those that training happens to see:
            a DataLoader, or the name of the data module's method that returns one. See
            ``probe_interference``.
        probe_loss: Loss of the module on a batch of the probe, a function of both; ``training_step`` without
            it.
        max_memory_gb: Memory for sums, in GiB and in each process. Where it does not hold those of all
            layers, a probe is passed over several times; those of summed storage are mapped from a file.
        keep_cache: Leave the cache in place at the end of training. It is removed by default, unless a
            checkpoint needs it to go on.
        name: Folder of the results and prefix of the scalars; two monitors in one Trainer need two names.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[InterferenceMonitor()], logger=False)
    """

    def __init__(
        self,
        task_of: str | Callable[[Any], Any] = "task",
        sample_id_of: str | Callable[[Any], Any] = "sample_id",
        loss_reduction: ReductionChoice = "auto",
        num_target_tokens_of: str | Callable[[Any], Any] = "num_target_tokens",
        token_samples_of: str | Callable[[Any], Any] = "token_samples",
        group_of: str | Callable[[Any], Any] = "group",
        sample_text_of: str | Callable[[Any], Any] | None = None,
        every_n_steps: int = 10,
        max_samples_per_task: int = 128,
        max_cache_gb: float = 10.0,
        storage: Storage | Literal["exact"] = "auto",
        cache_dir: str | Path | None = None,
        fisher_decay: float = 0.95,
        damping: float = 1e-3,
        update_direction: Literal["auto", "adam", "sgd", "state"] = "auto",
        step_size: float = STEP_SIZE,
        num_hot_cells: int = 10,
        figures: Sequence[str] = (),
        projections: Sequence[Projection] | None = None,
        verify: Verify = "first_batch",
        probe: str | Probe | None = None,
        probe_loss: Callable[..., Any] | None = None,
        max_memory_gb: float = MAX_MEMORY_GB,
        keep_cache: bool = False,
        name: str = "interference",
    ) -> None:
        unknown = sorted(set(figures) - set(SCORES))
        directions = {"auto", "adam", "sgd", "state"}
        check_values(
            "InterferenceMonitor",
            ("loss_reduction", loss_reduction, loss_reduction in {"auto", "mean", "token_mean", "sum"}, "auto, mean, token_mean or sum"),
            ("every_n_steps", every_n_steps, every_n_steps >= 1, "at least 1"),
            ("max_samples_per_task", max_samples_per_task, max_samples_per_task >= 2, "at least 2"),
            ("max_cache_gb", max_cache_gb, max_cache_gb > 0, "a positive number"),
            ("storage", storage, storage in {"auto", "exact", "factors", "summed", "sampled"}, "auto, exact, summed or sampled"),
            ("storage", storage, probe is None or storage not in {"summed", "sampled"}, "auto or exact: a probe measures exact gradients"),
            ("update_direction", update_direction, update_direction in directions, "auto, adam, sgd or state"),
            ("verify", verify, verify in VERIFY, "first_batch or off"),
            ("update_direction", update_direction, probe is None or update_direction != "state", "auto, adam or sgd with a probe"),
            ("max_memory_gb", max_memory_gb, max_memory_gb > 0, "a positive number"),
            ("cache_dir", cache_dir, cache_dir is None or not is_remote(cache_dir), "a local folder: files are renamed and mapped"),
            *number_rules(damping, step_size, fisher_decay, num_hot_cells),
            ("figures", list(figures), not unknown, f"a list of some of {', '.join(SCORES)}"),
        )  # fmt: skip
        self.task_of = task_of
        self.sample_id_of = sample_id_of
        self.loss_reduction: ReductionChoice = loss_reduction
        self.num_target_tokens_of = num_target_tokens_of
        self.token_samples_of = token_samples_of
        self.group_of = group_of
        self.sample_text_of = sample_text_of
        self.every_n_steps = every_n_steps
        self.max_samples_per_task = max_samples_per_task
        self.max_cache_gb = max_cache_gb
        self.storage: Storage = "factors" if storage == "exact" else storage
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.fisher_decay = fisher_decay
        self.damping = damping
        self.update_direction: Literal["auto", "adam", "sgd", "state"] = update_direction
        self.step_size = step_size
        self.num_hot_cells = num_hot_cells
        self.figures = tuple(figures)
        self.projections = projections
        self.verify: Verify = verify
        self.probe = probe
        self.probe_loss = probe_loss
        self.max_memory_gb = max_memory_gb
        self.keep_cache = keep_cache
        self.name = name
        self.heatmap: InterferenceHeatmap | None = None
        budget = Budget(max_samples_per_task, int(max_cache_gb * 2**30), int(max_memory_gb * 2**30))
        self._recording = Recording(self.storage, budget)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._results: Results | None = None
        self._restored: dict[str, Any] | None = None
        self._projections: list[Projection] = []
        self._has_begun = False
        self._failed_loggers: set[int] = set()
        self._seen: set[str] = set()

    @property
    def state_key(self) -> str:
        """Two monitors in one Trainer are told apart by name."""
        return self._generate_state_key(name=self.name)

    # When to capture

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be right.

        Raises:
            ValueError: If the strategy is one under which gradients would be wrong.
        """
        check_strategy(trainer, self.probe is not None)
        self._has_begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the results go."""
        if not self._goes_on(trainer):
            # Whatever an earlier training left.
            self.heatmap, self._failed_loggers, self._seen = None, set(), set()
            self._results = Results(Processes.of(trainer).from_first(self._results_folder(trainer)))
            self._cache_folder(self._results)

    def _goes_on(self, trainer: Trainer) -> bool:
        """Whether ``fit`` was called again."""
        return self._restored is None and trainer.global_step > 0 and self._recording.store is not None

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Place the heads, install the taps and open the cache, of a new run or of that of a checkpoint."""
        self._has_begun = True
        self._projections = place_heads(trainer, pl_module, batch, self.projections, self.verify)
        processes = Processes.of(trainer)
        if self.probe is None:
            self._recording.tap(pl_module, self._projections, self.loss_reduction, processes)
        if self._goes_on(trainer):
            self._recording.reopen(self._projections)
        elif self._results is not None:
            state, self._restored = self._restored, None
            self._recording.open(self._cache_folder(self._results), self._projections, processes, state)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch one batch of every n; at the first one, begin.

        Raises:
            ArchitectureError: If the heads cannot be placed, or are not where they are said to be.
        """
        if not self._has_begun:
            self._begin(trainer, pl_module, batch)
        # Stochastic weight averaging passes over the data once more to count its batch norms, without
        # learning.
        if not trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward:
            self._recording.start(self.every_n_steps)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Note how the loss is made of its samples, and what it was multiplied with."""
        accumulated = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._recording.note_loss(loss, accumulated, getattr(trainer.precision_plugin, "scaler", None))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One backward pass is all of an automatic step; an optimiser may evaluate it again (L-BFGS, SAM)."""
        if pl_module.automatic_optimization:
            self._recording.pause()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hand over what was captured to be written."""
        # training_step may skip a batch: then it has no output.
        labels = None if outputs is None else partial(self._labels, batch)
        processes = Processes.of(trainer)
        self._recording.finish(labels, processes)
        self._seen |= tasks_at_hand(batch, self.task_of)
        if self._recording.fold_is_due:
            self._recording.fold(self._projections, self.fisher_decay, processes, pl_module.device)

    def _labels(self, batch: Any) -> Labels:
        return read_labels(
            batch,
            self.task_of,
            self.sample_id_of,
            self.num_target_tokens_of,
            self.token_samples_of,
            self.group_of,
            self.sample_text_of,
        )

    # When to measure

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, except in the sanity check and outside of ``fit``."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._measure(trainer, pl_module)
            stand_in(trainer, self.name)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where there is no validation."""
        if not trainer.enable_validation:
            self._measure(trainer, pl_module)
            stand_in(trainer, self.name)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what came after the last validation, and say so where nothing could be measured."""
        if self._recording.has_news:
            self._measure(trainer, pl_module, at_the_end=True)
        if self.heatmap is None:
            self._recording.explain_nothing()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the cache, unless something needs it."""
        if not self.keep_cache:
            self._recording.clear(Processes.of(trainer))

    def _measure(self, trainer: Trainer, pl_module: LightningModule, at_the_end: bool = False) -> None:
        processes = Processes.of(trainer)
        if not self._recording.is_ready(processes):
            return
        self._recording.has_news = False
        if self.probe is not None:
            heatmap = self._measure_probe(trainer, pl_module, self.probe)
        else:
            own = [one for one in self._projections if processes.takes(one.layer)]
            settings, rates = self._settings(trainer), self._rates(trainer, pl_module)
            with progress_task(trainer.progress_bar_callback, len(own)) as advance:
                heatmap = self._recording.measure(
                    pl_module, self._projections, settings, processes, rates, advance
                )
        if heatmap is not None:
            self.heatmap = replace(heatmap, step=trainer.global_step, epoch=trainer.current_epoch)
            self._publish(trainer, pl_module, self.heatmap, at_the_end)
            if self.probe is None:
                self._tell_of_missing(self.heatmap)

    def _tell_of_missing(self, heatmap: InterferenceHeatmap) -> None:
        missing = self._seen - set(heatmap.tasks)
        if missing:
            warnings.warn(
                f"{', '.join(map(repr, sorted(missing)))}: in the training batches, but not in the heatmap. One batch of every "
                f"{self.every_n_steps} is captured, and none of them held such a sample yet. Lower `every_n_steps`.",
                stacklevel=2,
            )
            self._seen -= missing

    def _measure_probe(
        self, trainer: Trainer, pl_module: LightningModule, probe: str | Probe
    ) -> InterferenceHeatmap | None:
        with trainer.precision_plugin.train_step_context():
            try:
                return probe_interference(
                    pl_module,
                    find_probe(probe, getattr(trainer, "datamodule", None), pl_module),
                    loss=self.probe_loss,
                    loss_reduction=self.loss_reduction,
                    task_of=self.task_of,
                    sample_id_of=self.sample_id_of,
                    num_target_tokens_of=self.num_target_tokens_of,
                    group_of=self.group_of,
                    sample_text_of=self.sample_text_of,
                    projections=self._projections,
                    settings=self._settings(trainer),
                    processes=Processes.of(trainer),
                    max_memory_gb=self.max_memory_gb,
                )
            except CacheError as error:
                self._recording.switch_off(error)
                return None

    def _settings(self, trainer: Trainer) -> ScoreSettings:
        return ScoreSettings(
            self.damping, self._update(trainer), self.step_size, self.fisher_decay, self.num_hot_cells
        )

    def _update(self, trainer: Trainer) -> UpdateDirection:
        if self.update_direction in {"adam", "sgd"}:
            return self.update_direction
        return "adam" if any("betas" in optimizer.defaults for optimizer in trainer.optimizers) else "sgd"

    def _rates(self, trainer: Trainer, pl_module: LightningModule) -> Rates | None:
        if self.update_direction != "state":
            return None
        return {
            (projection.layer, projection.block): adaptive_rates(pl_module, projection, trainer.optimizers)
            for projection in self._projections
            if find_map(pl_module, projection).is_trainable
        }

    # Where it shows

    def _publish(
        self, trainer: Trainer, pl_module: LightningModule, heatmap: InterferenceHeatmap, at_the_end: bool
    ) -> None:
        values = {f"{self.name}/{key}": value for key, value in scalars(heatmap).items()}
        if not at_the_end:  # Lightning takes no scalars any more
            # For callbacks alone: the loggers' own get few of them, at the step of the heatmap.
            pl_module.log_dict(
                values,
                logger=False,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                sync_dist=trainer.world_size > 1,
            )
        if not trainer.is_global_zero or self._results is None:
            return
        publication = Publication.of(heatmap, self.figures, self.name)
        try:
            self._results.write(partial(write_files, publication))
        except (OSError, ValueError, ImportError) as error:
            warnings.warn(f"The interference heatmap could not be written: {error}", stacklevel=2)
        drawn = {*(f"{self.name}/{key}" for key in charts(heatmap)), *watched_scalars(trainer, self.name)}
        sent = {key: value for key, value in values.items() if key in drawn}
        send_scalars(trainer.loggers, sent, heatmap.step, self._failed_loggers)
        send(trainer.loggers, publication, self._failed_loggers)
        print_beside_bar(trainer.progress_bar_callback, epoch_lines(heatmap, self._results.folder))

    @property
    def results(self) -> Path | str | None:
        """Folder of ``latest.json``, ``snapshots/`` and ``figures/``, once training has started.

        An URL if it is remote.
        """
        if self._results is None:
            return None
        return self._results.folder if self._results.is_remote else Path(self._results.folder)

    # What outlives a run

    def state_dict(self) -> dict[str, Any]:
        """Counters, and where the cache is."""
        return self._recording.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state until training starts; the cache is opened then."""
        self._restored = dict(state_dict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what a restart from this checkpoint needs."""
        self._recording.note_checkpoint()

    def _results_folder(self, trainer: Trainer) -> str:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._temporary = tempfile.TemporaryDirectory(prefix="qkov-")
            return self._temporary.name
        return results_folder(trainer, self.name)

    def _cache_folder(self, results: Results) -> Path:
        """Where the cache goes.

        Raises:
            ValueError: If the results are remote, and no folder is given.
        """
        if self.cache_dir is None and results.is_remote:
            raise ValueError(
                f"The results go to {results.folder}, where no cache can be: its files are renamed and mapped into memory. "
                "Pass `cache_dir=<a local folder>`."
            )
        return self.cache_dir or Path(results.folder) / "cache"

    # When it ends

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found; after Ctrl-C, measure what was captured first."""
        try:
            if (
                isinstance(exception, KeyboardInterrupt)
                and trainer.world_size == 1
                and self._results is not None
            ):
                self._recording.discard()
                if self._recording.has_news:
                    self._measure(trainer, pl_module, at_the_end=True)
        finally:
            self._clean_up()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self._clean_up()

    def _clean_up(self) -> None:
        try:
            self._recording.close()
        finally:
            if self._temporary:
                self._temporary.cleanup()
                self._temporary, self._results, self._recording.store = None, None, None
