"""The ``qkov`` command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from rich.console import Console

from qkov_lightning.heatmap import HeatmapError, InterferenceHeatmap, printable
from qkov_lightning.projections import Block
from qkov_lightning.report import find_latest, find_step, load_history, write_report
from qkov_lightning.tables import COLUMNS, SelectionError, select, selected_rows, to_csv, to_json
from qkov_lightning.terminal import markdown_table, overview


def show(
    run: Path,
    pair: str | None = None,
    block: Block | None = None,
    score: str = "interference",
    top: int | None = None,
    step: int | None = None,
    format: Literal["table", "json", "csv", "markdown"] = "table",
) -> None:
    """Show a heatmap in the terminal, or print it for another program.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is shown).
        pair: One task pair, as in the names of scalars and figures: ``<task_a>__<task_b>``.
        block: One block.
        score: Score to draw and to sort by.
        top: Most cells per task pair; 10 in a table, all of them in json and csv.
        step: A snapshot instead of the newest heatmap.
        format: "table" for people, "json", "csv" or "markdown" for everything else.
    """
    heatmap = load_run(run) if step is None else InterferenceHeatmap.load(find_step(run, step))
    if top is None and format in {"table", "markdown"}:
        top = 10
    selection = select(heatmap, pair, score, block, top)
    if format == "table":
        Console().print(overview(heatmap, selection))
    elif format == "markdown":
        for a, b in selection.pairs:
            title = f"{printable(b)} pushes on {printable(a)}: {selection.score}"
            sys.stdout.write(f"**{title}**\n\n{markdown_table(heatmap, a, b, selection)}\n\n")
    elif format == "csv":
        sys.stdout.write(to_csv(COLUMNS, selected_rows(heatmap, selection)))
    else:
        sys.stdout.write(to_json(COLUMNS, selected_rows(heatmap, selection)) + "\n")


def report(runs: list[Path], output: Path = Path("report.html")) -> None:
    """Write one self-contained HTML page that opens without a network.

    Args:
        runs: Heatmap files, or folders that hold one somewhere below with its snapshots.
        output: The page.
    """
    write_report([load_history(run) for run in runs], output)
    Console().print(f"Wrote {output}", soft_wrap=True, highlight=False)


def load_run(run: Path) -> InterferenceHeatmap:
    """The newest heatmap at or below a path."""
    return InterferenceHeatmap.load(find_latest(run))


def main() -> None:
    """Entry point of the ``qkov`` command."""
    try:
        auto_cli(
            {"show": show, "report": report},
            args=_arguments(sys.argv[1:]),
            description="See where in a transformer several tasks interfere.",
        )
    except (FileNotFoundError, HeatmapError, SelectionError, ModuleNotFoundError) as error:
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
