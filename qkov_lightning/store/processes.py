"""The processes of a distributed run: what they share, and how all of them stop or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.pytorch import Trainer

from qkov_lightning.store.cache import CacheError

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
