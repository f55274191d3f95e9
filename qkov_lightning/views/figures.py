"""A heatmap as a matplotlib figure: four facets, layers down, heads across."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.cells import printable
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.store.files import whole_file
from qkov_lightning.views.facets import HATCHES, Scale, draw_facet, scale_of

NOISE = 3.0
"""Combined standard errors by which a cell must differ from the within-task control to be marked."""


def score_scale(heatmap: InterferenceHeatmap, score: str) -> Scale:
    """The scale of a score: the same over facets, pairs and epochs where the score has a natural range."""
    values = torch.stack([heatmap.values(a, b, score) for a, b in heatmap.task_pairs])
    finite = values[values.isfinite()]
    return scale_of(score, len(heatmap.tasks), float(finite.abs().max()) if finite.numel() else 0.0)


def differs_from_control(
    heatmap: InterferenceHeatmap, a: str, b: str, score: str
) -> Bool[Tensor, "layer head block"]:
    """Cells in which b's push on a differs from a's push on itself by more than noise.

    Noise is ``NOISE`` combined standard errors. The two values share the samples of a, so this is a coarse
    guide to the eye, not a test corrected for the number of cells: of a thousand cells without any
    difference, about three are marked.

    Args:
        heatmap: The result.
        a: Task whose sensitivity is measured.
        b: Task that pushes.
        score: Which score.

    Returns:
        True where they differ; never where either has no data.
    """
    difference = heatmap.values(a, b, score) - heatmap.values(a, a, score)
    errors = heatmap.errors(a, b, score), heatmap.errors(a, a, score)
    return difference.abs() > NOISE * torch.hypot(*errors)


def num_heads_of(heatmap: InterferenceHeatmap) -> list[int]:
    """Largest number of heads of each block, over layers."""
    return [
        max([1, *(layer.blocks[block].num_heads for layer in heatmap.layers if block in layer.blocks)])
        for block in BLOCKS
    ]


def heatmap_figure(heatmap: InterferenceHeatmap, a: str, b: str, score: str = "interference") -> Figure:
    """One score of one task pair.

    Hatched cells have no data or are frozen; a dot marks a cell that ``differs_from_control``.

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
    marked = differs_from_control(heatmap, a, b, score).numpy()
    scale = score_scale(heatmap, score)
    heads = num_heads_of(heatmap)
    # Positions in inches: a layout engine takes longer than the drawing itself.
    cell = min(0.42, max(0.08, 6.0 / max(heatmap.num_layers, sum(heads) / 2)))
    cell_width = max(cell, 4.6 / sum(heads))
    left, gap, right, bottom = 0.65, 0.25, 1.15, 0.84
    width = left + sum(heads) * cell_width + 3 * gap + right
    samples = heatmap.samples_per_task
    # Letters of these sizes are about 0.12 and 0.08 inches wide.
    title = textwrap.wrap(f"{score}: {printable(b)} pushes on {printable(a)}", int(width / 0.12))
    facts = textwrap.wrap(
        f"{scale.meaning} · epoch {heatmap.epoch}, step {heatmap.step} · "
        f"samples: {printable(a)} {samples[a]}, {printable(b)} {samples[b]}",
        int(width / 0.08),
    )
    top = 0.55 + 0.22 * len(title) + 0.16 * len(facts)
    height = max(heatmap.num_layers * cell, 1.5)
    size = (width, bottom + height + top)
    figure = Figure(figsize=size, dpi=110)
    start = left
    for index, block in enumerate(BLOCKS):
        across = heads[index] * cell_width
        axis = figure.add_axes((start / size[0], bottom / size[1], across / size[0], height / size[1]))
        start += across + gap
        facet = (slice(None), slice(heads[index]), index)
        draw_facet(axis, values[facet], scale, missing_cells(heatmap, index, values[facet]), marked[facet])
        axis.set_title(block, fontweight="bold", fontsize="medium", pad=4)
        if index:
            axis.set_yticklabels([])
        else:
            axis.set_ylabel("layer")
    figure.text((start - gap + left) / 2 / size[0], 0.4 / size[1], "head", ha="center", va="bottom")
    bar = figure.add_axes((
        (start - gap + 0.18) / size[0],
        bottom / size[1],
        0.14 / size[0],
        height / size[1],
    ))
    figure.colorbar(ScalarMappable(scale.norm, colormaps[scale.colormap]), cax=bar)
    bar.tick_params(labelsize="small", length=2)
    at = 0.12 / size[0]
    figure.text(at, 1 - 0.12 / size[1], "\n".join(title), fontsize="large", fontweight="bold", va="top")
    below = 0.16 + 0.22 * len(title)
    figure.text(at, 1 - below / size[1], "\n".join(facts), fontsize="small", color="0.35", va="top")
    legend = (
        f"● differs from the within-task control by > {NOISE:g} standard errors    "
        f"{HATCHES['no data'][:2]} no data    {HATCHES['frozen'][:2]} frozen"
    )
    figure.text(at, 0.08 / size[1], legend, fontsize="x-small", color="0.35", va="bottom")
    return figure


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


def render(figure: Figure) -> np.ndarray:
    """Pixels of a figure, uint8 ``[height, width, 3]``."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Names of tasks may hold what the font lacks: it draws a box, and there is nothing to do about it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_image(image: np.ndarray, path: Path) -> None:
    """Write pixels as a PNG file, making its folder.

    Raises:
        OSError: If the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        imsave(temporary, image, format="png")
