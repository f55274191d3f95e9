"""What is published after a measurement: scalars, pictures, files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_key
from qkov_lightning.scores.scores import HARM, SCORES
from qkov_lightning.views.figures import heatmap_figure
from qkov_lightning.views.overview import overview
from qkov_lightning.views.page import render, save_image
from qkov_lightning.views.tables import write_tables

OVERVIEW = "_overview"
"""Its tag, which TensorBoard sorts before all others."""

MAX_DRAWN = 5
"""Task pairs whose predicted rise is drawn after every epoch: the worst."""

MAX_CHARTS = 6
"""Task pairs up to which each has a chart of its own."""


@dataclass(frozen=True, eq=False)
class Publication:
    """What loggers show.

    Attributes:
        name: Prefix of every tag.
        step: Optimiser steps done.
        caption: When it was measured: the loggers' own counters may mean something else.
        images: Pictures by tag, uint8 ``[height, width, 3]``.
        heatmap: The result behind them, if it is one.
    """

    name: str
    step: int
    caption: str
    images: dict[str, np.ndarray]
    heatmap: InterferenceHeatmap | None = None

    @classmethod
    def of(
        cls, heatmap: InterferenceHeatmap, scores: Sequence[str] = (), name: str = "interference"
    ) -> Publication:
        """A heatmap, with its pictures drawn.

        Args:
            heatmap: The result.
            scores: Scores to draw for every pair that is shown, besides the rise of the worst.
            name: Prefix of every tag.
        """
        images = {OVERVIEW: render(overview(heatmap))}
        for score in dict.fromkeys((HARM, *scores)):
            for a, b in heatmap.shown_pairs[: None if score in scores else MAX_DRAWN]:
                images[f"pair/{score}_{pair_key(a, b)}"] = render(heatmap_figure(heatmap, a, b, score))
        return cls(name, heatmap.step, heatmap.when, images, heatmap)

    def tagged(self) -> Iterator[tuple[str, np.ndarray]]:
        """Pictures with their whole tags."""
        for tag, image in self.images.items():
            yield f"{self.name}/{tag}", image

    def files(self) -> Iterator[tuple[str, np.ndarray]]:
        """Pictures with the names of their files."""
        for tag, image in self.images.items():
            yield f"{tag.rpartition('/')[2].lstrip('_')}.png", image


def scalars(heatmap: InterferenceHeatmap) -> dict[str, float]:
    """Numbers of the verdict and of every task pair, to stop or checkpoint on."""
    verdict = heatmap.verdict
    result = {"rise": verdict.rise, "harmful_cells": float(len(verdict.harmful))}
    for pair in verdict.pairs:
        key = pair_key(pair.task_a, pair.task_b)
        result[f"{key}/rise"] = pair.rise
        result[f"{key}/mean"] = float(heatmap.values(pair.task_a, pair.task_b).nanmean())
        for score in heatmap.scores:
            values = heatmap.values(pair.task_a, pair.task_b, score)
            prefix = "" if score == "interference" else f"{score}_"
            if SCORES[score].falling:
                result[f"{key}/{prefix}min"] = -float(_largest(-values))
            else:
                result[f"{key}/{prefix}max"] = float(_largest(values))
    result["max"] = max((value for key, value in result.items() if key.endswith("/max")), default=math.nan)
    return {key: value for key, value in result.items() if math.isfinite(value)}


def charts(heatmap: InterferenceHeatmap) -> list[str]:
    """Names of the scalars that loggers draw: at most nine, the same in every epoch."""
    pairs = heatmap.task_pairs if len(heatmap.task_pairs) <= MAX_CHARTS else ()
    return ["rise", "harmful_cells", "max", *(f"{pair_key(a, b)}/rise" for a, b in pairs)]


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num(nan=-math.inf).max()


def write_files(publication: Publication, directory: Path) -> None:
    """The heatmap, its tables and its pictures in the folder of a run.

    Raises:
        OSError: If the disk refuses.
    """
    if publication.heatmap is not None:
        publication.heatmap.save(directory / "snapshots" / f"step_{publication.step:08d}.json")
        publication.heatmap.save(directory / "latest.json")
        write_tables(publication.heatmap, directory)
    for name, image in publication.files():
        save_image(image, directory / "figures" / name)
