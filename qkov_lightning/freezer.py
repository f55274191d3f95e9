"""The Lightning callback that keeps cells fixed while everything else trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from qkov_lightning.capture.first_batch import Verify, place_heads
from qkov_lightning.heads.projections import Projection
from qkov_lightning.heads.slices import FrozenSlice
from qkov_lightning.heads.weights import find_weight
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.verdict import Verdict
from qkov_lightning.monitor import InterferenceMonitor
from qkov_lightning.scores.scores import HARM, SCORES
from qkov_lightning.stepping import CELL, StepCallback, nothing_sure, worst_cells
from qkov_lightning.views.runs import find_latest

NOTHING_FROZEN = "Nothing is frozen. Measure more samples, or name the cells."


class HeadFreezer(StepCallback):
    """Freezes cells: their weights are bit-identical after every optimiser step, while all others train.

    Before each step the gradients of the frozen slices are set to zero, so that they count neither for
    gradient clipping nor for the optimiser's moments. Their values are noted when a batch begins and put back
    after every step and when the batch ends, so that momentum, weight decay and optimisers that move weights
    outside of their ``step`` (SAM) cannot move them. Moments that were there before fade out, as under zero
    gradients.

    A head of Q, K or V owns its entries of the bias too; the bias of O belongs to all heads together and
    trains. Under grouped-query attention a K or V head serves several query heads; the report at the start of
    training names them.

    The cells are a list, or come from a heatmap (a file, or that of the monitor in the same Trainer): those
    that hurt a task for sure, in the sense of :func:`~qkov_lightning.judge`, the worst by the score first. Of
    a monitor, the first heatmap within the range that has such cells decides; the choice goes into
    checkpoints. What they are predicted to spare the task is logged.

    Args:
        cells: Names of cells, as in ``["L15.H8.O"]``.
        heatmap: Heatmap file, or folder of a run.
        monitor: Name of the ``InterferenceMonitor`` in the same Trainer.
        score: Score by which one of the cells is worse than another: ``loss_rise``, or ``exchange`` for the
            harm per gain of the task that trains.
        pair: Task pair that they are chosen for, ``<task_a>__<task_b>``; the worst over all pairs by default.
        top: Most cells to choose from a heatmap; all that surely hurt by default.
        start_step: Optimiser step at which freezing starts.
        stop_step: Optimiser step at which it ends; never by default.
        start_epoch: Epoch at which it starts.
        stop_epoch: Epoch at which it ends; never by default.
        projections: Head map; by default the one that names give, or derivatives where names are wrong or
            unknown.
        verify: "first_batch" proves the head map on the first sample of the first batch, "off" leaves that
            out; see :class:`~qkov_lightning.InterferenceMonitor`.

    Raises:
        ValueError: If there is not exactly one source of cells, a name is no cell, or a number is out of
            range; at the start of training, if no cell of the heatmap surely hurts.

    Example:
        >>> freezer = HeadFreezer(["L15.H8.O", "L3.H0.K"], stop_epoch=2)
        >>> freezer = HeadFreezer(heatmap="runs/demo", pair="math__code", top=8)
    """

    def __init__(
        self,
        cells: Sequence[str] | None = None,
        heatmap: str | Path | None = None,
        monitor: str | None = None,
        score: str = HARM,
        pair: str | None = None,
        top: int | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        projections: Sequence[Projection] | None = None,
        verify: Verify = "first_batch",
    ) -> None:
        if sum(source is not None for source in (cells, heatmap, monitor)) != 1:
            raise ValueError("HeadFreezer: expected exactly one of cells, heatmap and monitor.")
        if cells is not None and (top is not None or pair is not None):
            raise ValueError("HeadFreezer: top and pair choose from a heatmap, expected none beside cells.")
        if score not in SCORES:
            raise ValueError(f"HeadFreezer: score is {score!r}, expected one of {', '.join(SCORES)}.")
        if top is not None and top < 1:
            raise ValueError(f"HeadFreezer: top is {top}, expected at least 1.")
        for unit, start, stop in (("step", start_step, stop_step), ("epoch", start_epoch, stop_epoch)):
            if start < 0 or (stop is not None and stop <= start):
                raise ValueError(
                    f"HeadFreezer: start_{unit} is {start} and stop_{unit} {stop}, expected 0 <= start < stop."
                )
        super().__init__()
        self.heatmap, self.monitor = heatmap, monitor
        self.score, self.pair, self.top = score, pair, top
        self.start_step, self.stop_step = start_step, stop_step
        self.start_epoch, self.stop_epoch = start_epoch, stop_epoch
        self.projections, self.verify = projections, verify
        self.cells: tuple[str, ...] = () if cells is None else tuple(dict.fromkeys(cells))
        """Names of the cells that are frozen, or will be; empty until a heatmap has decided."""
        self.num_frozen = 0
        """Weights and biases in them, over all processes."""
        self._map: dict[str, tuple[Projection, int]] = {}
        self._slices: list[FrozenSlice] = []
        self._thawed = False
        self._has_begun = False
        self._in_range = False
        self._undecided: InterferenceHeatmap | None = None
        for name in self.cells:
            if not CELL.fullmatch(name):
                raise ValueError(f"HeadFreezer: {name!r} is no cell, expected a name such as 'L15.H8.O'.")

    def thaw(self) -> None:
        """Let everything train again, from the next step on."""
        self._thawed = True

    # When

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the steps of every optimiser."""
        self._has_begun = False
        if self.monitor is not None and trainer.global_step == 0:
            self.cells = ()  # those of an earlier training
            self._slices, self.num_frozen = [], 0
        self._watch_steps(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Place the heads, choose the cells if they come from a file, and find their weights.

        Raises:
            ValueError: If no cell of the file surely hurts.
        """
        self._has_begun = True
        projections = place_heads(trainer, pl_module, batch, self.projections, self.verify)
        self._map = {
            name: (projection, head)
            for projection in projections
            for head, name in enumerate(projection.cell_names)
        }
        if self.heatmap is not None and not self.cells:
            heatmap = InterferenceHeatmap.load(find_latest(Path(self.heatmap)))
            verdict = self._choose(heatmap)
            if not self.cells:
                raise ValueError(f"HeadFreezer: {nothing_sure(verdict, self.heatmap)} {NOTHING_FROZEN}")
        if self.cells:
            self._find_slices(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See whether this batch is in the range, and whether the monitor has a new heatmap by now.

        Raises:
            ValueError: At the first batch, if no cell of the file surely hurts, or the heads cannot be
                placed.
        """
        if not self._has_begun:
            self._begin(trainer, pl_module, batch)
        self._in_range = (
            self.start_step <= trainer.global_step < (self.stop_step or 2**62)
            and self.start_epoch <= trainer.current_epoch < (self.stop_epoch or 2**62)
            and not self._thawed
        )
        if self.monitor is not None and not self.cells and self._in_range:
            heatmap = _find_monitor(trainer, self.monitor).heatmap
            if heatmap is not None and heatmap is not self._undecided:
                verdict = self._choose(heatmap)
                if self.cells:
                    self._find_slices(pl_module)
                else:
                    self._undecided = heatmap
                    rank_zero_info(f"HeadFreezer: {nothing_sure(verdict, self.monitor)} {NOTHING_FROZEN}")
        for one in self._slices:
            one.forget()
            if self._is_active:
                one.remember()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Remove the gradients, before they are clipped."""
        if self._is_active:
            for one in self._slices:
                one.remove_gradient()

    @property
    def _is_active(self) -> bool:
        return self._in_range and not self._thawed

    def _before_step(self, *_: Any) -> None:
        if self._is_active:
            for one in self._slices:
                one.remove_gradient()

    def _after_step(self, *_: Any) -> None:
        if self._is_active:
            for one in self._slices:
                one.put_back()

    # What

    def _choose(self, heatmap: InterferenceHeatmap) -> Verdict:
        """Take the worst cells of a heatmap that surely hurt; none if there is none."""
        projections = [projection for projection, _ in self._map.values()]
        self.cells, verdict = worst_cells(heatmap, projections, self.pair, self.score, self.top)
        for pair in verdict.pairs:
            own = [cell for cell in pair.harmful if cell.name in self.cells]
            if own:
                rank_zero_info(
                    f"HeadFreezer: training {pair.task_b!r} is predicted to raise the loss of {pair.task_a!r} by "
                    f"{sum(cell.value for cell in own):.3g} in {len(own)} of these cells (standard error at most "
                    f"{sum(cell.standard_error for cell in own):.1g}), and by {pair.rise:.3g} in all {pair.num_cells}."
                )
        return verdict

    def _find_slices(self, model: nn.Module) -> None:
        """Find the weights of the cells, and say how many they are.

        Raises:
            ValueError: If the model has no such cell, or its weights cannot be frozen.
        """
        self._slices, self.num_frozen = [], 0
        features: dict[tuple[str, int], list[int]] = {}
        notes = []
        for name in self.cells:
            if name not in self._map:
                raise ValueError(f"The model has no cell {name}; it has {_range(list(self._map))}.")
            projection, head = self._map[name]
            weight = find_weight(model, projection)
            own = projection.head_features[head].tolist()
            features.setdefault((weight.parameter_name, weight.axis), []).extend(own)
            if weight.bias_name is not None:
                features.setdefault((weight.bias_name, 0), []).extend(own)
            group = projection.query_group
            if group > 1:
                served = ", ".join(str(head * group + i) for i in range(group))
                notes.append(f"{name} serves the query heads {served}")
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for (name, axis), indices in features.items():
            parameter = model.get_parameter(name)
            self._slices.append(FrozenSlice(parameter, axis, indices))
            self.num_frozen += len(indices) * parameter.numel() // parameter.shape[axis]
            others = [other for other in names[id(parameter)] if other != name]
            if others:
                notes.append(f"`{name}` is the same weight as `{'`, `'.join(others)}`")
        total = sum(parameter.numel() for parameter in model.parameters())
        rank_zero_info(
            f"HeadFreezer: {self.num_frozen:,} of {total:,} weights do not train, in {len(self.cells)} cells: "
            f"{', '.join(self.cells) or 'none'}." + "".join(f" {note}." for note in notes)
        )

    # What outlives a run

    def state_dict(self) -> dict[str, Any]:
        """The cells, and whether they were thawed."""
        return {"cells": list(self.cells), "thawed": self._thawed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the cells that a heatmap had decided on."""
        if not self.cells:
            self.cells = tuple(state_dict["cells"])
        self._thawed = bool(state_dict["thawed"])

    def _let_go(self) -> None:
        self._slices = []


def _find_monitor(trainer: Trainer, name: str) -> InterferenceMonitor:
    """The monitor of that name.

    Raises:
        ValueError: If the trainer has none.
    """
    monitors = {one.name: one for one in trainer.callbacks if isinstance(one, InterferenceMonitor)}  # type: ignore[attr-defined]
    if name not in monitors:
        raise ValueError(
            f"HeadFreezer: the Trainer has no InterferenceMonitor named {name!r}; it has {', '.join(monitors) or 'none'}. "
            "Add InterferenceMonitor() to its callbacks."
        )
    return monitors[name]


def _range(names: list[str]) -> str:
    return f"{names[0]} to {names[-1]}" if len(names) > 8 else ", ".join(names)
