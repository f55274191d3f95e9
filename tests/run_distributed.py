"""Started by test_distributed.py in a fresh process: trains on two processes and leaves heatmaps behind."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from models import Classifier, GroupedAttention
from modules import Module, Samples, trainer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from qkov_lightning import InterferenceMonitor


class OwnDirectory(Callback):
    """Each process gets a cache directory of its own, as without a shared file system."""

    def __init__(self, monitor: InterferenceMonitor, root: Path) -> None:
        self.monitor, self.root = monitor, root

    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        self.monitor.cache_dir = self.root / f"rank{trainer.global_rank}"


class InOrder(Module):
    """Deals the samples out in turn: even ones are math, odd ones code, so each of two processes sees one task."""

    def train_dataloader(self) -> DataLoader:
        world_size, samples = self.trainer.world_size, Samples(26)
        sampler = DistributedSampler(samples, world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(samples, batch_size=4 // world_size, sampler=sampler)


def main(root: Path, mode: str) -> None:
    warnings.simplefilter("ignore")
    sampled = mode == "sampled"
    monitor = InterferenceMonitor(every_n_steps=1, storage="sampled" if sampled else "auto")
    callbacks: list[Callback] = [monitor]
    if mode == "not shared":
        callbacks.append(OwnDirectory(monitor, root))
    processes = 1 if mode == "one process" else 2
    settings: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {}
    fit = trainer(root, *callbacks, max_epochs=2, use_distributed_sampler=False, **settings)
    attention = GroupedAttention(width=64, heads=2, kv_heads=1, size=16, value_size=16)
    network = Classifier([attention, attention], width=64) if sampled else None
    fit.fit(InOrder(learning_rate=0.0, network=network))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
