"""All task pairs in one picture: the predicted rise of the loss per layer and head, tasks by tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from qkov_lightning.measure.certainty import CLEAR, largest_clear
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label, printable
from qkov_lightning.measure.verdict import Part
from qkov_lightning.scores.scores import HARM
from qkov_lightning.views.answer import headline
from qkov_lightning.views.facets import Facet, draw_facets, label_facets, scale_of
from qkov_lightning.views.page import Page

MAX_SQUARE = 4
"""Tasks up to which every pair is drawn, a row for each task; of more, the first pairs of the verdict."""

ACROSS = 4
"""Pairs side by side where not all are drawn."""

LEGEND = (
    "white: within two standard errors of 0    ● a cell of the head surely hurts    ○ one surely helps and none hurts    "
    "// no data"
)


def overview(heatmap: InterferenceHeatmap) -> Figure:
    """Where every task pushes on every other: layers down, heads across, the four blocks of a head together.

    A row of the figure is a task that is hurt, with a panel for every task that pushes on it. Under
    grouped-query attention, a shared K or V head counts in equal parts for the query heads that it serves.

    Args:
        heatmap: The result to draw.

    Returns:
        A figure of its own, unknown to pyplot.
    """
    places = _places(heatmap)
    parts = {pair: heatmap[pair].heads for pair in places}
    rise, error = (
        torch.tensor([getattr(part, name) for own in parts.values() for part in own])
        for name in ("rise", "standard_error")
    )
    scale = scale_of(HARM, len(heatmap.tasks), largest_clear(rise, error))
    exists = _existing_heads(heatmap)
    height, width = exists.shape
    rows, columns = (max(place[axis] for place in places.values()) + 1 for axis in (0, 1))
    # Panels of about the same size whatever the model; positions in inches.
    panel_width, panel_height = min(4.0, max(2.4, 0.12 * width)), min(4.0, max(1.1, 0.07 * height))
    cell_width, cell_height = panel_width / width, panel_height / height
    gap_across, gap_down = (max(1, round(0.45 / size)) for size in (cell_width, cell_height))
    page = Page.of(
        "Predicted rise of the loss, all blocks of a head together",
        f"{headline(heatmap.verdict)} · {heatmap.when}",
        LEGEND,
        (columns * width + (columns - 1) * gap_across) * cell_width,
        (rows * height + (rows - 1) * gap_down) * cell_height,
    )
    facets = []
    for pair, (row, column) in places.items():
        values, marks = _per_head(parts[pair], exists.shape)
        missing = {"no data": exists & np.isnan(values)}
        facets.append(Facet(values, row * (height + gap_down), column * (width + gap_across), missing, marks))
        page.axis.text(
            facets[-1].column + (width - 1) / 2,
            facets[-1].row - 0.5 - 0.06 / cell_height,
            _short(printable(pair_label(*pair)), panel_width),
            ha="center",
            va="bottom",
            fontsize="medium",
            fontweight="bold",
        )
    draw_facets(page.axis, facets, scale)
    label_facets(
        page.axis,
        [(column * (width + gap_across), width) for column in range(columns)],
        [(row * (height + gap_down), height) for row in range(rows)],
    )
    page.axis.set_ylabel("layer")
    page.axis.set_xlabel("head")
    page.draw_bar(scale)
    return page.figure


def _places(heatmap: InterferenceHeatmap) -> dict[tuple[str, str], tuple[int, int]]:
    """Row and column of every pair that is drawn."""
    tasks = heatmap.tasks
    if len(tasks) <= 2:  # side by side
        return {pair: (0, index) for index, pair in enumerate(heatmap.task_pairs)}
    if len(tasks) <= MAX_SQUARE:
        return {
            (a, b): (row, column)
            for row, a in enumerate(tasks)
            for column, b in enumerate(task for task in tasks if task != a)
        }
    return {pair: divmod(index, ACROSS) for index, pair in enumerate(heatmap.shown_pairs)}


def _per_head(
    parts: Sequence[Part], shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "layer query_head"], Float[np.ndarray, "layer query_head"]]:
    """Rise of each head, NaN without data, and its mark.

    The rise is 0 within two standard errors of it: noise would have the deepest colours.
    """
    values, marks = np.full(shape, np.nan), np.zeros(shape)
    for part in parts:
        if part.num_cells:
            layer, head = (int(place[1:]) for place in part.name.split("."))
            values[layer, head] = part.rise if abs(part.rise) >= CLEAR * part.standard_error else 0.0
            marks[layer, head] = 1 if part.num_harmful else -1 if part.num_helpful else 0
    return values, marks


def _existing_heads(heatmap: InterferenceHeatmap) -> Bool[np.ndarray, "layer query_head"]:
    heads = [
        max((info.num_heads * info.query_group for info in layer.blocks.values()), default=0)
        for layer in heatmap.layers
    ]
    return np.arange(max(heads)) < np.array(heads)[:, None]


def _short(label: str, inches: float) -> str:
    """A label that fits above a panel."""
    room = int(inches / 0.1)
    return label if len(label) <= room else f"{label[: room - 1]}…"
