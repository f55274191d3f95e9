"""The processes of a distributed run: what they share, and how all of them stop or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.pytorch import Trainer

from qkov_lightning.cache import CacheError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a trainer; every method is called by all of them, or they wait for each other."""

    trainer: Trainer

    @property
    def rank(self) -> int:
        """This process."""
        return self.trainer.global_rank

    @property
    def count(self) -> int:
        """How many there are."""
        return self.trainer.world_size

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes for all."""
        return self.trainer.is_global_zero

    def from_first(self, value: T) -> T:
        """What the first process has."""
        return self.trainer.strategy.broadcast(value)

    def all(self, condition: bool) -> bool:
        """Whether it holds in every process."""
        return self.trainer.strategy.reduce_boolean_decision(condition, all=True)

    def gather(self, own: list[T]) -> list[T]:
        """What all of them have."""
        if self.count == 1:
            return own
        everyone: list[list[T]] = [[] for _ in range(self.count)]
        torch.distributed.all_gather_object(everyone, own)
        return [item for one in everyone for item in one]

    def agree(self, error: CacheError | None) -> None:
        """Fail in all processes or in none: one that stopped alone would leave the others waiting.

        Raises:
            CacheError: If a process has an error.
        """
        if not self.all(error is None):
            raise error or CacheError("Another process cannot measure, and says why.")

    def wait(self) -> None:
        """Until all are here."""
        self.trainer.strategy.barrier("qkov")


def check_strategy(trainer: Trainer, probing: bool) -> None:
    """Refuse the strategies that split a projection, or scale the loss, where no tap sees it.

    Args:
        trainer: Has the strategy.
        probing: Whether a probe runs outside of the training step.

    Raises:
        ValueError: If it is one of them.
    """
    # By name: Lightning has two packages, with a class each.
    for name in (cls.__name__ for cls in type(trainer.strategy).__mro__):
        if name in {"FSDPStrategy", "DeepSpeedStrategy"}:
            raise ValueError(
                f"InterferenceMonitor cannot vouch for its numbers under {name}: it is tested with one device, DDPStrategy and "
                "ModelParallelStrategy (FSDP2: `fully_shard` in `configure_model`). Use one of these."
            )
        if name == "ModelParallelStrategy":
            if probing:
                raise ValueError(
                    "InterferenceMonitor cannot run its probe under ModelParallelStrategy: outside of the training step the weights "
                    "are in pieces. Leave `probe` out, or measure a checkpoint with `qkov probe`."
                )
            size = trainer.strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
            if size > 1:
                raise ValueError(
                    f"InterferenceMonitor cannot see whole heads under ModelParallelStrategy with tensor_parallel_size={size}: each "
                    "process computes a part of every projection. Say tensor_parallel_size=1 and shard with `fully_shard`."
                )
