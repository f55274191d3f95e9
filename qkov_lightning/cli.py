"""The ``qkov`` command."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from qkov_lightning.heatmap import HeatmapError, InterferenceHeatmap
from qkov_lightning.terminal import overview


def show(run: Path, top: int = 10) -> None:
    """Show a heatmap in the terminal.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is shown).
        top: Number of hottest cells per task pair.
    """
    Console().print(overview(load_run(run), top))


def load_run(run: Path) -> InterferenceHeatmap:
    """The newest heatmap at or below a path.

    Raises:
        FileNotFoundError: If there is none.
    """
    if run.is_file():
        return InterferenceHeatmap.load(run)
    found = sorted(run.rglob("latest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"No heatmap at {run}: expected a heatmap file, or a folder with a `latest.json` below."
        )
    return InterferenceHeatmap.load(found[-1])


def main() -> None:
    """Entry point of the ``qkov`` command."""
    try:
        auto_cli({"show": show}, description="See where in a transformer several tasks interfere.")
    except (FileNotFoundError, HeatmapError) as error:
        sys.exit(f"qkov: {error}")
