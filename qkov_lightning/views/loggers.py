"""How the loggers of a trainer get pictures and tables, each in its own way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_key
from qkov_lightning.views.answer import answer
from qkov_lightning.views.interactive import interactive_heatmap
from qkov_lightning.views.publication import MAX_DRAWN, Publication
from qkov_lightning.views.tables import COLUMNS, cell_rows, select, to_csv
from qkov_lightning.views.terminal import markdown_table

Sender = Callable[[Any, Publication], None]
"""What is called with the logger and what it is to show."""


def register_logger(class_name: str, sender: Sender) -> None:
    """Teach the monitor to send pictures and tables to a logger of your own.

    Scalars need no sender: every logger takes them.

    Args:
        class_name: Name of the logger's class, or of one that it inherits from.
        sender: Sends one publication. An exception becomes one warning per logger; training goes on.

    Example:
        >>> def send_to_wiki(logger, publication):
        ...     for tag, image in publication.tagged():
        ...         logger.upload(f"{tag}, {publication.caption}", image)
        >>> register_logger("WikiLogger", send_to_wiki)
    """
    _SENDERS[class_name] = sender


def _tensorboard(logger: Any, publication: Publication) -> None:
    # TensorBoard's images have no caption: epoch and step are in the picture's title.
    for tag, image in publication.tagged():
        logger.experiment.add_image(tag, image, publication.step, dataformats="HWC")
    if publication.heatmap is not None:
        text = _markdown(publication.heatmap)
        logger.experiment.add_text(f"{publication.name}/verdict", text, publication.step)


def _wandb(logger: Any, publication: Publication) -> None:
    import wandb

    # Without `step=`: W&B silently drops what comes with a step below its own counter.
    step, heatmap = publication.step, publication.heatmap
    images = {tag: wandb.Image(image, caption=publication.caption) for tag, image in publication.tagged()}
    logger.log_metrics(images, step)
    if heatmap is None:
        return
    rows = [list(row) for row in cell_rows(heatmap)]
    logger.log_metrics({f"{publication.name}/cells": wandb.Table(columns=list(COLUMNS), data=rows)}, step)
    figures = {
        f"{publication.name}/interactive/{pair_key(a, b)}": wandb.Plotly(interactive_heatmap(heatmap, a, b))
        for a, b in heatmap.shown_pairs[:MAX_DRAWN]
    }
    logger.log_metrics(figures, step)


def _mlflow(logger: Any, publication: Publication) -> None:
    client, run, heatmap = logger.experiment, logger.run_id, publication.heatmap
    # MLflow's artifacts have no caption: the folder says when.
    when = publication.caption.replace(", ", "_").replace(" ", "_")
    folder = f"{publication.name}/{when}"
    for name, image in publication.files():
        client.log_image(run, image, f"{folder}/{name}")
    if heatmap is None:
        return
    client.log_text(run, to_csv(COLUMNS, cell_rows(heatmap)), f"{folder}/cells.csv")
    for a, b in heatmap.shown_pairs[:MAX_DRAWN]:
        client.log_figure(run, interactive_heatmap(heatmap, a, b), f"{folder}/{pair_key(a, b)}.html")


def _comet(logger: Any, publication: Publication) -> None:
    from PIL import Image

    for tag, image in publication.tagged():
        # Comet rescales arrays, which overflows in uint8, and only logs the error.
        name = f"{tag}, {publication.caption}"
        logger.experiment.log_image(Image.fromarray(image), name=name, step=publication.step)
    if publication.heatmap is not None:
        rows = [list(row) for row in cell_rows(publication.heatmap)]
        name = f"{publication.name}_cells_step_{publication.step:08d}.csv"
        logger.experiment.log_table(name, tabular_data=rows, headers=list(COLUMNS))


def _markdown(heatmap: InterferenceHeatmap) -> str:
    """The verdict, and the worst cells of the worst pair."""
    lines = [f"- {line}" for line in answer(heatmap)]
    a, b = heatmap.shown_pairs[0]
    return "\n".join([*lines, "", markdown_table(heatmap, a, b, select(heatmap, top=10))])


# By class name: `lightning` and `pytorch_lightning` have different classes of the same name.
_SENDERS: dict[str, Sender] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
}


def send_scalars(loggers: Iterable[Any], values: Mapping[str, float], step: int, failed: set[int]) -> None:
    """Send numbers to every logger, as ``send`` sends pictures."""
    for position, logger in enumerate(loggers):
        _try(partial(logger.log_metrics, dict(values), step), logger, position, failed)


def send(loggers: Iterable[Any], publication: Publication, failed: set[int]) -> None:
    """Send pictures and tables to every logger that can show them.

    Args:
        loggers: The trainer's loggers.
        publication: What to show.
        failed: Positions of the loggers that were warned about; those that fail now are added.

    Warns: UserWarning: The first time that a logger fails; training goes on, and the next publication is
        tried again.
    """
    for position, logger in enumerate(loggers):
        sender = next(
            (_SENDERS[cls.__name__] for cls in type(logger).__mro__ if cls.__name__ in _SENDERS), None
        )
        if sender is not None:
            _try(partial(sender, logger, publication), logger, position, failed)


def _try(action: Callable[[], Any], logger: Any, position: int, failed: set[int]) -> None:
    try:
        action()
    except Exception as error:
        if position not in failed:
            failed.add(position)
            warnings.warn(
                f"{type(logger).__name__} did not take the interference heatmap: {type(error).__name__}: {error}",
                stacklevel=4,
            )
