"""One score of a task pair as a matplotlib figure: four facets, layers down, heads across."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.certainty import largest_clear_of
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label, printable, readable
from qkov_lightning.scores.scores import HARM
from qkov_lightning.views.facets import (
    HATCHES,
    Facet,
    Scale,
    draw_facets,
    draw_strip,
    first_columns,
    label_facets,
    scale_of,
)
from qkov_lightning.views.marks import marks_of, meaning_of_marks
from qkov_lightning.views.page import Page


def score_scale(heatmap: InterferenceHeatmap, score: str) -> Scale:
    """The scale of a score: the same over facets, pairs and epochs where the score has a natural range.

    Elsewhere it ends at the largest value that is beyond two standard errors, if there is one: a value that
    is mostly noise would leave the others without colour, and has the last colour itself.
    """
    return scale_of(score, len(heatmap.tasks), largest_clear_of(heatmap, score))


def num_heads_of(heatmap: InterferenceHeatmap) -> list[int]:
    """Largest number of heads of each block, over layers."""
    return [
        max([1, *(layer.blocks[block].num_heads for layer in heatmap.layers if block in layer.blocks)])
        for block in BLOCKS
    ]


def heatmap_figure(heatmap: InterferenceHeatmap, a: str, b: str, score: str = HARM) -> Figure:
    """One score of one task pair.

    Hatched cells have no data or are frozen; dots and rings are ``marks_of`` the score.

    Args:
        heatmap: The result to draw.
        a: Task that is hurt, whose sensitivity is measured.
        b: Task that pushes.
        score: Which score.

    Returns:
        A figure of its own, unknown to pyplot.

    Raises:
        ValueError: If the heatmap does not know the task or the score.
    """
    values = heatmap.values(a, b, score).numpy()
    marks = marks_of(heatmap, a, b, score).numpy()
    scale = score_scale(heatmap, score)
    heads = num_heads_of(heatmap)
    across, down = _axis_inches(heatmap.num_layers, heads)
    samples = heatmap.samples_per_task
    counts = ", ".join(f"{printable(readable(task))} {samples[task]}" for task in dict.fromkeys((a, b)))
    page = Page.of(
        f"{score}: {printable(pair_label(a, b))}",
        f"{scale.meaning} · {heatmap.when} · samples: {counts}",
        marks_legend(score),
        across,
        down,
    )
    facets = []
    for index, first in enumerate(first_columns(heads)):
        own = (slice(None), slice(heads[index]), index)
        facets.append(Facet(values[own], 0, first, missing_cells(heatmap, index, values[own]), marks[own]))
    draw_facets(page.axis, facets, scale)
    columns = [(facet.column, facet.values.shape[1]) for facet in facets]
    label_facets(page.axis, columns, [(0, heatmap.num_layers)])
    for block, (first, count) in zip(BLOCKS, columns, strict=True):
        page.axis.text(
            first + (count - 1) / 2,
            -0.5 - 0.06 * heatmap.num_layers / down,
            block,
            ha="center",
            va="bottom",
            fontweight="bold",
        )
    page.axis.set_ylabel("layer")
    page.axis.set_xlabel("head")
    page.draw_bar(scale)
    return page.figure


def cells_figure(
    values: Float[np.ndarray, "layer head block"],
    num_heads: Sequence[int],
    scale: Scale,
    title: str,
    facts: str,
) -> Figure:
    """Any numbers of cells, in the same four facets.

    Args:
        values: What to draw, NaN where there is nothing.
        num_heads: Heads of each block.
        scale: Colours.
        title: First line.
        facts: Line below the title.
    """
    page = Page.of(title, facts, f"{HATCHES['no data'][:2]} nothing", *_axis_inches(len(values), num_heads))
    draw_strip(page.axis, values, num_heads, scale)
    page.draw_bar(scale)
    return page.figure


def _axis_inches(num_layers: int, num_heads: Sequence[int]) -> tuple[float, float]:
    """Width and height of an axis with the four facets; a layout engine takes longer than the drawing."""
    cell = min(0.42, max(0.08, 6.0 / max(num_layers, sum(num_heads) / 2)))
    columns = sum(num_heads) + len(num_heads) - 1
    return columns * max(cell, 4.6 / sum(num_heads)), max(num_layers * cell, 1.5)


def marks_legend(score: str) -> str:
    """What dots, rings and hatches say."""
    above, below = meaning_of_marks(score)
    return f"● {above}    ○ {below}    {HATCHES['no data'][:2]} no data    {HATCHES['frozen'][:2]} frozen"


def missing_cells(
    heatmap: InterferenceHeatmap, block: int, values: np.ndarray
) -> dict[str, Bool[np.ndarray, "layer head"]]:
    """Cells of a block that exist but have no value, by reason."""
    missing = {reason: np.zeros(values.shape, dtype=bool) for reason in HATCHES}
    for index, layer in enumerate(heatmap.layers):
        info = layer.blocks.get(BLOCKS[block])
        if info is not None:
            reason = "frozen" if info.status == "frozen" else "no data"
            missing[reason][index, : info.num_heads] = np.isnan(values[index, : info.num_heads])
    return missing
