"""The processes of a run: what they share, and how all of them stop or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from qkov_lightning.store.files import CacheError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that measure together.

    Every method is called by all of them, or they wait for each other.

    Attributes:
        rank: This process. It takes every ``count``-th layer.
        count: How many there are.
        strategy: How they talk to each other; None for a single process.
    """

    rank: int = 0
    count: int = 1
    strategy: Strategy | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> Processes:
        """Those of a trainer."""
        return cls(trainer.global_rank, trainer.world_size, trainer.strategy)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes for all."""
        return self.rank == 0

    def takes(self, layer: int) -> bool:
        """Whether this process measures the layer."""
        return layer % self.count == self.rank

    def from_first(self, value: T) -> T:
        """What the first process has."""
        return value if self.strategy is None else self.strategy.broadcast(value)

    def all(self, condition: bool) -> bool:
        """Whether it holds in every process."""
        if self.strategy is None:
            return condition
        return self.strategy.reduce_boolean_decision(condition, all=True)

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
        if self.strategy is not None:
            self.strategy.barrier("qkov")
