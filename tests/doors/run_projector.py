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
from run_freezer import Trained, leave
from torch import Tensor

from qkov_lightning import HeadProjector, measure_subspace


class Kept(Trained):
    """Leaves the whole weights behind."""

    def kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


def main(root: Path, mode: str) -> None:
    warnings.simplefilter("ignore")
    torch.save(Module().state_dict(), root / "before.pt")
    measure_subspace(Module(), list(loader(8)), rank=3).save(root / "subspace.safetensors")
    strategy = "ddp_fork" if mode == "ddp" else ModelParallelStrategy(2, 1)
    projector = HeadProjector(root / "subspace.safetensors")
    trainer(root, projector, strategy=strategy, devices=2).fit(Kept(), loader(24))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave()
