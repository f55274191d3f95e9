"""Values as a picture: layers down, heads across, several facets on one axis. Every figure is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.scores.scores import SCORES

HATCHES = {"no data": "////", "frozen": "xxxx"}
"""Missing is hatched, never a colour: a colour would be read as a value."""


@dataclass(frozen=True)
class Scale:
    """Colours of a score.

    Attributes:
        colormap: Name of the matplotlib colour map.
        low: Value of the first colour.
        high: Value of the last colour.
        meaning: What the two ends mean, in a few words.
    """

    colormap: str
    low: float
    high: float
    meaning: str

    @property
    def norm(self) -> Normalize:
        """Values to the range from 0 to 1."""
        return Normalize(self.low, self.high)


def scale_of(score: str, num_tasks: int, largest: float) -> Scale:
    """Colours of a score, fixed where it has a natural range; elsewhere they end at the largest value shown.

    Args:
        score: Name of the score.
        num_tasks: Tasks in the pool, on which a natural range may depend.
        largest: Largest finite size of a value; used only by scores in units.

    Returns:
        The scale. All colour maps are perceptually ordered and safe for colour-blind readers; of a signed
        score,
        red is the end that interferes.
    """
    known = SCORES[score]
    high = largest if largest > 0 else 1.0
    low = -high if known.signed else 0.0
    if known.natural_range is not None:
        low, high = known.natural_range(num_tasks)
    colours = ("RdBu" if known.falling else "RdBu_r") if known.signed else "magma"
    return Scale(colours, low, high, known.meaning)


@dataclass(frozen=True, eq=False)
class Facet:
    """One rectangle of values on an axis.

    Attributes:
        values: Values, NaN where there is nothing to colour.
        row: Row of its first layer on the axis.
        column: Column of its first head.
        missing: Cells to hatch, by reason (a key of ``HATCHES``); other NaN cells do not exist and stay
            white.
        marks: 1 for cells that get a dot, -1 for those that get a ring, 0 for the rest.
    """

    values: Float[np.ndarray, "layer head"]
    row: int = 0
    column: int = 0
    missing: Mapping[str, Bool[np.ndarray, "layer head"]] = field(default_factory=dict)
    marks: Float[np.ndarray, "layer head"] | None = None

    @property
    def end(self) -> tuple[int, int]:
        """The row and the column after the last."""
        return self.row + self.values.shape[0], self.column + self.values.shape[1]

    @property
    def frame(self) -> Rectangle:
        """Its outline."""
        height, width = self.values.shape
        return Rectangle((self.column - 0.5, self.row - 0.5), width, height)


def draw_facets(axis: Axes, facets: Sequence[Facet], scale: Scale) -> None:
    """Draw facets on one axis, which is many times faster than an axis for each.

    Args:
        axis: Where; its limits become those of the facets together.
        facets: What, at least one.
        scale: Colours.
    """
    shape = max(facet.end[0] for facet in facets), max(facet.end[1] for facet in facets)
    canvas, marks = np.full(shape, np.nan), np.zeros(shape)
    for facet in facets:
        own = slice(facet.row, facet.end[0]), slice(facet.column, facet.end[1])
        canvas[own] = facet.values
        if facet.marks is not None:
            marks[own] = facet.marks
    axis.imshow(
        np.ma.masked_invalid(canvas),
        norm=scale.norm,
        cmap=colormaps[scale.colormap],
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_facecolor("white")
    axis.spines[:].set_visible(False)
    # One collection each: thousands of single patches take seconds.
    for reason, hatch in HATCHES.items():
        squares = list(_squares(facets, reason))
        if squares:
            axis.add_collection(
                PatchCollection(squares, facecolor="none", edgecolor="0.55", linewidth=0, hatch=hatch)
            )
    frames = [facet.frame for facet in facets]
    outlines = PatchCollection(frames, facecolor="none", edgecolor="0.3", linewidth=0.8, clip_on=False)
    axis.add_collection(outlines)
    _draw_marks(axis, canvas, marks, scale)


def _squares(facets: Sequence[Facet], reason: str) -> Iterator[Rectangle]:
    for facet in facets:
        for layer, head in np.argwhere(facet.missing.get(reason, np.zeros((0, 0)))):
            yield Rectangle((facet.column + head - 0.5, facet.row + layer - 0.5), 1, 1)


def _draw_marks(
    axis: Axes, canvas: Float[np.ndarray, "row column"], marks: Float[np.ndarray, "row column"], scale: Scale
) -> None:
    width, height = cell_inches(axis, canvas.shape)
    size = (72 * 0.28 * min(width, height, 0.3)) ** 2
    for mark in (1, -1):
        at = np.argwhere((marks == mark) & ~np.isnan(canvas))
        if not len(at):
            continue
        colours = colormaps[scale.colormap](scale.norm(canvas[at[:, 0], at[:, 1]]))
        ink = [
            "white" if dark else "black" for dark in colours[:, :3] @ np.array([0.299, 0.587, 0.114]) < 0.5
        ]
        if mark > 0:
            axis.scatter(at[:, 1], at[:, 0], s=size, c=ink, linewidths=0)
        else:
            axis.scatter(at[:, 1], at[:, 0], s=size, facecolors="none", edgecolors=ink, linewidths=0.8)


def cell_inches(axis: Axes, shape: tuple[int, ...]) -> tuple[float, float]:
    """Width and height of a cell of an axis with so many rows and columns."""
    extent, dpi = axis.get_window_extent(), axis.figure.dpi
    return extent.width / dpi / shape[1], extent.height / dpi / shape[0]


def label_facets(axis: Axes, columns: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]]) -> None:
    """Number heads and layers, every n-th where there is no room for all.

    Args:
        axis: Where facets were drawn.
        columns: First column and number of heads, of facets side by side.
        rows: First row and number of layers, of facets above each other.
    """
    shape = max(first + count for first, count in rows), max(first + count for first, count in columns)
    width, height = cell_inches(axis, shape)
    # A label needs about 0.3 inches across, 0.2 down.
    for axes, room, needed, facets in ((axis.xaxis, width, 0.3, columns), (axis.yaxis, height, 0.2, rows)):
        every = math.ceil(needed / room)
        ticks = [(first + index, str(index)) for first, count in facets for index in range(0, count, every)]
        # The last of one facet and the first of the next are apart.
        shown = [tick for tick, later in zip(ticks, [*ticks[1:], (math.inf, "")], strict=True)
                 if tick[1] == "0" or (later[0] - tick[0]) * room >= needed]  # fmt: skip
        axes.set_ticks([place for place, _ in shown], [label for _, label in shown])
    axis.tick_params(labelsize="small", length=2)


def draw_strip(
    axis: Axes, values: Float[np.ndarray, "layer head block"], num_heads: Sequence[int], scale: Scale
) -> None:
    """Draw all blocks side by side on a single axis, a blank column between them.

    Args:
        axis: Where.
        values: Values, NaN where there is no data.
        num_heads: Heads to draw of each block.
        scale: Colours.
    """
    facets = []
    for index, first in enumerate(first_columns(num_heads)):
        block = values[:, : num_heads[index], index]
        facets.append(Facet(block, column=first, missing={"no data": np.isnan(block)}))
    draw_facets(axis, facets, scale)
    middles = [facet.column + (facet.values.shape[1] - 1) / 2 for facet in facets]
    axis.set_xticks(middles, [f"{block} ({heads})" for block, heads in zip(BLOCKS, num_heads, strict=True)])
    axis.set_xlabel("block (heads)")
    axis.set_ylabel("layer")


def first_columns(widths: Sequence[int]) -> list[int]:
    """First column of each facet of a row, a blank column between them.

    >>> first_columns([4, 2, 2, 4])
    [0, 5, 8, 11]
    """
    return [sum(widths[:index]) + index for index in range(len(widths))]
