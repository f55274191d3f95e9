"""Which cells do harm for sure: what the scores of a heatmap come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats

from qkov_lightning.measure.cells import Cell
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.jackknife import jackknife_error

HARM = "loss_rise"
"""The score that says how much a task is hurt: the only one in units of its loss."""

ALPHA = 0.05
"""Share of wrong cells among those that are called sure (Benjamini & Hochberg 1995)."""


@dataclass(frozen=True)
class PairVerdict:
    """What training ``task_b`` does to ``task_a``, cell by cell.

    Attributes:
        task_a: Task that is hurt or helped.
        task_b: Task that pushes.
        num_cells: Cells that were tested.
        harmful: Those in which the loss of task A rises for sure, the largest rise first.
        helpful: Those in which it falls for sure, the largest fall first.
        rise: Predicted rise of the loss of task A, all cells together.
        standard_error: Of the rise. Where the heatmap does not know how cells vary together, the sum of their
            errors, which it is at most.
    """

    task_a: str
    task_b: str
    num_cells: int
    harmful: tuple[Cell, ...]
    helpful: tuple[Cell, ...]
    rise: float
    standard_error: float

    @property
    def num_undecided(self) -> int:
        """Cells of which the samples do not tell whether they help or hurt."""
        return self.num_cells - len(self.harmful) - len(self.helpful)


@dataclass(frozen=True)
class Verdict:
    """What the task pairs of a heatmap do to each other.

    Attributes:
        pairs: Every judged pair.
        alpha: Share of wrong cells among the sure ones.
    """

    pairs: tuple[PairVerdict, ...]
    alpha: float

    @property
    def harmful(self) -> tuple[Cell, ...]:
        """Cells with sure harm in any pair, the largest rise of a loss first."""
        return tuple(sorted((cell for pair in self.pairs for cell in pair.harmful), key=lambda c: -c.value))


def judge(
    heatmap: InterferenceHeatmap, pairs: Sequence[tuple[str, str]] | None = None, alpha: float = ALPHA
) -> Verdict:
    """Tell the cells in which one task surely hurts or helps another from those that the samples leave open.

    Each cell's predicted rise of the loss (``loss_rise``) is compared with its standard error by a t test of
    both sides, all cells of all pairs together corrected by Benjamini & Hochberg (1995).

    Args:
        heatmap: What to judge.
        pairs: Ordered task pairs (hurt, pushing); all pairs of different tasks by default.
        alpha: Share of wrong cells, in expectation, among those that are called sure.

    Returns:
        The verdict. Cells without data are not judged.

    Raises:
        ValueError: If the heatmap has no ``loss_rise``, or does not know a task.
    """
    if HARM not in heatmap.scores:
        raise ValueError(
            f"The heatmap has no {HARM!r} ({', '.join(heatmap.scores)}), which says how much a task is hurt: measure it "
            "again."
        )
    pairs = heatmap.task_pairs if pairs is None else pairs
    cells = [heatmap.cells(a, b, HARM) for a, b in pairs]
    every = [cell for own in cells for cell in own]
    sure = dict(zip(every, _are_sure(heatmap, every, alpha), strict=True))
    return Verdict(
        tuple(
            PairVerdict(
                a,
                b,
                len(own),
                harmful=tuple(cell for cell in own if sure[cell] and cell.value > 0),
                helpful=tuple(cell for cell in reversed(own) if sure[cell] and cell.value < 0),
                rise=sum(cell.value for cell in own),
                standard_error=_error_of_sum(heatmap, a, b, own),
            )
            for (a, b), own in zip(pairs, cells, strict=True)
        ),
        alpha,
    )


def _are_sure(heatmap: InterferenceHeatmap, cells: Sequence[Cell], alpha: float) -> list[bool]:
    if not cells:
        return []
    value = np.array([cell.value for cell in cells])
    error = np.array([cell.standard_error for cell in cells])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, np.abs(value) / error, np.where(value == 0, 0.0, np.inf))
    p_value = 2 * special.stdtr(np.array([_freedom(heatmap, cell) for cell in cells]), -t)
    return (stats.false_discovery_control(p_value) <= alpha).tolist()


def _freedom(heatmap: InterferenceHeatmap, cell: Cell) -> int:
    """Degrees of freedom of a standard error: those of the groups left out, or of the smaller task."""
    known = heatmap.notes.get("degrees_of_freedom")
    if isinstance(known, int) and known > 0:
        return known
    counts = heatmap.num_samples[:, cell.layer, cell.head, "QKVO".index(cell.block)]
    return max(1, int(min(counts[heatmap.tasks.index(task)] for task in (cell.task_a, cell.task_b))) - 1)


def _error_of_sum(heatmap: InterferenceHeatmap, a: str, b: str, cells: Sequence[Cell]) -> float:
    replicates = heatmap.replicates.get(HARM)
    if replicates is None:
        return sum(cell.standard_error for cell in cells)
    own = replicates[:, heatmap.tasks.index(a), heatmap.tasks.index(b)]
    return float(jackknife_error(torch.nansum(own.flatten(1), dim=1)))
