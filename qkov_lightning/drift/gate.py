"""The gate of a continuous integration: a verdict with an exit status, and what to write where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qkov_lightning.drift.comparability import NotComparableError
from qkov_lightning.drift.drift import DEFAULT_SCORES, check_drift
from qkov_lightning.drift.reports import FORMATS, as_junit, as_markdown, junit_error, refusal
from qkov_lightning.measure.encoding import HeatmapError
from qkov_lightning.measure.heatmap import InterferenceHeatmap

Format = Literal["text", "markdown", "json", "github"]

PASSED, DRIFTED, WRONG_USAGE, NOT_COMPARABLE = range(4)
"""Exit statuses: a build that fails with 1 has drift, and nothing else has."""


@dataclass(frozen=True)
class Verdict:
    """What the gate decided.

    Attributes:
        status: Exit status: 0 passed, 1 drifted, 3 not comparable.
        output: The report in the format that was asked for.
        summary: The same in Markdown.
        junit: The same as JUnit XML.
    """

    status: int
    output: str
    summary: str
    junit: str


def judge(
    load_baseline: Callable[[], InterferenceHeatmap],
    load_current: Callable[[], InterferenceHeatmap],
    *,
    update_command: str = "",
    format: Format = "text",
    scores: Sequence[str] = DEFAULT_SCORES,
    tolerance: float = 0.05,
    alpha: float = 0.05,
    min_samples: int = 16,
) -> Verdict:
    """Compare a heatmap with a baseline.

    Args:
        load_baseline: Gives the heatmap that is accepted.
        load_current: Gives the heatmap to judge.
        update_command: Command that accepts the heatmap as the baseline, for people to copy.
        format: How the output reads.
        scores: As for ``check_drift``.
        tolerance: As for ``check_drift``.
        alpha: As for ``check_drift``.
        min_samples: As for ``check_drift``.

    Returns:
        The verdict; what cannot be compared is one too.

    Raises:
        ValueError: If a setting is out of range.
    """
    try:
        report = check_drift(
            load_baseline(),
            load_current(),
            scores=scores,
            tolerance=tolerance,
            alpha=alpha,
            min_samples=min_samples,
        )
    except (NotComparableError, HeatmapError) as error:
        message = str(error)
        return Verdict(
            NOT_COMPARABLE, refusal(message, format), refusal(message, "markdown"), junit_error(message)
        )
    return Verdict(
        DRIFTED if report.drifted else PASSED,
        FORMATS[format](report, update_command),
        as_markdown(report, update_command),
        as_junit(report),
    )


def load_baseline(path: Path, update_command: str) -> InterferenceHeatmap:
    """The baseline in a file, which is only read.

    Raises:
        NotComparableError: If there is none.
        HeatmapError: If the file is no heatmap, or one of another schema.
    """
    try:
        return InterferenceHeatmap.load(path)
    except OSError as error:
        raise NotComparableError(
            f"No baseline can be read at {path} ({error.strerror}). Accept the current heatmap as the baseline: "
            f"{update_command}"
        ) from error
