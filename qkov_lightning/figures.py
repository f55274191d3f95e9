"""A heatmap as a matplotlib figure: four facets, layers down, heads across."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle

from qkov_lightning.heatmap import InterferenceHeatmap
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
    values = heatmap.scores[score]
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
    heads = [max([1, *(layer.blocks[block].num_heads for layer in heatmap.layers if block in layer.blocks)]) for block in BLOCKS]
    cell = min(0.42, max(0.13, 7.0 / max(heatmap.num_layers, 1)))
    width = max(7.5, sum(heads) * cell + 2.6)
    figure = Figure(figsize=(width, max(2.6, heatmap.num_layers * cell + 1.7)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(BLOCKS), squeeze=False, width_ratios=heads)[0]
    norm, colours = Normalize(scale.low, scale.high), colormaps[scale.colormap]
    for index, (block, axis) in enumerate(zip(BLOCKS, axes, strict=True)):
        _facet(axis, heatmap, index, values[:, : heads[index], index], norm, colours)
        axis.set_title(block, fontweight="bold")
        if index:
            axis.set_yticklabels([])
    axes[0].set_ylabel("layer")
    figure.supxlabel("head", fontsize="medium")
    bar = figure.colorbar(axes[0].images[0], ax=list(axes), shrink=0.9, pad=0.015)
    bar.set_label(f"{score}\n({scale.meaning})", fontsize="small")
    samples = heatmap.samples_per_task
    figure.suptitle(f"{b} pushes on {a}: {score}", fontsize="large", fontweight="bold", x=0.01, ha="left")
    axes[-1].annotate(
        f"epoch {heatmap.epoch}, step {heatmap.step}, samples: {a} {samples[a]}, {b} {samples[b]}",
        xy=(0.995, 0.99), xycoords="figure fraction", ha="right", va="top", fontsize="small", color="0.35",
    )  # fmt: skip
    return figure


def _facet(axis: Axes, heatmap: InterferenceHeatmap, index: int, values: np.ndarray, norm: Normalize, colours: Colormap) -> None:
    axis.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    axis.set_facecolor("white")
    for layer, head in zip(*np.nonzero(np.isnan(values)), strict=True):
        info = heatmap.layers[layer].blocks.get(BLOCKS[index])
        if info is None or head >= info.num_heads:
            continue  # no such cell: left white
        frozen = info.status == "frozen"
        axis.add_patch(
            Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, linewidth=0, edgecolor="0.6", hatch="xxxx" if frozen else "////")
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
