"""Values of one block as a picture: layers down, heads across. The drawing that every figure is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def draw_facet(
    axis: Axes,
    values: Float[np.ndarray, "layer head"],
    scale: Scale,
    missing: dict[str, Bool[np.ndarray, "layer head"]],
    marked: Bool[np.ndarray, "layer head"],
) -> None:
    """Draw one block.

    Args:
        axis: Where.
        values: Values, NaN where there is nothing to colour.
        scale: Colours.
        missing: Cells to hatch, by reason (a key of ``HATCHES``); other NaN cells do not exist and stay
            white.
        marked: Cells that get a dot.
    """
    colours = colormaps[scale.colormap]
    axis.imshow(
        np.ma.masked_invalid(values), norm=scale.norm, cmap=colours, aspect="auto", interpolation="nearest"
    )
    axis.set_facecolor("white")
    for reason, cells in missing.items():
        squares = [Rectangle((head - 0.5, layer - 0.5), 1, 1) for layer, head in np.argwhere(cells)]
        if squares:
            # One collection: thousands of single patches take seconds.
            axis.add_collection(
                PatchCollection(
                    squares, facecolor="none", edgecolor="0.55", linewidth=0, hatch=HATCHES[reason]
                )
            )
    extent, dpi = axis.get_window_extent(), axis.figure.dpi
    width, height = extent.width / dpi / values.shape[1], extent.height / dpi / values.shape[0]
    at = np.argwhere(marked & ~np.isnan(values))
    if len(at):
        luminance = colours(scale.norm(values[at[:, 0], at[:, 1]]))[:, :3] @ np.array([0.299, 0.587, 0.114])
        dots = ["white" if dark else "black" for dark in luminance < 0.5]
        diameter = 72 * 0.28 * min(width, height, 0.3)
        axis.scatter(at[:, 1], at[:, 0], s=diameter**2, c=dots, linewidths=0)
    # A label needs about 0.3 inches across, 0.2 down.
    axis.set_xticks(range(0, values.shape[1], math.ceil(0.3 / width)))
    axis.set_yticks(range(0, values.shape[0], math.ceil(0.2 / height)))
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
    blank = np.full((len(values), 1), np.nan)
    parts, hatched, middles, width = [], [], [], 0
    for index, heads in enumerate(num_heads):
        block = values[:, :heads, index]
        parts += [block, blank]
        hatched += [np.isnan(block), np.zeros(blank.shape, bool)]
        middles.append(width + (heads - 1) / 2)
        width += heads + 1
    no_data = np.concatenate(hatched[:-1], axis=1)
    draw_facet(axis, np.concatenate(parts[:-1], axis=1), scale, {"no data": no_data}, np.zeros_like(no_data))
    axis.set_xticks(middles, [f"{block} ({heads})" for block, heads in zip(BLOCKS, num_heads, strict=True)])
    axis.set_xlabel("block (heads)")
    axis.set_ylabel("layer")
