"""The verdict in words: the same sentences in the terminal, loggers, notebooks and the report."""

from __future__ import annotations

import math

from qkov_lightning.measure.cells import Cell
from qkov_lightning.measure.certainty import CLEAR
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_key, pair_label, readable
from qkov_lightning.measure.verdict import PairVerdict, Verdict


def headline(verdict: Verdict) -> str:
    """How many cells surely hurt and help: the first thing to say."""
    hurt, help_, cells = len(verdict.harmful), len(verdict.helpful), verdict.num_cells
    if not cells:
        return "No cell has data of two tasks yet."
    undecided = f"{cells - hurt - help_} are undecided"
    if not hurt:
        return f"No cell does sure harm: of {cells} cells {help_} surely {_do(help_, 'help')}, {undecided}."
    return f"{hurt} of {cells} cells surely {_do(hurt, 'hurt')} a task, {help_} surely {_do(help_, 'help')}, {undecided}."


def short_headline(verdict: Verdict) -> str:
    """The headline in half a line."""
    hurt, help_, cells = len(verdict.harmful), len(verdict.helpful), verdict.num_cells
    if not cells:
        return "no cell has data of two tasks yet"
    if not hurt:
        return f"no sure harm in {cells} cells, {help_} surely {_do(help_, 'help')}"
    return f"{hurt} of {cells} cells surely {_do(hurt, 'hurt')}, {help_} {_do(help_, 'help')}"


def roles(verdict: Verdict) -> str | None:
    """Who is hurt most and who pushes most; None without sure harm."""
    if verdict.most_affected is None or verdict.most_pushing is None:
        return None
    return f"Hurt most: {readable(verdict.most_affected)}. Pushes most: {readable(verdict.most_pushing)}."


def sufficiency(verdict: Verdict) -> str | None:
    """What the samples can see, and what more of them would decide; None without data."""
    known = verdict.sufficiency
    if known is None or not math.isfinite(known.visible):
        return None
    seen = f"{known.num_samples} samples a task show rises of {known.visible:.1g}"
    if not known.decides:
        return f"{seen}; a few more would decide nothing."
    return f"{seen}; {known.more_samples} more would decide ~{known.decides} {_cells(known.decides)}."


def predicted_rise(pair: PairVerdict) -> str:
    """Rise of the loss of the pair's first task, all cells together, with its standard error."""
    return plus_minus(pair.rise, pair.standard_error, signed=True)


def direction(pair: PairVerdict) -> str:
    """What the rise as a whole comes to, beyond two standard errors: hurts, helps, or nothing."""
    if not abs(pair.rise) >= CLEAR * pair.standard_error or not pair.rise:
        return ""
    return "hurts" if pair.rise > 0 else "helps"


def cell_answer(cell: Cell, pair: PairVerdict) -> str:
    """A cell with its rise, its error, and what it does.

    The verb follows the sign: hurts and helps where that is sure, else undecided.
    """
    value = plus_minus(cell.value, cell.standard_error, signed=True)
    share = f", {pair.share(cell):.0%} of the sure harm" if cell in pair.harmful else ""
    return f"{cell.name} {verb(cell, pair)}: {value}{share}"


def verb(cell: Cell, pair: PairVerdict) -> str:
    """What training the second task in this cell does to the first: hurts, helps, or undecided."""
    return "hurts" if cell in pair.harmful else "helps" if cell in pair.helpful else "undecided"


def pair_answer(pair: PairVerdict) -> str:
    """What one task does to the other, and the cell to look at first."""
    label = pair_label(pair.task_a, pair.task_b)
    if not pair.num_cells:
        return f"{label}: no cell has data of both."
    hurt, help_ = len(pair.harmful), len(pair.helpful)
    counts = f"{hurt} {_do(hurt, 'hurt')}, {help_} {_do(help_, 'help')} of {pair.num_cells}"
    return f"{label}: loss {predicted_rise(pair)} ({counts}); {cell_answer(pair.cells[0], pair)}"


def short_pair_answer(pair: PairVerdict) -> str:
    """The same in less than a line, of a pair with sure harm."""
    worst = pair.harmful[0]
    value = plus_minus(worst.value, worst.standard_error, signed=True)
    label = pair_label(pair.task_a, pair.task_b)
    return f"{label}: loss {predicted_rise(pair)}; {worst.name} hurts {value} ({pair.share(worst):.0%} of {len(pair.harmful)})"


def answer(heatmap: InterferenceHeatmap, num_pairs: int = 3) -> list[str]:
    """The whole answer in a few lines.

    Args:
        heatmap: The result.
        num_pairs: Pairs to name, of those with sure harm.

    Returns:
        The headline, the worst pairs, and whether the samples suffice.
    """
    verdict = heatmap.verdict
    worst = [pair for pair in verdict.pairs if pair.harmful][:num_pairs]
    return [headline(verdict), *map(pair_answer, worst), *filter(None, [sufficiency(verdict)])]


def next_steps(heatmap: InterferenceHeatmap, run: str) -> list[tuple[str, str]]:
    """What to do now.

    Args:
        heatmap: The result.
        run: Where it is, as the user would type it.

    Returns:
        What each is for, and the command or the line of code.
    """
    pairs = heatmap.verdict.pairs
    if not pairs:
        return []
    worst = pairs[0]
    steps = [
        ("worst pair", f"qkov show {run} --pair {pair_key(worst.task_a, worst.task_b)}"),
        ("in a browser", f"qkov report {run}"),
    ]
    if heatmap.verdict.harmful:
        steps.append((
            "keep the task",
            f"qkov protect --help   # {readable(worst.task_a)}, while others train",
        ))
        steps.append(("or freeze it", f'HeadFreezer(["{heatmap.verdict.harmful[0].name}"])'))
    return steps


def plus_minus(value: float, error: float, signed: bool = False) -> str:
    """A value with its standard error, both to the first digit of the error.

    >>> plus_minus(16.93, 12.4), plus_minus(0.53712, 0.0314), plus_minus(0.53712, 0.0314, signed=True)
    ('17 ± 12', '0.54 ± 0.03', '+0.54 ± 0.03')
    >>> plus_minus(-0.01, 0.3), plus_minus(float("nan"), 1.0)
    ('0.0 ± 0.3', 'no data')
    """
    if math.isnan(value):
        return "no data"
    sign = "+" if signed else ""
    if not error > 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:{sign}.3g} ± {error:.1g}"
    decimals = max(0, -math.floor(math.log10(error)))
    rounded = round(value, decimals) + 0.0  # no minus zero
    return f"{rounded:{sign if rounded else ''}.{decimals}f} ± {error:.{decimals}f}"


def _do(count: int, does: str) -> str:
    """The verb for a count: one cell hurts, two hurt."""
    return f"{does}s" if count == 1 else does


def _cells(count: int) -> str:
    return "cell" if count == 1 else "cells"
