"""A heatmap in the terminal, with Rich."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import colormaps
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from qkov_lightning.heads.projections import BLOCKS, Block
from qkov_lightning.measure.cells import Cell, printable
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.views.facets import Scale
from qkov_lightning.views.figures import score_scale
from qkov_lightning.views.tables import Selection, select

MAX_COLUMNS = 3

SHADES = "·░▒▓█"
"""From the low end of the scale to the high one; a blank is no head at all."""


def heatmap_panel(
    heatmap: InterferenceHeatmap, a: str, b: str, score: str = "interference", block: Block | None = None
) -> Panel:
    """The blocks of a task pair, layers down, heads across; shades tell the values without colour too."""
    scale = score_scale(heatmap, score)
    blocks = [_block(heatmap, a, b, score, one, scale) for one in BLOCKS if block in {None, one}]
    samples = heatmap.samples_per_task
    title = f"[bold]{_plain(b)}[/] pushes on [bold]{_plain(a)}[/]: {score}"
    subtitle = f"epoch {heatmap.epoch}, step {heatmap.step}, samples: {_plain(a)} {samples[a]}, {_plain(b)} {samples[b]}"
    legend = Text(
        f"{SHADES} is {scale.low:.3g} to {scale.high:.3g}: {scale.meaning}\n// no data   xx frozen",
        style="dim",
    )
    return Panel(
        Group(Columns(blocks, padding=(0, 3)), legend),
        title=title,
        subtitle=subtitle,
        title_align="left",
        expand=False,
    )


def hottest_table(heatmap: InterferenceHeatmap, a: str, b: str, selection: Selection) -> Table:
    """The hottest selected cells of a task pair, with their scores and standard errors."""
    table = Table(
        title=f"Hottest cells: {_plain(b)} pushes on {_plain(a)}", title_justify="left", title_style="bold"
    )
    table.add_column("cell", no_wrap=True)
    scores = _tabled(heatmap, selection.score)
    for score in scores:
        table.add_column(score, justify="right", no_wrap=True)
    for cell in selection.cells(heatmap, a, b):
        table.add_row(cell.name, *_with_errors(heatmap, cell, scores))
    return table


def pairs_table(
    heatmap: InterferenceHeatmap, a: str, b: str, block: Block | None = None, top: int = 3
) -> Table:
    """The strongest sample pairs of a task pair."""
    pairs = [
        pair for pair in heatmap.pairs if (pair.task_a, pair.task_b) == (a, b) and block in {None, pair.block}
    ]
    table = Table(title="Sample pairs that conflict most", title_justify="left", title_style="bold")
    table.add_column(f"{_plain(a)} sample", overflow="fold")
    table.add_column(f"{_plain(b)} sample", overflow="fold")
    table.add_column("cell", no_wrap=True)
    table.add_column("interference", justify="right", no_wrap=True)
    for pair in pairs[:top]:
        cell = f"L{pair.layer}.H{pair.head}.{pair.block}"
        table.add_row(_plain(pair.sample_a), _plain(pair.sample_b), cell, f"{pair.value:.3g}")
    return table


def overview(heatmap: InterferenceHeatmap, selection: Selection | None = None) -> Group:
    """Every selected pair: heatmap, hottest cells, sample pairs; then what the layers are called."""
    if selection is None:
        selection = select(heatmap, top=10)
    parts: list[RenderableType] = []
    for a, b in selection.pairs:
        parts += [
            heatmap_panel(heatmap, a, b, selection.score, selection.block),
            hottest_table(heatmap, a, b, selection),
        ]
        pairs = pairs_table(heatmap, a, b, selection.block)
        parts += [pairs, ""] if pairs.row_count else [""]
    names = [printable(layer.name) for layer in heatmap.layers]
    parts.append(
        Text(
            f"L0 is {names[0]}" + (f", L{len(names) - 1} is {names[-1]}" if len(names) > 1 else ""),
            style="dim",
        )
    )
    return Group(*parts)


def epoch_table(heatmap: InterferenceHeatmap) -> Table:
    """A line per task pair: what to look at after a validation epoch."""
    table = Table(
        title=f"Interference, epoch {heatmap.epoch}, step {heatmap.step}",
        title_justify="left",
        title_style="bold",
    )
    for column in ("pushes", "on", "hottest cell"):
        table.add_column(column)
    scores = _tabled(heatmap)
    for score in scores:
        table.add_column(score, justify="right")
    for a, b in heatmap.shown_pairs:
        cells = heatmap.cells(a, b)
        if not cells:
            counts = heatmap.samples_per_task
            table.add_row(_plain(b), _plain(a), f"no data ({counts[b]} and {counts[a]} samples)")
            continue
        table.add_row(_plain(b), _plain(a), cells[0].name, *_with_errors(heatmap, cells[0], scores))
    return table


def markdown_table(heatmap: InterferenceHeatmap, a: str, b: str, selection: Selection) -> str:
    """``hottest_table`` in Markdown."""
    header = ["cell", "layer", *heatmap.scores]
    rows = [
        [cell.name, f"`{cell.layer_name}`", *_with_errors(heatmap, cell, heatmap.scores)]
        for cell in selection.cells(heatmap, a, b)
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tabled(heatmap: InterferenceHeatmap, chosen: str | None = None) -> list[str]:
    """Scores that have a column in a table of 80 columns: the first three, and the chosen one."""
    return [name for index, name in enumerate(heatmap.scores) if index < MAX_COLUMNS or name == chosen]


def _with_errors(heatmap: InterferenceHeatmap, cell: Cell, scores: Iterable[str]) -> Iterator[str]:
    for score in scores:
        at = (cell.layer, cell.head, BLOCKS.index(cell.block))
        value = float(heatmap.values(cell.task_a, cell.task_b, score)[at])
        error = float(heatmap.errors(cell.task_a, cell.task_b, score)[at])
        yield plus_minus(value, error)


def plus_minus(value: float, error: float) -> str:
    """A value with its standard error, both to the first digit of the error.

    >>> plus_minus(16.93, 12.4), plus_minus(0.53712, 0.0314)
    ('17 ± 12', '0.54 ± 0.03')
    >>> plus_minus(-0.01, 0.3), plus_minus(float("nan"), 1.0)
    ('0.0 ± 0.3', 'no data')
    """
    if math.isnan(value):
        return "no data"
    if not error > 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.3g} ± {error:.1g}"
    decimals = max(0, -math.floor(math.log10(error)))
    return f"{round(value, decimals) + 0.0:.{decimals}f} ± {error:.{decimals}f}"  # no minus zero


def _block(heatmap: InterferenceHeatmap, a: str, b: str, score: str, block: Block, scale: Scale) -> Text:
    values = heatmap.values(a, b, score)[:, :, BLOCKS.index(block)]
    heads = max([1, *(layer.blocks[block].num_heads for layer in heatmap.layers if block in layer.blocks)])
    # Two characters are about as wide as high; with many heads one must do, to fit into 80 columns.
    width = 2 if heads <= 34 else 1
    numbers = "".join(f"{head:<{8}}" for head in range(0, heads, 8 // width)).rstrip()
    text = Text.assemble((f"{block:>2} ", "bold"), (f"{numbers}\n", "dim"))
    for index, layer in enumerate(heatmap.layers):
        text.append(f"{index:>2} ", style="dim")
        for head in range(heads):
            info = layer.blocks.get(block)
            if info is None or head >= info.num_heads:
                text.append(" " * width)
            elif info.status == "frozen":
                text.append("x" * width, style="dim")
            else:
                character, style = _shade(float(values[index, head]), scale)
                text.append(character * width, style)
        text.append("\n")
    text.rstrip()
    return text


def _shade(value: float, scale: Scale) -> tuple[str, str]:
    if math.isnan(value):
        return "/", "dim"
    share = min(1.0, max(0.0, (value - scale.low) / (scale.high - scale.low or 1.0)))
    red, green, blue, _ = (round(255 * part) for part in colormaps[scale.colormap](share))
    return SHADES[min(4, int(share * 5))], f"rgb({red},{green},{blue}) on grey11"


def _plain(name: str) -> str:
    """A task name that can neither break the line nor be taken for markup."""
    return escape(printable(name))


def print_beside_bar(bar: Any, renderable: RenderableType) -> None:
    """Print above the trainer's progress bar; nothing where the user switched the bar off."""
    if bar is None or not bar.is_enabled:
        return
    progress = getattr(bar, "progress", None)
    if progress is not None:  # RichProgressBar
        progress.print(renderable)
        return
    console = Console(width=None if sys.stdout.isatty() else 100)
    with console.capture() as captured:
        console.print(renderable)
    bar.print(captured.get().rstrip())


