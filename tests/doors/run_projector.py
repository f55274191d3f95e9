"""Started by test_projector.py in a fresh process.

Trains on two processes, and leaves the weights behind.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from modules import Module, loader, trainer
from run_freezer import Trained

from qkov_lightning import HeadProjector, measure_subspace


class Kept(Trained):
    """Leaves the whole weights behind."""

    def on_train_end(self) -> None:
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in self.state_dict().items()
        }
        if self.trainer.is_global_zero:
            torch.save(state, Path(self.trainer.default_root_dir) / "after.pt")


def main(root: Path, mode: str) -> None:
    warnings.simplefilter("ignore")
    torch.save(Module().state_dict(), root / "before.pt")
    measure_subspace(Module(), list(loader(8)), rank=3).save(root / "subspace.safetensors")
    strategy = "ddp_fork" if mode == "ddp" else ModelParallelStrategy(2, 1)
    projector = HeadProjector(root / "subspace.safetensors")
    trainer(root, projector, strategy=strategy, devices=2).fit(Kept(), loader(24))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    if torch.distributed.is_initialized():  # threads of gloo that outlive the interpreter abort it
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
