"""What callbacks that act on optimiser steps have in common: when they act, and on which cells."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qkov_lightning.heads.projections import Projection
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.verdict import Verdict
from qkov_lightning.scores.scores import HARM, SCORES
from qkov_lightning.views.tables import select

CELL = re.compile(r"L(\d+)\.H(\d+)\.([QKVO])")
"""Name of a cell."""


class StepCallback(Callback):
    """Acts before and after every optimiser step, and when a batch ends, since weights may move outside."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    @abstractmethod
    def _before_step(self, *_: Any) -> None:
        """Note what the step must not change."""

    @abstractmethod
    def _after_step(self, *_: Any) -> None:
        """Undo what the step must not change."""

    @abstractmethod
    def _let_go(self) -> None:
        """Hold no weight of the model any more."""

    def _watch_steps(self, trainer: Trainer) -> None:
        """Hook the steps of every optimiser."""
        for optimizer in trainer.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Undo what moved outside of a step."""
        self._after_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimisers as they were found."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimisers as they were found."""
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._let_go()


def worst_cells(
    heatmap: InterferenceHeatmap,
    projections: Sequence[Projection],
    pair: str | None = None,
    score: str = HARM,
    top: int | None = None,
) -> tuple[tuple[str, ...], Verdict]:
    """The cells of a heatmap that surely hurt a task.

    Args:
        heatmap: Where they are chosen.
        projections: Head map of the model.
        pair: Task pair that they are chosen for, ``<task_a>__<task_b>``; all pairs by default.
        score: Score by which one of them is worse than another.
        top: Most cells; all by default.

    Returns:
        Their names, the worst first, none if none surely hurts; and the verdict that says so.

    Raises:
        ValueError: If the heatmap is of another model.
    """
    modules = {name: one.module_name for one in projections for name in one.cell_names}
    selection = select(heatmap, pair, score)
    # Corrected for the cells of all pairs, as everywhere: the same cells are sure in every view.
    whole = heatmap.verdict
    verdict = replace(whole, pairs=tuple(heatmap[pair] for pair in selection.pairs))
    harmful = {(cell.task_a, cell.task_b, cell.name) for cell in verdict.harmful}
    worst: dict[str, float] = {}
    for a, b in selection.pairs:
        for cell in selection.cells(heatmap, a, b):
            if (a, b, cell.name) in harmful:
                harm = -cell.value if SCORES[score].falling else cell.value
                worst[cell.name] = max(harm, worst.get(cell.name, harm))
            info = heatmap.layers[cell.layer].blocks[cell.block]
            module = modules.get(cell.name)
            if module != info.module_name:
                raise ValueError(
                    f"The heatmap's {cell.name} is in `{info.module_name}`, which in this model is "
                    f"{'no cell' if module is None else f'`{module}`'}. Expected a heatmap of this model."
                )
    return tuple(sorted(worst, key=lambda name: -worst[name])[:top]), verdict


def nothing_sure(verdict: Verdict, source: object) -> str:
    """The message where no cell surely hurts."""
    cells = sum(pair.num_cells for pair in verdict.pairs)
    return (
        f"no cell of {str(source)!r} surely hurts a task: in none of {cells} is the predicted rise of the loss beyond what its "
        f"standard error allows (at {verdict.alpha:.0%} of wrong cells)."
    )