@contextmanager
def progress_task(bar: Any, total: int) -> Iterator[Callable[[], None]]:
    """One task in the trainer's own progress bar; nothing where the user switched the bar off.

    A second bar would draw over the lines of Lightning's.

    Args:
        bar: The trainer's progress bar callback, or None.
        total: Number of steps.

    Yields:
        A function that says that one step is done.
    """
    enabled = bar is not None and bar.is_enabled
    progress = getattr(bar, "progress", None)
    if enabled and progress is not None:  # RichProgressBar
        earlier = [task.id for task in progress.tasks if task.description == "Interference"]
        task = earlier[0] if earlier else progress.add_task("Interference", total=total)
        progress.reset(task, total=total, visible=True)

        def advance() -> None:
            progress.update(task, advance=1)
            bar.refresh()

        try:
            yield advance
        finally:
            # Hidden for the next time, not removed: Lightning 2.4 finds its tasks by their place in the list.
            progress.update(task, visible=False)
    elif enabled and hasattr(bar, "init_validation_tqdm"):  # TQDMProgressBar
        # Below the bars of training and validation.
        position = 2 * bar.process_position + 2
        with tqdm(total=total, desc="Interference", position=position, leave=False, file=sys.stdout) as line:
            yield line.update
    else:
        yield lambda: None
