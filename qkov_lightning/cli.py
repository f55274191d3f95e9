"""The ``qkov`` command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from qkov_lightning.heatmap import HeatmapError, InterferenceHeatmap
from qkov_lightning.report import find_latest, load_history, write_report
from qkov_lightning.terminal import overview


def show(run: Path, top: int = 10) -> None:
    """Show a heatmap in the terminal.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is shown).
        top: Number of hottest cells per task pair.
    """
    Console().print(overview(InterferenceHeatmap.load(find_latest(run)), top))


def report(runs: list[Path], output: Path = Path("report.html")) -> None:
    """Write one self-contained HTML page that opens without a network.

    Args:
        runs: Heatmap files, or folders that hold one somewhere below with its snapshots.
        output: The page.
    """
    write_report([load_history(run) for run in runs], output)
    Console().print(f"Wrote {output}", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point of the ``qkov`` command."""
    try:
        auto_cli(
            {"show": show, "report": report},
            args=_arguments(sys.argv[1:]),
            description="See where in a transformer several tasks interfere.",
        )
    except (FileNotFoundError, HeatmapError, ModuleNotFoundError) as error:
        sys.exit(f"qkov: {error}")


def _arguments(given: list[str]) -> list[str]:
    """``report RUN... -o FILE`` in the form of the parser, which takes a list as one argument in JSON."""
    if given[:1] != ["report"]:
        return given
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("-o", "--output")
    known, rest = parser.parse_known_args(given[1:])
    runs = [json.dumps(known.runs)] if known.runs else []
    return ["report", *runs, *(["--output", known.output] if known.output else []), *rest]
