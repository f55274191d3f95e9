"""Two heatmaps to a verdict: did interference rise beyond noise, and where?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkov_lightning.heatmap import InterferenceHeatmap
from qkov_lightning.projections import BLOCKS, Block

FALLING = ("cosine",)
"""Scores that fall when interference rises."""


class NotComparableError(ValueError):
    """The two heatmaps do not measure the same cells."""


@dataclass(frozen=True)
class DriftedCell:
    """A cell in which interference rose.

    Attributes:
        score: Score that shows it.
        task_a: Task whose sensitivity is measured.
        task_b: Task that pushes.
        layer: Position of the layer.
        head: Head within the block.
        block: "Q", "K", "V" or "O".
        baseline: Value in the baseline.
        current: Value now.
        standard_error: Standard error of the difference.
        p_value: Chance of such a rise without drift beyond the tolerance, adjusted for the number of cells.
    """

    score: str
    task_a: str
    task_b: str
    layer: int
    head: int
    block: Block
    baseline: float
    current: float
    standard_error: float
    p_value: float


@dataclass(frozen=True)
class DriftReport:
    """Verdict on a pair of heatmaps.

    Attributes:
        cells: Cells that drifted, the surest first.
        num_cells: Cells that were compared, over all pairs and scores.
        tolerance: Rise that is allowed.
        alpha: Share of false alarms that is allowed.
    """

    cells: tuple[DriftedCell, ...]
    num_cells: int
    tolerance: float
    alpha: float

    @property
    def drifted(self) -> bool:
        """Whether any cell drifted."""
        return bool(self.cells)


def check_drift(
    baseline: InterferenceHeatmap,
    current: InterferenceHeatmap,
    *,
    scores: Sequence[str] = ("relative", "cosine"),
    tolerance: float = 0.05,
    alpha: float = 0.05,
) -> DriftReport:
    """Compare every cell of every pair of different tasks.

    A cell drifts if its score rose (fell, for ``cosine``) by more than the tolerance, by a one-sided z-test
    of the difference with the standard errors of both heatmaps, corrected over all cells and scores by
    Benjamini & Hochberg (1995).

    Args:
        baseline: What is accepted.
        current: What is judged.
        scores: Scores to judge by, dimensionless ones by default.
        tolerance: Rise that is allowed, in units of the score.
        alpha: False discovery rate; without any drift, the chance of a false alarm.

    Returns:
        The report.

    Raises:
        NotComparableError: If tasks, head maps or scores differ, or a cell has data in one of the two only.
        ValueError: If the tolerance is negative or alpha is outside (0, 1).
    """
    if tolerance < 0 or not 0 < alpha < 1:
        raise ValueError(
            f"tolerance is {tolerance} and alpha {alpha}, expected tolerance >= 0 and 0 < alpha < 1."
        )
    _check_comparable(baseline, current, scores)
    different = ~torch.eye(len(baseline.tasks), dtype=torch.bool)
    cells, p_values, deltas = [], [], []
    for score in scores:
        old, new = baseline.scores[score], current.scores[score]
        rise = (old - new) if score in FALLING else (new - old)
        error = (baseline.standard_errors[score].square() + current.standard_errors[score].square()).sqrt()
        index = (different[:, :, None, None, None] & ~old.isnan()).nonzero()
        at = tuple(index.T)
        excess = rise[at] - tolerance
        z = torch.where(error[at] > 0, excess / error[at], torch.where(excess > 0, torch.inf, -torch.inf))
        cells += [(score, *row) for row in index.tolist()]
        p_values.append(torch.special.ndtr(-z))
        deltas.append(error[at])
    p_value, errors = _adjusted(torch.cat(p_values)), torch.cat(deltas)
    drifted = []
    for position in (p_value <= alpha).nonzero().flatten().tolist():
        score, a, b, layer, head, block = cells[position]
        drifted.append(
            DriftedCell(
                score, baseline.tasks[a], baseline.tasks[b], layer, head, BLOCKS[block],
                float(baseline.scores[score][a, b, layer, head, block]),
                float(current.scores[score][a, b, layer, head, block]),
                float(errors[position]), float(p_value[position]),
            )
        )  # fmt: skip
    drifted.sort(key=lambda cell: cell.p_value)
    return DriftReport(tuple(drifted), len(cells), tolerance, alpha)


def _adjusted(p_values: Tensor) -> Tensor:
    """Benjamini-Hochberg: the smallest false discovery rate at which each test would be reported."""
    order = p_values.argsort(descending=True)
    rank = torch.arange(len(p_values), 0, -1, dtype=p_values.dtype)
    adjusted = torch.empty_like(p_values)
    adjusted[order] = (p_values[order] * len(p_values) / rank).cummin(dim=0).values.clamp(max=1)
    return adjusted


def _check_comparable(
    baseline: InterferenceHeatmap, current: InterferenceHeatmap, scores: Sequence[str]
) -> None:
    if baseline.tasks != current.tasks:
        raise NotComparableError(
            f"The baseline has tasks {baseline.tasks}, the current heatmap {current.tasks}."
        )
    maps = [
        [{b: (i.num_heads, i.query_group) for b, i in layer.blocks.items()} for layer in h.layers]
        for h in (baseline, current)
    ]
    if maps[0] != maps[1]:
        raise NotComparableError("The two heatmaps come from models with different layers or heads.")
    for score in scores:
        if score not in baseline.scores or score not in current.scores:
            raise NotComparableError(
                f"Score {score!r} is not in both heatmaps; they have {list(current.scores)}."
            )
        lost = baseline.scores[score].isnan() != current.scores[score].isnan()
        if bool(lost.any()):
            a, b, layer, head, block = lost.nonzero()[0].tolist()
            raise NotComparableError(
                f"{int(lost.sum())} values of {score!r} have data in only one of the heatmaps, the first at "
                f"{baseline.tasks[a]} x {baseline.tasks[b]}, L{layer}.H{head}.{BLOCKS[block]}. Missing data is not "
                "'no drift': measure both with at least two samples of every task."
            )
        if bool(baseline.scores[score].isnan().all()):
            raise NotComparableError(f"Neither heatmap has any data for {score!r}.")
