"""A heatmap in the terminal, with Rich: panels and tables of the task pairs that were asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib import colormaps
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qkov_lightning.heads.projections import BLOCKS, Block
from qkov_lightning.measure.cells import Cell, SamplePair
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label, printable, readable
from qkov_lightning.measure.verdict import Part
from qkov_lightning.scores.scores import HARM, SCORES
from qkov_lightning.views.answer import pair_answer, plus_minus
from qkov_lightning.views.marks import marks_of, meaning_of_marks
from qkov_lightning.views.tables import Selection

MAX_COLUMNS = 3
MAX_TEXT = 40
"""Characters of a sample's text beside its identifier."""

NOTHING, SHADES = "·", "░▒▓█"
"""The four shades are steps of interference, the darkest the strongest; a blank is no head at all."""

SURE = "surely: corrected for the number of cells, one in twenty is expected to be wrong"

HURTS, HELPS = "!+"
"""Marks beside a shade."""


@dataclass(frozen=True)
class Steps:
    """Shades of one panel: each stands for a quarter of the cells that interfere.

    Attributes:
        score: The score.
        bounds: Least interference of each shade, in the direction of interference.
    """

    score: str
    bounds: tuple[float, ...]

    @classmethod
    def of(cls, values: torch.Tensor, score: str) -> Steps:
        """Steps of the values of a panel; of a score with a sign, of those that interfere."""
        harm = -values if SCORES[score].falling else values
        known = harm[~harm.isnan() & ((harm > 0) | (not SCORES[score].signed))].double()
        if not known.numel():
            return cls(score, (math.inf,) * len(SHADES))
        shares = torch.arange(len(SHADES), dtype=torch.float64) / len(SHADES)
        return cls(score, tuple(known.quantile(shares).tolist()))

    def shade(self, value: float) -> tuple[str, str]:
        """Character and style of a value."""
        if math.isnan(value):
            return "/", "dim"
        harm = -value if SCORES[self.score].falling else value
        step = sum(harm >= bound for bound in self.bounds)
        signed = SCORES[self.score].signed
        if signed and harm <= 0:
            return NOTHING, "rgb(67,147,195) on grey11"
        share = 0.5 + step / 8 if signed else step / len(SHADES)
        red, green, blue, _ = (
            round(255 * part) for part in colormaps["RdBu_r" if signed else "magma"](share)
        )
        return SHADES[max(1, step) - 1], f"rgb({red},{green},{blue}) on grey11"

    @property
    def legend(self) -> str:
        """What the shades stand for."""
        known = SCORES[self.score]
        if math.inf in self.bounds:
            return f"{NOTHING} no cell interferes"
        sign = -1 if known.falling else 1
        bounds = ", ".join(
            f"{shade} {sign * bound:.2g}" for shade, bound in zip(SHADES, self.bounds, strict=True)
        )
        side = ("below 0" if known.falling else "above 0") if known.signed else "all"
        other = f"{NOTHING} the other side of 0   " if known.signed else ""
        return f"{other}quarters of {side}, from {bounds}"


def heatmap_panel(
    heatmap: InterferenceHeatmap, a: str, b: str, score: str = HARM, block: Block | None = None
) -> Panel:
    """The blocks of a task pair, layers down, heads across; shades tell the values without colour too."""
    steps = Steps.of(heatmap.values(a, b, score), score)
    marks = marks_of(heatmap, a, b, score)
    blocks = [_block(heatmap, a, b, steps, marks, one) for one in BLOCKS if block in {None, one}]
    samples = heatmap.samples_per_task
    title = f"[bold]{_plain(pair_label(a, b))}[/]: {score}"
    counts = ", ".join(f"{_plain(readable(task))} {samples[task]}" for task in dict.fromkeys((a, b)))
    subtitle = f"{heatmap.when}, samples: {counts}"
    up, down = meaning_of_marks(score)
    legend = Text(
        f"{SCORES[score].meaning}\n{steps.legend}\n{HURTS} {up}   {HELPS} {down}   // no data   xx frozen\n{SURE}",
        style="dim",
    )
    return Panel(
        Group(Columns(blocks, padding=(0, 3)), legend),
        title=title,
        subtitle=subtitle,
        title_align="left",
        expand=False,
    )


def cells_table(heatmap: InterferenceHeatmap, a: str, b: str, selection: Selection) -> Table:
    """The selected cells of a task pair, with their scores and standard errors."""
    title = "Worst cells" if selection.score == HARM else f"First cells by {selection.score}"
    table = Table(title=f"{title}: {_plain(pair_label(a, b))}", title_justify="left", title_style="bold")
    table.add_column("cell", no_wrap=True)
    table.add_column("surely", no_wrap=True)
    scores = _tabled(heatmap, selection.score)
    for score in scores:
        table.add_column(score, justify="right", no_wrap=True)
    sure = marks_of(heatmap, a, b, HARM)
    for cell in selection.cells(heatmap, a, b):
        sign = float(sure[cell.layer, cell.head, BLOCKS.index(cell.block)])
        word = "hurts" if sign > 0 else "helps" if sign < 0 else ""
        table.add_row(cell.name, word, *_with_errors(heatmap, cell, scores))
    return table


