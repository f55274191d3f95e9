"""A heatmap as a matplotlib figure: four facets, layers down, heads across."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle

from qkov_lightning.heatmap import InterferenceHeatmap, printable
from qkov_lightning.projections import BLOCKS


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


def score_scale(heatmap: InterferenceHeatmap, score: str) -> Scale:
    """The scale of a score: the same over facets, pairs and epochs where the score has a natural range."""
    if score == "cosine":
        return Scale("RdBu", -1.0, 1.0, "-1 opposed, 1 aligned")
    if score == "relative":
        return Scale("magma", 0.0, float(max(2, len(heatmap.tasks))), "1 = as sensitive as the average task")
    values = torch.stack([heatmap.values(a, b, score) for a, b in heatmap.task_pairs])
    finite = values[values.isfinite()]
    return Scale("magma", 0.0, float(finite.max()) if finite.numel() else 1.0, "in units of gradient")


def heatmap_figure(heatmap: InterferenceHeatmap, a: str, b: str, score: str = "interference") -> Figure:
    """One score of one task pair.

    Args:
        heatmap: The result to draw.
        a: Task whose sensitivity is measured.
        b: Task that pushes.
        score: Which score.

    Returns:
        A figure of its own, unknown to pyplot.

    Raises:
        ValueError: If the heatmap does not know the task or the score.
    """
    values = heatmap.values(a, b, score).numpy()
    scale = score_scale(heatmap, score)
    heads = [
        max([1, *(layer.blocks[block].num_heads for layer in heatmap.layers if block in layer.blocks)])
        for block in BLOCKS
    ]
    # Positions in inches: a layout engine takes longer than the drawing itself.
    cell = min(0.42, max(0.11, 6.0 / max(heatmap.num_layers, sum(heads) / 4)))
    cell_width = max(cell, 4.2 / sum(heads))
    left, gap, right, bottom, top = 0.65, 0.25, 1.15, 0.62, 0.95
    height = max(heatmap.num_layers * cell, 1.5)
    size = (left + sum(heads) * cell_width + 3 * gap + right, bottom + height + top)
    figure = Figure(figsize=size, dpi=110)
    norm, colours = Normalize(scale.low, scale.high), colormaps[scale.colormap]
    start = left
    for index, block in enumerate(BLOCKS):
        width = heads[index] * cell_width
        axis = figure.add_axes((start / size[0], bottom / size[1], width / size[0], height / size[1]))
        start += width + gap
        _facet(axis, heatmap, index, values[:, : heads[index], index], norm, colours)
        axis.set_title(block, fontweight="bold", fontsize="medium", pad=4)
        if index:
            axis.set_yticklabels([])
        else:
            axis.set_ylabel("layer")
    figure.text((start - gap + left) / 2 / size[0], 0.08 / size[1], "head", ha="center", va="bottom")
    bar = figure.add_axes((
        (start - gap + 0.18) / size[0],
        bottom / size[1],
        0.14 / size[0],
        height / size[1],
    ))
    figure.colorbar(ScalarMappable(norm, colours), cax=bar)
    bar.tick_params(labelsize="small", length=2)
    samples = heatmap.samples_per_task
    title = f"{score}: {printable(b)} pushes on {printable(a)}"
    figure.text(0.12 / size[0], 1 - 0.12 / size[1], title, fontsize="large", fontweight="bold", va="top")
    facts = (
        f"{scale.meaning} · epoch {heatmap.epoch}, step {heatmap.step} · "
        f"samples: {printable(a)} {samples[a]}, {printable(b)} {samples[b]}"
    )
    figure.text(0.12 / size[0], 1 - 0.4 / size[1], facts, fontsize="small", color="0.35", va="top")
    return figure


def _facet(
    axis: Axes,
    heatmap: InterferenceHeatmap,
    index: int,
    values: np.ndarray,
    norm: Normalize,
    colours: Colormap,
) -> None:
    axis.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    axis.set_facecolor("white")
    for layer, head in zip(*np.nonzero(np.isnan(values)), strict=True):
        info = heatmap.layers[layer].blocks.get(BLOCKS[index])
        if info is None or head >= info.num_heads:
            continue  # no such cell: left white
        frozen = info.status == "frozen"
        axis.add_patch(
            Rectangle(
                (head - 0.5, layer - 0.5),
                1,
                1,
                fill=False,
                linewidth=0,
                edgecolor="0.6",
                hatch="xxxx" if frozen else "////",
            )
        )
    _ticks(axis, values.shape[1], values.shape[0])


def _ticks(axis: Axes, num_heads: int, num_layers: int) -> None:
    axis.set_xticks(range(0, num_heads, max(1, -(-num_heads // 8))))
    axis.set_yticks(range(0, num_layers, max(1, -(-num_layers // 14))))
    axis.tick_params(labelsize="small", length=2)


def render(figure: Figure) -> np.ndarray:
    """Pixels of a figure, uint8 ``[height, width, 3]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_image(image: np.ndarray, path: Path) -> None:
    """Write pixels as a PNG file, making its folder.

    Raises:
        OSError: If the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    imsave(temporary, image, format="png")
    temporary.replace(path)
