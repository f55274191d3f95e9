"""Commands that read results: show, report, gate, diff, baseline, clean."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console

from qkov_lightning.drift.drift import DEFAULT_SCORES
from qkov_lightning.drift.gate import Format, judge, load_baseline
from qkov_lightning.heads.projections import Block
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label, printable
from qkov_lightning.scores.scores import HARM
from qkov_lightning.store.leftovers import find_leftovers, remove_cache
from qkov_lightning.views.report import write_report
from qkov_lightning.views.runs import find_latest, find_step, load_history
from qkov_lightning.views.screen import screen
from qkov_lightning.views.tables import COLUMNS, select, selected_rows, to_csv, to_json
from qkov_lightning.views.terminal import details, markdown_table, roll_ups

BASELINE = Path("interference-baseline.json")


def show(
    run: Path,
    pair: str | None = None,
    block: Block | None = None,
    score: str | None = None,
    top: int | None = None,
    step: int | None = None,
    heads: bool = False,
    all: bool = False,
    format: Literal["table", "json", "csv", "markdown"] = "table",
) -> None:
    """Print the verdict on a run: who hurts whom, in which head, how sure, and what to do now.

    One screen; the options show more.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is shown).
        pair: One task pair in detail, ``<task_a>__<task_b>``: the task that is hurt first.
        block: One block.
        score: Score to draw and to sort by; loss_rise without it.
        top: Most cells per task pair; 10 in a table, all of them in json and csv.
        step: A snapshot instead of the newest heatmap.
        heads: What heads, layers and blocks come to.
        all: Every pair in detail.
        format: "table" for people, "json", "csv" or "markdown" for everything else.
    """
    heatmap = InterferenceHeatmap.load(find_latest(run) if step is None else find_step(run, step))
    if top is None and format in {"table", "markdown"}:
        top = 10
    selection = select(heatmap, pair, score or HARM, block, top)
    console = Console()
    if format == "table" and heads:
        for a, b in selection.pairs:
            if a != b or len(heatmap.tasks) == 1:
                console.print(roll_ups(heatmap, a, b, top or 10))
    elif format == "table" and not (all or pair or score or block):
        console.print(screen(heatmap, _typed(run)))
    elif format == "table":
        console.print(details(heatmap, selection))
    elif format == "markdown":
        for a, b in selection.pairs:
            title = printable(f"{pair_label(a, b)}: {selection.score}")
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


def clean(run: Path, dry_run: bool = False) -> None:
    """Remove the gradient caches that trainings left behind. Heatmaps, tables and pictures stay.

    Checkpoints of these trainings can still be resumed; the next heatmap then rests on new samples only.

    Args:
        run: Folder of a run, or one above.
        dry_run: Only say what there is.
    """
    total = 0
    for leftover in find_leftovers(run):
        size, where = f"{leftover.num_bytes / 2**20:.3g} MiB", leftover.directory
        if leftover.in_use:
            sys.stdout.write(f"in use    {size:>10}  {where}\n")
            continue
        if not dry_run:
            remove_cache(leftover.directory)
        total += leftover.num_bytes
        sys.stdout.write(f"{'would go' if dry_run else 'removed':<9} {size:>10}  {where}\n")
    sys.stdout.write(f"{total / 2**20:.3g} MiB {'would be free' if dry_run else 'are free'}\n")


def gate(
    run: Path,
    baseline: Path = BASELINE,
    tolerance: float = 0.05,
    alpha: float = 0.05,
    scores: tuple[str, ...] = DEFAULT_SCORES,
    min_samples: int = 16,
    format: Format = "text",
    junitxml: Path | None = None,
) -> int:
    """Fail if interference rose beyond noise.

    Exit status: 0 no drift, 1 drift, 2 wrong usage, 3 not comparable.

    Never writes the baseline: `qkov baseline update` does. Where the environment has GITHUB_STEP_SUMMARY, the
    report is added to that file in Markdown.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is judged).
        baseline: File of the heatmap that is accepted.
        tolerance: Rise that is allowed, in units of the score; of a score without a natural range, as a share
            of its largest clear value in the baseline.
        alpha: Chance of a false alarm that is allowed.
        scores: Scores to judge by.
        min_samples: Samples that every task needs.
        format: text, markdown, json or github (annotations).
        junitxml: File for a report as JUnit XML.
    """
    command = _update_command(run, baseline)
    verdict = judge(
        lambda: load_baseline(baseline, command),
        lambda: _load_run(run),
        update_command=command,
        format=format,
        scores=scores,
        tolerance=tolerance,
        alpha=alpha,
        min_samples=min_samples,
    )
    if junitxml is not None:
        junitxml.parent.mkdir(parents=True, exist_ok=True)
        junitxml.write_text(verdict.junit, encoding="utf-8")
    if os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
            summary.write(verdict.summary + "\n")
    sys.stdout.write(verdict.output)
    return verdict.status


def diff(a: Path, b: Path, tolerance: float = 0.0, format: Format = "text") -> None:
    """Show what rose from one heatmap to another. Exit status 0, whatever it finds.

    Args:
        a: A heatmap file, or a folder that holds one somewhere below (the newest is taken).
        b: The same, for the later heatmap.
        tolerance: Rise that is not worth a word, as for `qkov gate`.
        format: text, markdown, json or github (annotations).
    """
    verdict = judge(
        lambda: _load_run(a), lambda: _load_run(b), format=format, tolerance=tolerance, min_samples=2
    )
    sys.stdout.write(verdict.output)


def update_baseline(run: Path, baseline: Path = BASELINE) -> None:
    """Accept a heatmap as the baseline of `qkov gate`.

    Args:
        run: A heatmap file, or a folder that holds one somewhere below (the newest is taken).
        baseline: File to write.
    """
    heatmap = _load_run(run)
    heatmap.save(baseline)
    counts = ", ".join(f"{task} {count}" for task, count in heatmap.samples_per_task.items())
    sys.stdout.write(f"{baseline}: step {heatmap.step}, samples: {printable(counts)}\n")


def _typed(run: Path) -> str:
    return shlex.quote(str(run))


def _load_run(run: Path) -> InterferenceHeatmap:
    return InterferenceHeatmap.load(find_latest(run))


def _update_command(run: Path, baseline: Path) -> str:
    return shlex.join(["qkov", "baseline", "update", str(run), "--baseline", str(baseline)])
