"""Which cells of a score get a mark, and what the mark says."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qkov_lightning.measure.certainty import sure_signs
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.scores import SCORES

NOISE = 3.0
"""Combined standard errors by which a cell of a score without a sign must differ from the control."""


def marks_of(heatmap: InterferenceHeatmap, a: str, b: str, score: str) -> Float[Tensor, "layer head block"]:
    """Marks of one score of one task pair.

    Args:
        heatmap: The result.
        a: Task that is hurt.
        b: Task that pushes.
        score: Which score.

    Returns:
        1 and -1 where there is a mark, 0 elsewhere. Of a score with a sign, 1 where the tasks surely
        interfere and -1 where they surely help, corrected for the number of cells
        (:func:`~qkov_lightning.measure.certainty.sure_signs`). Of any other score, 1 above and -1 below the
        within-task control by more than noise.
    """
    if SCORES[score].signed:
        return sure_signs(heatmap, score, _judged_with(heatmap, a, b))[a, b].nan_to_num()
    sign = (heatmap.values(a, b, score) - heatmap.values(a, a, score)).sign()
    return torch.where(differs_from_control(heatmap, a, b, score), sign, 0.0)


def differs_from_control(
    heatmap: InterferenceHeatmap, a: str, b: str, score: str
) -> Bool[Tensor, "layer head block"]:
    """Cells in which b's push on a differs from a's push on itself by more than noise.

    Noise is ``NOISE`` combined standard errors. The two values share the samples of a, so this is a coarse
    guide to the eye, not a test corrected for the number of cells: of a thousand cells without any
    difference, about three are marked.

    Args:
        heatmap: The result.
        a: Task whose sensitivity is measured.
        b: Task that pushes.
        score: Which score.

    Returns:
        True where they differ; never where either has no data.
    """
    difference = heatmap.values(a, b, score) - heatmap.values(a, a, score)
    errors = heatmap.errors(a, b, score), heatmap.errors(a, a, score)
    return difference.abs() > NOISE * torch.hypot(*errors)


def meaning_of_marks(score: str) -> tuple[str, str]:
    """What the marks 1 and -1 of a score say, in a few words."""
    if not SCORES[score].signed:
        return "above the within-task control", "below it"
    return ("surely opposed", "surely aligned") if SCORES[score].falling else ("surely hurts", "surely helps")


def _judged_with(heatmap: InterferenceHeatmap, a: str, b: str) -> tuple[tuple[str, str], ...]:
    """The pairs that are corrected for together: as in the verdict, or the control alone."""
    return heatmap.task_pairs if (a, b) in heatmap.task_pairs else ((a, b),)
