"""Values for callbacks that wait for a scalar of the monitor before there is one."""

from __future__ import annotations

import re

import torch
from lightning.pytorch import Trainer

from qkov_lightning.scores.scores import SCORES

STATISTIC = re.compile(rf"(.+__.+/)?((({'|'.join(SCORES)})_)?(mean|min|max)|rise)|harmful_cells")
"""Names of the scalars of a heatmap, less the monitor's own name."""


def watched_scalars(trainer: Trainer, name: str) -> dict[str, str]:
    """Scalars of a monitor that callbacks and schedulers watch, and whether they wait for "min" or "max".

    Args:
        trainer: Holds EarlyStopping, ModelCheckpoint, ReduceLROnPlateau and the like.
        name: Name of the monitor.
    """
    watchers = [(callback, callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    watchers += [(config, config.scheduler) for config in trainer.lr_scheduler_configs]
    result = {}
    for watcher, owner in watchers:
        key = str(getattr(watcher, "monitor", None))
        if key.startswith(f"{name}/") and STATISTIC.fullmatch(key.removeprefix(f"{name}/")):
            result[key] = str(getattr(owner, "mode", "min"))
    return result


def stand_in(trainer: Trainer, name: str) -> None:
    """Give those who watch a scalar that has no value yet the worst one, which no logger sees.

    Without it, EarlyStopping, ModelCheckpoint and ReduceLROnPlateau stop the training at the first validation
    that ends before both tasks were captured. The first real value is better than this one, whatever it is.
    """
    worst = torch.finfo(torch.float32).max
    for key, mode in watched_scalars(trainer, name).items():
        value = torch.tensor(-worst if mode == "max" else worst)
        trainer.callback_metrics.setdefault(key, value)
