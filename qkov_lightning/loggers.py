"""Send a heatmap to the trainer's loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from qkov_lightning.heatmap import InterferenceHeatmap, safe_name
from qkov_lightning.terminal import markdown_table

Images = dict[tuple[str, str, str], np.ndarray]
"""Pictures by (task_a, task_b, score), uint8 ``[height, width, 3]``."""

Sender = Callable[[Any, InterferenceHeatmap, Images, int], None]


def _tensorboard(logger: Any, heatmap: InterferenceHeatmap, images: Images, step: int) -> None:
    for (a, b, score), image in images.items():
        logger.experiment.add_image(
            f"interference_{score}/{safe_name(a)}__{safe_name(b)}", image, step, dataformats="HWC"
        )
    for a, b in heatmap.task_pairs:
        text = f"**{b} pushes on {a}** (epoch {heatmap.epoch}, step {heatmap.step})\n\n{markdown_table(heatmap, a, b)}"
        logger.experiment.add_text(f"hottest_cells/{safe_name(a)}__{safe_name(b)}", text, step)


# By class name: `lightning` and `pytorch_lightning` have different classes of the same name.
_SENDERS: dict[str, Sender] = {"TensorBoardLogger": _tensorboard}


def send(loggers: Iterable[Any], heatmap: InterferenceHeatmap, images: Images, step: int) -> None:
    """Send pictures and tables to every logger that can show them.

    Args:
        loggers: The trainer's loggers; scalars reach them through Lightning itself.
        heatmap: The result.
        images: Its pictures.
        step: Step that the trainer's own metrics carry at this moment.

    Warns:
        UserWarning: If a logger fails; training goes on.
    """
    for logger in loggers:
        sender = next(
            (_SENDERS[cls.__name__] for cls in type(logger).__mro__ if cls.__name__ in _SENDERS), None
        )
        if sender is None:
            continue
        try:
            sender(logger, heatmap, images, step)
        except Exception as error:
            warnings.warn(
                f"{type(logger).__name__} did not take the interference heatmap: {type(error).__name__}: {error}",
                stacklevel=2,
            )
