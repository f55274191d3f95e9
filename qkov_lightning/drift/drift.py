r"""Two heatmaps to a verdict: did interference rise beyond noise, and where?

Judged are every cell, the mean of every block and the maximum of every task pair. For each of them

.. math:: t = (\text{rise} - \text{tolerance} \cdot \text{unit}) / s

against Student's distribution. The unit of a score in a natural range is 1; that of any other is its largest
value in the baseline that is beyond two standard errors: a tolerance of 0.05 allows a twentieth of what the
worst cell had. Where both heatmaps measured the same samples, s is the standard error of the
rise itself, from leaving the same samples out of both: what the samples have in common cancels. Otherwise
:math:`s^2 = s_0^2 + s_1^2` with the standard errors of the two heatmaps (Welch 1947), and the least degrees
of freedom that Welch's formula can give: those of the heatmap that has fewer. A heatmap has one less than its
smallest task has samples, or what its notes say of how its standard errors were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats

from qkov_lightning.drift.comparability import NotComparableError, check_comparable
from qkov_lightning.drift.quantities import KINDS, Kind, Quantities, judged_pairs, quantities_of
from qkov_lightning.heads.projections import BLOCKS, Block
from qkov_lightning.measure.certainty import largest_clear_of
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.scores import HARM, SCORES

NUM_NEAREST = 10

DEFAULT_SCORES = (HARM, "relative", "cosine")
"""What the gate judges by: the score of the verdict, and two that do not depend on the units of the loss."""


@dataclass(frozen=True)
class Finding:
    """One quantity that was judged.

    Attributes:
        kind: A cell, the mean of a block over layers and heads, or the maximum over all cells.
        score: Score that shows it.
        task_a: Task whose sensitivity is measured.
        task_b: Task that pushes.
        layer: Position of the layer; None for the mean of a block.
        layer_name: Label of the layer; None for the mean of a block.
        head: Head within the block; None for the mean of a block.
        block: "Q", "K", "V" or "O". For a maximum: where it is now, like ``layer`` and ``head``.
        baseline: Value in the baseline.
        current: Value now.
        rise: Growth of interference: ``current - baseline``, the other way round for a score that falls.
        standard_error: Standard error of the rise.
        lower_bound: Lower confidence bound of the rise, corrected for the number of quantities judged
            (Benjamini & Yekutieli 2005): above the tolerance exactly where there is drift.
        p_value: Chance of such a rise without drift beyond the tolerance, adjusted in the same way
            (Benjamini & Hochberg 1995).
    """

    kind: Kind
    score: str
    task_a: str
    task_b: str
    layer: int | None
    layer_name: str | None
    head: int | None
    block: Block
    baseline: float
    current: float
    rise: float
    standard_error: float
    lower_bound: float
    p_value: float

    @property
    def name(self) -> str:
        """Short name, as in ``L15.H8.O``, ``mean of O`` or ``maximum (L15.H8.O)``."""
        if self.kind == "block mean":
            return f"mean of {self.block}"
        cell = f"L{self.layer}.H{self.head}.{self.block}"
        return cell if self.kind == "cell" else f"maximum ({cell})"


@dataclass(frozen=True)
class DriftReport:
    """Verdict on a pair of heatmaps.

    Attributes:
        findings: What drifted: cells first, then block means, then maxima, the one with the highest lower
            bound first.
        nearest: The ten surest of what did not.
        num_tests: Quantities that were judged.
        scores: Scores that were judged.
        tasks: Tasks that were compared.
        tolerance: Rise that is allowed, in the units of the module's formula.
        alpha: Chance of a false alarm that is allowed.
        num_samples: Samples of the smallest task, in the baseline and now.
        same_samples: Whether the two were measured on the same samples, and compared group by group.
    """

    findings: tuple[Finding, ...]
    nearest: tuple[Finding, ...]
    num_tests: int
    scores: tuple[str, ...]
    tasks: tuple[str, ...]
    tolerance: float
    alpha: float
    num_samples: tuple[int, int]
    same_samples: bool

    @property
    def drifted(self) -> bool:
        """Whether anything drifted."""
        return bool(self.findings)

    @property
    def cells(self) -> tuple[Finding, ...]:
        """Cells that drifted, the one with the highest lower bound first."""
        return tuple(finding for finding in self.findings if finding.kind == "cell")


def check_drift(
    baseline: InterferenceHeatmap,
    current: InterferenceHeatmap,
    *,
    scores: Sequence[str] = DEFAULT_SCORES,
    tolerance: float = 0.05,
    alpha: float = 0.05,
    min_samples: int = 16,
) -> DriftReport:
    """Judge every cell, block mean and maximum of every pair of different tasks.

    A quantity drifts if the lower confidence bound of its rise, corrected for all quantities by Benjamini &
    Hochberg (1995), exceeds the tolerance. Where nothing drifts, the chance of any alarm is at most
    ``alpha``.

    Args:
        baseline: What is accepted.
        current: What is judged.
        scores: Scores to judge by; the one of the verdict and two dimensionless ones by default.
        tolerance: Rise that is allowed: of a score with a natural range in its own units, of any other as a
            share of its largest clear value in the baseline.
        alpha: False discovery rate; without any drift, the chance of a false alarm.
        min_samples: Samples that every task needs in every cell. Standard errors from fewer are too rough.

    Returns:
        The report.

    Raises:
        NotComparableError: If tasks, head maps, scores or conditions differ, data is missing, or there are
            too few samples.
        ValueError: If the tolerance is negative, alpha is outside (0, 0.5), or ``min_samples`` is below 2.
    """
    if not 0 <= tolerance < float("inf") or not 0 < alpha < 0.5 or min_samples < 2 or not scores:
        raise ValueError(
            f"tolerance is {tolerance}, alpha {alpha}, min_samples {min_samples} and scores {list(scores)}, expected "
            "tolerance >= 0, 0 < alpha < 0.5, min_samples >= 2 and at least one score."
        )
    scores = tuple(dict.fromkeys(scores))
    measured = check_comparable(baseline, current, scores)
    order = [current.tasks.index(task) for task in baseline.tasks]
    num_samples = (
        int(baseline.num_samples[:, measured].min()),
        int(current.num_samples[order][:, measured].min()),
    )
    if min(num_samples) < min_samples:
        raise NotComparableError(
            f"The smallest task has {num_samples[0]} samples in the baseline and {num_samples[1]} in the current heatmap, "
            f"expected at least {min_samples}: measure more samples of every task, or lower min_samples."
        )
    same_samples = _measured_the_same_samples(baseline, current, scores)
    judged = [
        quantity
        for score in scores
        for a, b in judged_pairs(len(baseline.tasks), score)
        for quantity in quantities_of(
            baseline, current, score, (a, b), (order[a], order[b]), measured, same_samples
        )
    ]
    freedom = min(
        _degrees_of_freedom(heatmap, count)
        for heatmap, count in zip((baseline, current), num_samples, strict=True)
    )
    units = {score: _unit(baseline, score) for score in scores}
    return _decide(judged, baseline, num_samples, same_samples, freedom, scores, tolerance, units, alpha)


def _unit(baseline: InterferenceHeatmap, score: str) -> float:
    """What the tolerance is counted in."""
    return 1.0 if SCORES[score].natural_range is not None else largest_clear_of(baseline, score)


def _degrees_of_freedom(heatmap: InterferenceHeatmap, num_samples: int) -> int:
    freedom = heatmap.notes.get("degrees_of_freedom", num_samples - 1)
    if not isinstance(freedom, int) or freedom < 1:
        raise NotComparableError(
            f"A heatmap says that its standard errors have {freedom!r} degrees of freedom, expected a whole number of at "
            "least 1: measure it again."
        )
    return freedom


def _measured_the_same_samples(
    baseline: InterferenceHeatmap, current: InterferenceHeatmap, scores: Sequence[str]
) -> bool:
    """Whether both have values without each group, and the groups hold the same samples."""
    both = (baseline, current)
    samples = {heatmap.notes.get("samples") for heatmap in both}
    groups = {len(heatmap.replicates.get(score, ())) for heatmap in both for score in scores}
    return None not in samples and len(samples) == 1 and len(groups) == 1 and 0 not in groups


def _decide(
    judged: Sequence[Quantities],
    baseline: InterferenceHeatmap,
    num_samples: tuple[int, int],
    same_samples: bool,
    freedom: int,
    scores: tuple[str, ...],
    tolerance: float,
    units: Mapping[str, float],
    alpha: float,
) -> DriftReport:
    old, new, error = (
        torch.cat([getattr(one, name) for one in judged]).double().numpy()
        for name in ("baseline", "current", "standard_error")
    )
    sign = np.concatenate([
        np.full(len(one.places), -1.0 if SCORES[one.score].falling else 1.0) for one in judged
    ])
    rise = sign * (new - old) + 0.0  # no minus zero
    excess = rise - tolerance * np.concatenate([np.full(len(one.places), units[one.score]) for one in judged])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, excess / error, np.where(excess > 0, np.inf, -np.inf))
    raw = special.stdtr(freedom, -t)
    p_value = stats.false_discovery_control(raw)
    drifted = p_value <= alpha
    level = alpha * max(1, int(drifted.sum())) / len(raw)
    lower = rise + special.stdtrit(freedom, level) * error
    origin = [(one, place) for one in judged for place in one.places]

    def finding(index: int) -> Finding:
        one, (layer, head, block) = origin[index]
        somewhere = one.kind != "block mean"
        return Finding(
            kind=one.kind,
            score=one.score,
            task_a=one.tasks[0],
            task_b=one.tasks[1],
            layer=layer if somewhere else None,
            layer_name=baseline.layers[layer].name if somewhere else None,
            head=head if somewhere else None,
            block=BLOCKS[block],
            baseline=float(old[index]),
            current=float(new[index]),
            rise=float(rise[index]),
            standard_error=float(error[index]),
            lower_bound=float(lower[index]),
            p_value=float(p_value[index]),
        )

    surest = np.lexsort((-rise, -t, raw)).tolist()
    found = sorted(
        (finding(index) for index in surest if drifted[index]),
        # By how much there is at least: a small rise that is surer than a large one is not the worse.
        key=lambda one: (KINDS.index(one.kind), -one.lower_bound),
    )
    nearest = [index for index in surest if not drifted[index]][:NUM_NEAREST]
    return DriftReport(
        findings=tuple(found),
        nearest=tuple(map(finding, nearest)),
        num_tests=len(raw),
        scores=scores,
        tasks=baseline.tasks,
        tolerance=tolerance,
        alpha=alpha,
        num_samples=num_samples,
        same_samples=same_samples,
    )
