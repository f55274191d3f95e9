"""The page that every figure is on: title, facts, legend, one axis, a colour bar; and its pixels."""

from __future__ import annotations

import io
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from qkov_lightning.store.files import whole_file
from qkov_lightning.views.facets import Scale

LEFT, RIGHT, BOTTOM = 0.65, 1.15, 0.84
"""Room around the axis in inches."""

DPI = 110


class Picture(Figure):
    """A figure that a notebook shows without further ado."""

    def _repr_png_(self) -> bytes:
        return to_png(render(self))


@dataclass(frozen=True, eq=False)
class Page:
    """A figure with its texts, and an axis to draw on.

    Attributes:
        figure: Unknown to pyplot.
        axis: Where facets go.
    """

    figure: Figure
    axis: Axes

    @classmethod
    def of(cls, title: str, facts: str, legend: str, width: float, height: float) -> Page:
        """A page around an axis of a given size.

        Args:
            title: First lines.
            facts: Lines below the title.
            legend: Last line.
            width: Of the axis, in inches.
            height: Of the axis, in inches.
        """
        page_width = LEFT + width + RIGHT
        # Letters of these sizes are about 0.12, 0.08 and 0.07 inches wide.
        titles = textwrap.wrap(title, int(page_width / 0.12))
        lines = textwrap.wrap(facts, int(page_width / 0.08))
        legends = textwrap.wrap(legend, int(page_width / 0.07))
        top, bottom = 0.55 + 0.22 * len(titles) + 0.16 * len(lines), BOTTOM + 0.14 * (len(legends) - 1)
        size = (page_width, bottom + height + top)
        figure = Picture(figsize=size, dpi=DPI)
        axis = figure.add_axes((LEFT / size[0], bottom / size[1], width / size[0], height / size[1]))
        left, below = 0.12 / size[0], 0.16 + 0.22 * len(titles)
        figure.text(
            left, 1 - 0.12 / size[1], "\n".join(titles), fontsize="large", fontweight="bold", va="top"
        )
        figure.text(left, 1 - below / size[1], "\n".join(lines), fontsize="small", color="0.35", va="top")
        figure.text(left, 0.08 / size[1], "\n".join(legends), fontsize="x-small", color="0.35", va="bottom")
        return cls(figure, axis)

    def draw_bar(self, scale: Scale) -> None:
        """Colours and their values, to the right of the axis."""
        position, width = self.axis.get_position(), self.figure.get_figwidth()
        # An image is drawn faster than a colour bar.
        bar = self.figure.add_axes((position.x1 + 0.18 / width, position.y0, 0.14 / width, position.height))
        ramp = np.linspace(scale.low, scale.high, 256)[:, None]
        extent = (0.0, 1.0, scale.low, scale.high)
        bar.imshow(
            ramp,
            norm=scale.norm,
            cmap=colormaps[scale.colormap],
            aspect="auto",
            origin="lower",
            extent=extent,
        )
        bar.yaxis.tick_right()
        bar.set_xticks([])
        bar.tick_params(labelsize="small", length=2)


def render(figure: Figure) -> np.ndarray:
    """Pixels of a figure, uint8 ``[height, width, 3]``."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Names of tasks may hold what the font lacks: it draws a box, and there is nothing to do about it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_png(image: np.ndarray) -> bytes:
    """Pixels as a PNG file in memory."""
    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()


def save_image(image: np.ndarray, path: Path) -> None:
    """Write pixels as a PNG file, making its folder.

    Raises:
        OSError: If the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        imsave(temporary, image, format="png")
