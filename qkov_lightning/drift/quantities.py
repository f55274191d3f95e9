"""What is judged of two heatmaps: every cell, the mean of every block, the maximum of every task pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qkov_lightning.measure.certainty import jackknife_error
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.scores import SCORES

ROUNDING = 1e-5
"""Share of the largest value that float32 arithmetic may have added: no standard error is less."""


Kind = Literal["cell", "block mean", "maximum"]


KINDS: tuple[Kind, ...] = ("cell", "block mean", "maximum")


@dataclass(frozen=True, eq=False)
class Quantities:
    """All quantities of one kind of one pair and score: flat tensors, one entry each."""

    kind: Kind
    score: str
    tasks: tuple[str, str]
    places: list[tuple[int, int, int]]
    baseline: Tensor
    current: Tensor
    standard_error: Tensor


def judged_pairs(num_tasks: int, score: str) -> list[tuple[int, int]]:
    """Pairs of different tasks, each once if the score is symmetric."""
    ordered = [(a, b) for a in range(num_tasks) for b in range(num_tasks) if a != b]
    return [(a, b) for a, b in ordered if a < b or not SCORES[score].symmetric]  # judged once a pair


def quantities_of(
    baseline: InterferenceHeatmap,
    current: InterferenceHeatmap,
    score: str,
    old_pair: tuple[int, int],
    new_pair: tuple[int, int],
    measured: Bool[Tensor, "layer head block"],
    same_samples: bool,
) -> list[Quantities]:
    """The cells, block means and the maximum of one task pair and score."""
    places = [(layer, head, block) for layer, head, block in measured.nonzero().tolist()]
    old, new = _cells(baseline, score, old_pair, measured), _cells(current, score, new_pair, measured)
    tasks = (baseline.tasks[old_pair[0]], baseline.tasks[old_pair[1]])
    every = torch.eye(len(places), dtype=old.values.dtype)
    cells = Quantities(
        "cell", score, tasks, places, old.values, new.values, _rise_error(old, new, every, same_samples)
    )

    blocks = torch.tensor([block for _, _, block in places])
    present = blocks.unique()
    shares = (blocks == present[:, None]).to(every)
    shares /= shares.sum(dim=1, keepdim=True)
    means = Quantities(
        "block mean", score, tasks, [(-1, -1, block) for block in present.tolist()],
        shares @ old.values, shares @ new.values, _rise_error(old, new, shares, same_samples),
    )  # fmt: skip

    # The variance of a maximum is at most the largest variance (Gaussian Poincare inequality). Where the
    # maximum moves from cell to cell, what samples have in common need not cancel.
    sign = -1 if SCORES[score].falling else 1
    at_old, at_new = (int((sign * one.values).argmax()) for one in (old, new))
    maximum = Quantities(
        "maximum", score, tasks, [places[at_new]],
        old.values[at_old : at_old + 1], new.values[at_new : at_new + 1],
        torch.hypot(old.errors.max(), new.errors.max()).unsqueeze(0),
    )  # fmt: skip
    return [cells, means, maximum]


@dataclass(frozen=True, eq=False)
class _Cells:
    """The judged cells of one pair and score of one heatmap."""

    values: Float[Tensor, cell]
    errors: Float[Tensor, cell]
    replicates: Float[Tensor, "group cell"] | None


def _cells(
    heatmap: InterferenceHeatmap,
    score: str,
    pair: tuple[int, int],
    measured: Bool[Tensor, "layer head block"],
) -> _Cells:
    replicates = heatmap.replicates.get(score)
    return _Cells(
        heatmap.scores[score][pair][measured],
        heatmap.standard_errors[score][pair][measured],
        None if replicates is None else replicates[:, pair[0], pair[1]][:, measured],
    )


def _rise_error(
    old: _Cells, new: _Cells, weights: Float[Tensor, "quantity cell"], same_samples: bool
) -> Float[Tensor, quantity]:
    """Standard error of the rise of weighted means of the cells."""
    if same_samples and old.replicates is not None and new.replicates is not None:
        error = jackknife_error((new.replicates - old.replicates) @ weights.T)
    else:
        # How cells vary together is not used: were they one and the same cell up to scale, the standard error
        # of the mean would be the mean of the standard errors; it is never more.
        error = torch.hypot(weights @ old.errors, weights @ new.errors)
    return error.clamp(min=ROUNDING * float(torch.stack([old.values, new.values]).abs().max()))
