"""What callbacks that act on optimiser steps have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepCallback(Callback):
    """Acts before and after every optimiser step, and when a batch ends, since weights may move outside."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    @abstractmethod
    def _before_step(self, *_: Any) -> None:
        """Note what the step must not change."""

    @abstractmethod
    def _after_step(self, *_: Any) -> None:
        """Undo what the step must not change."""

    @abstractmethod
    def _let_go(self) -> None:
        """Hold no weight of the model any more."""

    def _watch_steps(self, trainer: Trainer) -> None:
        """Hook the steps of every optimiser."""
        for optimizer in trainer.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Undo what moved outside of a step."""
        self._after_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimisers as they were found."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimisers as they were found."""
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._let_go()
