"""The answer on one screen of 80 x 24, and in six lines after an epoch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label, printable, readable
from qkov_lightning.measure.verdict import PairVerdict, Verdict
from qkov_lightning.views.answer import (
    direction,
    headline,
    next_steps,
    plus_minus,
    predicted_rise,
    roles,
    short_headline,
    short_pair_answer,
    sufficiency,
)
from qkov_lightning.views.terminal import HELPS, HURTS

LINES = 23
"""Lines of the screen, one left for the prompt."""

MAX_LINES = 3
"""Task pairs with a line after an epoch."""

MAX_TASKS = 5
MAX_NAME = 9
WITH_ERRORS = 3
"""Tasks up to which the table has room for standard errors."""


def epoch_lines(heatmap: InterferenceHeatmap, run: str | None = None) -> Group:
    """The answer after an epoch: at most six lines, however many tasks there are.

    Args:
        heatmap: The result.
        run: Where the rest is, as ``qkov show`` takes it.
    """
    verdict = heatmap.verdict
    lines = [Text.assemble((f"Interference, {heatmap.when}: ", "bold"), short_headline(verdict))]
    lines += [Text(f"  {short_pair_answer(pair)}") for pair in verdict.pairs[:MAX_LINES] if pair.harmful]
    if (enough := sufficiency(verdict)) is not None:
        lines.append(Text(f"  {enough}"))
    if run is not None:
        lines.append(Text(f"  More: qkov show {run}"))
    return Group(*map(_one_line, lines))


def screen(heatmap: InterferenceHeatmap, run: str) -> Group:
    """The verdict on one screen of 80 x 24: who hurts whom, where, how sure, and what to do now.

    Args:
        heatmap: The result.
        run: Where it is, as the user typed it.
    """
    verdict = heatmap.verdict
    head: list[RenderableType] = [
        Text(f"Interference, {heatmap.when}", style="bold"),
        Text(headline(verdict)),
        "",
    ]
    tasks = _shown_tasks(heatmap)
    hidden = len(heatmap.tasks) - len(tasks)
    pairs: list[RenderableType] = [
        Text("Rise of the loss of each row's task when the column's task trains, by all heads", style="dim"),
        _rises(heatmap, tasks),
    ]
    if hidden:
        pairs.append(Text(f"{hidden} more tasks: add --all", style="dim"))
    facts = [Text(line) for line in (roles(verdict), sufficiency(verdict)) if line]
    steps = next_steps(heatmap, run)
    table = len(tasks) + 1  # of which `pairs` counts one
    titles_and_blanks = 5
    used = len(head) + len(pairs) - 1 + table + len(facts) + len(steps) + titles_and_blanks
    worst = _worst(verdict, max(1, LINES - used))
    return Group(*head, *pairs, "", *worst, *facts, "", *_steps(steps))


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    text.plain = printable(text.plain)
    return text


def _shown_tasks(heatmap: InterferenceHeatmap) -> list[str]:
    """The tasks of the worst pairs, in the order of the heatmap."""
    first = dict.fromkeys(task for pair in heatmap.verdict.pairs for task in pair.tasks)
    return [task for task in heatmap.tasks if task in list(first)[:MAX_TASKS]]


def _short(name: str) -> str:
    name = printable(readable(name))
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _rises(heatmap: InterferenceHeatmap, tasks: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True, min_width=max(len(_short(task)) for task in tasks))
    for task in tasks:
        table.add_column(Text(f"<- {_short(task)}"), justify="left", no_wrap=True)
    judged = {pair.tasks: pair for pair in heatmap.verdict.pairs}
    for a in tasks:
        row = [Text(_short(a), style="bold")]
        for b in tasks:
            pair = judged.get((a, b))
            if pair is None or not pair.num_cells:
                row.append(Text("·" if a == b else "no data", style="dim"))
                continue
            rise = predicted_rise(pair) if len(tasks) <= WITH_ERRORS else f"{pair.rise:+.2g}"
            style = {"hurts": "red", "helps": "blue"}.get(direction(pair), "")
            row.append(Text(f"{rise} {_counts(pair, len(tasks) <= WITH_ERRORS)}", style=style))
        table.add_row(*row)
    return table


def _counts(pair: PairVerdict, both: bool) -> str:
    """Cells that surely hurt, and where there is room those that help, as in ``5! 2+``."""
    counts = ((len(pair.harmful), HURTS), (len(pair.helpful) if both else 0, HELPS))
    return " ".join(f"{count}{mark}" for count, mark in counts if count)


def _worst(verdict: Verdict, room: int) -> list[RenderableType]:
    """As many of the worst cells as there is room for, and what the marks mean."""
    if not verdict.worst:
        return []
    title = "Worst cells" if verdict.harmful else "Largest rises, none of them sure"
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for cell in verdict.worst[:room]:
        pair = verdict.pair(cell.task_a, cell.task_b)
        share = f"{pair.share(cell):.0%} of this pair's sure harm" if cell in pair.harmful else "undecided"
        value = plus_minus(cell.value, cell.standard_error, signed=True)
        label = Text(printable(pair_label(cell.task_a, cell.task_b)), no_wrap=True, overflow="ellipsis")
        table.add_row(f"  {cell.name}", label, value, share)
    return [
        Text.assemble(
            (title, "bold"), (f"   (above: n{HURTS} cells surely hurt, n{HELPS} surely help)", "dim")
        ),
        table,
        "",
    ]


def _steps(steps: Sequence[tuple[str, str]]) -> list[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for purpose, command in steps:
        table.add_row(f"  {purpose}", Text(command))
    return [Text("Next", style="bold"), table]
