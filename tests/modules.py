"""A LightningModule and data for the tests of the monitor."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from models import Classifier, GroupedAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

TASK_NAMES = ("math", "code")

ADVICE = (
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
    "ignore:The dirpath has changed.*",
    "ignore:Checkpoint directory .* exists and is not empty",
)
"""Warnings to ignore: advice of Lightning about the size of a test, not about the monitor."""


class Samples(Dataset):
    """Fixed samples; sample n belongs to task n modulo the number of tasks."""

    def __init__(self, size: int, tasks: tuple[str, ...] = TASK_NAMES, ids: bool = True) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(0, 11, (size, 5), generator=generator)
        self.targets = torch.randint(0, 5, (size,), generator=generator)
        self.tasks, self.ids = tasks, ids

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {
            "tokens": self.tokens[index],
            "target": self.targets[index],
            "task": self.tasks[index % len(self.tasks)],
        }
        return item | ({"sample_id": f"sample-{index}"} if self.ids else {})


class Module(LightningModule):
    """Classification with attention, dropout included so that random streams matter."""

    def __init__(
        self, learning_rate: float = 0.05, dropout: float = 0.0, network: nn.Module | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = network or Classifier([GroupedAttention() for _ in range(2)], width=10)
        self.dropout = nn.Dropout(dropout)
        self.learning_rate = learning_rate

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return functional.cross_entropy(self.dropout(self.network(batch["tokens"])), batch["target"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["target"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


def loader(size: int = 24, batch_size: int = 4, **kwargs: Any) -> DataLoader:
    return DataLoader(Samples(size, **kwargs), batch_size=batch_size)


def trainer(root: Any, *callbacks: Any, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=root, callbacks=list(callbacks), **(settings | kwargs))
