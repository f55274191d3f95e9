"""What a heatmap becomes: scalars, pictures, files, and what the trainer's loggers show."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qkov_lightning.measure.cells import safe_name
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.views.figures import heatmap_figure, render, save_image
from qkov_lightning.views.interactive import interactive_heatmap
from qkov_lightning.views.tables import COLUMNS, cell_rows, select, to_csv, write_tables
from qkov_lightning.views.terminal import markdown_table

Images = dict[tuple[str, str, str], np.ndarray]
"""Pictures by (task_a, task_b, score), uint8 ``[height, width, 3]``."""

Sender = Callable[[Any, InterferenceHeatmap, Images, int], None]
"""What is called with the logger, the result, its pictures and the step of the trainer's own metrics."""


def register_logger(class_name: str, sender: Sender) -> None:
    """Teach the monitor to send pictures and tables to a logger of your own.

    Scalars need no sender: they reach every logger through Lightning.

    Args:
        class_name: Name of the logger's class, or of one that it inherits from.
        sender: Sends one heatmap. An exception becomes one warning per logger; training goes on.

    Example:
        >>> def send_to_wiki(logger, heatmap, images, step):
        ...     for (a, b, score), image in images.items():
        ...         logger.upload(f"{score} of {a} and {b}, {caption(heatmap)}", image)
        >>> register_logger("WikiLogger", send_to_wiki)
    """
    _SENDERS[class_name] = sender


def caption(heatmap: InterferenceHeatmap) -> str:
    """When a picture was taken: the loggers' own counters may mean something else."""
    return f"epoch {heatmap.epoch}, step {heatmap.step}"


def scalars(heatmap: InterferenceHeatmap) -> dict[str, float]:
    """A handful of numbers per task pair, and one over all pairs, to stop or checkpoint on."""
    result: dict[str, float] = {}
    first = next(iter(heatmap.scores))
    for a, b in heatmap.task_pairs:
        key = f"{safe_name(a)}__{safe_name(b)}"
        result[f"{key}/mean"] = float(heatmap.values(a, b).nanmean())
        for score in heatmap.scores:
            values, prefix = heatmap.values(a, b, score), "" if score == first else f"{score}_"
            if SCORES[score].falling:
                result[f"{key}/{prefix}min"] = -float(_largest(-values))
            else:
                result[f"{key}/{prefix}max"] = float(_largest(values))
    result["max"] = max((value for key, value in result.items() if key.endswith("/max")), default=math.nan)
    return result


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num(nan=-math.inf).max()


def pictures(heatmap: InterferenceHeatmap, scores: Sequence[str]) -> Images:
    """A picture of each of the scores for the pairs that are shown."""
    return {
        (a, b, score): render(heatmap_figure(heatmap, a, b, score))
        for a, b in heatmap.shown_pairs
        for score in scores
    }


def write_files(heatmap: InterferenceHeatmap, images: Images, directory: Path) -> None:
    """The heatmap, its tables and its pictures in the folder of a run.

    Raises:
        OSError: If the disk refuses.
    """
    heatmap.save(directory / "snapshots" / f"step_{heatmap.step:08d}.json")
    heatmap.save(directory / "latest.json")
    write_tables(heatmap, directory)
    for (a, b, score), image in images.items():
        save_image(image, directory / "figures" / f"{score}_{safe_name(a)}__{safe_name(b)}.png")


def _tensorboard(logger: Any, heatmap: InterferenceHeatmap, images: Images, step: int) -> None:
    # TensorBoard's images have no caption: epoch and step are in the picture's title.
    for (a, b, score), image in images.items():
        logger.experiment.add_image(
            f"interference_{score}/{safe_name(a)}__{safe_name(b)}", image, step, dataformats="HWC"
        )
    for a, b in heatmap.shown_pairs:
        text = f"**{b} pushes on {a}** ({caption(heatmap)})\n\n{markdown_table(heatmap, a, b, select(heatmap, top=10))}"
        logger.experiment.add_text(f"hottest_cells/{safe_name(a)}__{safe_name(b)}", text, step)


def _wandb(logger: Any, heatmap: InterferenceHeatmap, images: Images, step: int) -> None:
    import wandb

    # Without `step=`: W&B silently drops what comes with a step below its own counter.
    logger.log_metrics(
        {
            f"interference_{score}/{safe_name(a)}__{safe_name(b)}": wandb.Image(
                image, caption=f"{score}: {b} pushes on {a}, {caption(heatmap)}"
            )
            for (a, b, score), image in images.items()
        },
        step,
    )
    rows = [list(row) for row in cell_rows(heatmap)]
    logger.log_metrics({"interference/cells": wandb.Table(columns=list(COLUMNS), data=rows)}, step)
    logger.log_metrics(
        {
            f"interference_interactive/{safe_name(a)}__{safe_name(b)}": wandb.Plotly(
                interactive_heatmap(heatmap, a, b)
            )
            for a, b in heatmap.shown_pairs
        },
        step,
    )


def _mlflow(logger: Any, heatmap: InterferenceHeatmap, images: Images, step: int) -> None:  # noqa: ARG001
    client, run = logger.experiment, logger.run_id
    # MLflow's artifacts have no caption: the folder says when.
    folder = f"interference/epoch_{heatmap.epoch:04d}_step_{heatmap.step:08d}"
    for (a, b, score), image in images.items():
        client.log_image(run, image, f"{folder}/{score}_{safe_name(a)}__{safe_name(b)}.png")
    client.log_text(run, to_csv(COLUMNS, cell_rows(heatmap)), f"{folder}/cells.csv")
    for a, b in heatmap.shown_pairs:
        figure = interactive_heatmap(heatmap, a, b)
        client.log_figure(run, figure, f"{folder}/{safe_name(a)}__{safe_name(b)}.html")


def _comet(logger: Any, heatmap: InterferenceHeatmap, images: Images, step: int) -> None:
    from PIL import Image

    for (a, b, score), image in images.items():
        name = f"{score}: {b} pushes on {a}, {caption(heatmap)}"
        # Comet rescales arrays, which overflows in uint8, and only logs the error.
        logger.experiment.log_image(Image.fromarray(image), name=name, step=step)
    rows = [list(row) for row in cell_rows(heatmap)]
    logger.experiment.log_table(
        f"interference_cells_step_{heatmap.step:08d}.csv", tabular_data=rows, headers=list(COLUMNS)
    )


# By class name: `lightning` and `pytorch_lightning` have different classes of the same name.
_SENDERS: dict[str, Sender] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
}


def send(
    loggers: Iterable[Any], heatmap: InterferenceHeatmap, images: Images, step: int, failed: set[int]
) -> None:
    """Send pictures and tables to every logger that can show them.

    Args:
        loggers: The trainer's loggers; scalars reach them through Lightning itself.
        heatmap: The result.
        images: Its pictures.
        step: Step that the trainer's own metrics carry at this moment.
        failed: Positions of the loggers that were warned about; those that fail now are added.

    Warns: UserWarning: The first time that a logger fails; training goes on, and the next heatmap is tried
        again.
    """
    for position, logger in enumerate(loggers):
        sender = next(
            (_SENDERS[cls.__name__] for cls in type(logger).__mro__ if cls.__name__ in _SENDERS), None
        )
        if sender is None:
            continue
        try:
            sender(logger, heatmap, images, step)
        except Exception as error:
            if position not in failed:
                failed.add(position)
                warnings.warn(
                    f"{type(logger).__name__} did not take the interference heatmap: {type(error).__name__}: {error}",
                    stacklevel=2,
                )