def pairs_table(
    heatmap: InterferenceHeatmap, a: str, b: str, block: Block | None = None, top: int = 3
) -> Table:
    """The sample pairs of a task pair that hurt most."""
    pairs = [
        pair for pair in heatmap.pairs if (pair.task_a, pair.task_b) == (a, b) and block in {None, pair.block}
    ]
    title = f"Samples of {_plain(readable(b))} that hurt samples of {_plain(readable(a))} most"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(f"{_plain(readable(a))} sample", overflow="fold")
    table.add_column(f"hurt by {_plain(readable(b))} sample", overflow="fold")
    table.add_column("cell", no_wrap=True)
    table.add_column("rise", justify="right", no_wrap=True)
    table.add_column("interference", justify="right", no_wrap=True)
    for pair in pairs[:top]:
        rise = "" if pair.harm is None else f"{pair.harm:+.2g}"
        table.add_row(*map(_plain, sample_names(pair)), pair.name, rise, f"{pair.value:.3g}")
    return table


def sample_names(pair: SamplePair, length: int = MAX_TEXT) -> tuple[str, str]:
    """Both samples of a pair: identifier, and the beginning of the text where texts are kept."""

    def named(name: str, text: str | None) -> str:
        return name if text is None else f"{name}: {text[:length]}{'…' if len(text) > length else ''}"

    return named(pair.sample_a, pair.text_a), named(pair.sample_b, pair.text_b)


def roll_ups(heatmap: InterferenceHeatmap, a: str, b: str, top: int = 10) -> Group:
    """What heads, layers and blocks come to, for one pair of different tasks."""
    pair = heatmap.verdict.pair(a, b)
    tables = [
        _parts_table("head", pair.heads[:top]),
        _parts_table("layer", pair.layers[:top]),
        _parts_table("block", pair.blocks),
    ]
    title = Text(f"Predicted rise of the loss: {printable(pair_label(a, b))}", style="bold")
    return Group(title, Columns(tables, padding=(0, 2)))


def _parts_table(name: str, parts: Sequence[Part]) -> Table:
    table = Table()
    table.add_column(name, no_wrap=True)
    table.add_column("rise", justify="right", no_wrap=True)
    table.add_column("cells", no_wrap=True)
    for part in parts:
        cells = f"{part.num_harmful}{HURTS} {part.num_helpful}{HELPS}"
        table.add_row(part.name, plus_minus(part.rise, part.standard_error, signed=True), cells)
    return table


def details(heatmap: InterferenceHeatmap, selection: Selection) -> Group:
    """Every selected pair: heatmap, cells, sample pairs; then what the layers are called."""
    judged = {pair.tasks: pair for pair in heatmap.verdict.pairs}
    parts: list[RenderableType] = []
    for a, b in selection.pairs:
        if (a, b) in judged:
            parts.append(Text(printable(pair_answer(judged[a, b]))))
        parts += [
            heatmap_panel(heatmap, a, b, selection.score, selection.block),
            cells_table(heatmap, a, b, selection),
        ]
        pairs = pairs_table(heatmap, a, b, selection.block)
        parts += [pairs, ""] if pairs.row_count else [""]
    names = [printable(layer.name) for layer in heatmap.layers]
    last = f", L{len(names) - 1} is {names[-1]}" if len(names) > 1 else ""
    parts.append(Text(f"L0 is {names[0]}{last}", style="dim"))
    return Group(*parts)


def markdown_table(heatmap: InterferenceHeatmap, a: str, b: str, selection: Selection) -> str:
    """``cells_table`` in Markdown, with every score."""
    header = ["cell", "layer", *heatmap.scores]
    rows = [
        [cell.name, f"`{cell.layer_name}`", *_with_errors(heatmap, cell, heatmap.scores)]
        for cell in selection.cells(heatmap, a, b)
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tabled(heatmap: InterferenceHeatmap, chosen: str) -> list[str]:
    """Scores that have a column in a table of 80 columns: harm, the chosen one, and the next."""
    names = heatmap.shown_scores
    return (
        names[:MAX_COLUMNS] if chosen in names[:MAX_COLUMNS] else [HARM, chosen, *names[1 : MAX_COLUMNS - 1]]
    )


def _with_errors(heatmap: InterferenceHeatmap, cell: Cell, scores: Iterable[str]) -> Iterator[str]:
    for score in scores:
        at = (cell.layer, cell.head, BLOCKS.index(cell.block))
        value = float(heatmap.values(cell.task_a, cell.task_b, score)[at])
        error = float(heatmap.errors(cell.task_a, cell.task_b, score)[at])
        yield plus_minus(value, error)


def _block(
    heatmap: InterferenceHeatmap,
    a: str,
    b: str,
    steps: Steps,
    marks: Float[torch.Tensor, "layer head block"],
    block: Block,
) -> Text:
    column = BLOCKS.index(block)
    values = heatmap.values(a, b, steps.score)[:, :, column]
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
                shade, style = steps.shade(float(values[index, head]))
                mark = {1.0: HURTS, -1.0: HELPS}.get(float(marks[index, head, column]), shade)
                text.append((shade + mark)[-width:], style)
        text.append("\n")
    text.rstrip()
    return text


def _plain(name: str) -> str:
    """A name that can neither break the line nor be taken for markup."""
    return escape(printable(name))
