"""Other libraries that capture per-sample gradients from a training loop, as callbacks of a Trainer.

Each captures the attention projections alone, in every step, and keeps what it captures on disk.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from qkov_lightning import find_projections

MAX_SAMPLES = 64
"""Rows that bergson makes room for; what is not used takes no space on disk."""


def problem(package: str) -> str | None:
    """Why a package cannot be used here; None if it can."""
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever its imports run into
        return f"{type(error).__name__}: {error}"
    return None


class DattriLlm(Callback):
    """``HookManager`` and ``OffloadCallback`` of dattri-llm: factors, written on a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from dattri_llm import GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback

        names = {projection.module_name for projection in find_projections(pl_module.model)}
        store = GradientStorageManager(str(self._folder))
        manager = HookManager(
            pl_module.model,
            config=HookManagerConfig(hook_types=dict.fromkeys(names, "linear_io")),
            callbacks=[OffloadCallback(offload_interval=1, file_manager=store, async_write=True)],
        )
        self._collecting = manager.collect(deregister_on_exit=True)
        self._collecting.__enter__()

    def on_train_end(self, *_: Any) -> None:
        self._collecting.__exit__(None, None, None)


class Bergson(Callback):
    """``GradientCollector`` of bergson: gradients of each sample, formed in the backward pass.

    Args:
        folder: Where they go.
        projection_dim: Random projections to so many rows and columns of each module; 0 for whole gradients.
    """

    def __init__(self, folder: Path, projection_dim: int = 0) -> None:
        self._folder, self._projection_dim = folder, projection_dim
        self.num_samples = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from bergson import GradientCollector, GradientProcessor, IndexConfig
        from datasets import Dataset

        self._collector = GradientCollector(
            model=pl_module.model,
            data=Dataset.from_dict({"input_ids": [[0]] * MAX_SAMPLES}),
            cfg=IndexConfig(run_path=str(self._folder), projection_dim=self._projection_dim),
            target_modules={projection.module_name for projection in find_projections(pl_module.model)},
            processor=GradientProcessor(projection_dim=self._projection_dim or None),
        )
        self._collector.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: dict, index: int
    ) -> None:
        rows = [(self.num_samples + row) % MAX_SAMPLES for row in range(len(batch["task"]))]
        self._collector.process_batch(rows, losses=torch.zeros(len(rows)))
        self.num_samples += len(rows)

    def on_train_end(self, *_: Any) -> None:
        self._collector.__exit__(None, None, None)
        self._collector.builder.flush()


PEERS = {
    "dattri-llm, factors": ("dattri_llm", DattriLlm),
    "bergson, whole gradients": ("bergson", Bergson),
    "bergson, projected to 16 x 16 a module": ("bergson", lambda folder: Bergson(folder, 16)),
}
"""Package that it needs, and the callback, which takes a folder."""


def bytes_below(folder: Path) -> int:
    """Disk space of all files: a file with holes takes less than its length."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
