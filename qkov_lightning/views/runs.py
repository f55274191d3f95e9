"""Where the heatmaps of a run are: the newest, one of a step, or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.views.tables import SelectionError


@dataclass(frozen=True, eq=False)
class RunHistory:
    """The heatmaps of one run.

    Attributes:
        name: What the page calls the run.
        heatmaps: Oldest first, at least one.
    """

    name: str
    heatmaps: tuple[InterferenceHeatmap, ...]


def find_latest(run: Path) -> Path:
    """The heatmap file of a run.

    Args:
        run: A heatmap file, or a folder with a ``latest.json`` somewhere below (the newest is taken).

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is none.
    """
    if run.is_file():
        return run
    found = sorted(run.rglob("latest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"No heatmap at {run}: expected a heatmap file, or a folder with a `latest.json` below."
        )
    return found[-1]


def find_step(run: Path, step: int) -> Path:
    """The snapshot of a run at a step.

    Args:
        run: As for ``find_latest``.
        step: Optimiser steps done.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is no heatmap.
        SelectionError: If there is none of that step.
    """
    folder = find_latest(run).parent / "snapshots"
    path = folder / f"step_{step:08d}.json"
    if not path.is_file():
        steps = ", ".join(
            str(int(found.stem.removeprefix("step_"))) for found in sorted(folder.glob("step_*.json"))
        )
        raise SelectionError(f"No snapshot of step {step} in {folder}; there are {steps or 'none'}.")
    return path


def load_history(run: Path) -> RunHistory:
    """Every snapshot of a run; a single file is a history of one.

    Args:
        run: As for ``find_latest``.

    Returns:
        The history.

    Raises:
        FileNotFoundError: If there is no heatmap.
        HeatmapError: If a file is no heatmap.
    """
    latest = find_latest(run)
    snapshots = sorted((latest.parent / "snapshots").glob("step_*.json")) if latest != run else []
    heatmaps = [InterferenceHeatmap.load(path) for path in snapshots or [latest]]
    return RunHistory(str(run), tuple(heatmaps))
