"""Started by test_freezer.py in a fresh process.

Trains on two processes, and leaves the cells' values behind.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from modules import Module, loader, trainer
from test_freezer import CELLS, adamw, cell_values
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from qkov_lightning import HeadFreezer


class Trained(Module):
    """AdamW; sharded where the strategy brings a mesh of devices."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in self.network.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())

    def on_train_end(self) -> None:
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in self.state_dict().items()
        }
        if self.trainer.is_global_zero:
            torch.save(self.kept(state), Path(self.trainer.default_root_dir) / "after.pt")

    def kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What to leave behind of the whole weights: here the values of the cells."""
        whole = Module()
        whole.load_state_dict(state)
        return cell_values(whole)


def leave() -> None:
    """End the processes together: threads of gloo that outlive the interpreter abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main(root: Path, mode: str) -> None:
    warnings.simplefilter("ignore")
    module = Trained()
    torch.save(cell_values(module), root / "before.pt")
    strategy = "ddp_fork" if mode == "ddp" else ModelParallelStrategy(2, 1)
    trainer(root, HeadFreezer(CELLS), strategy=strategy, devices=2).fit(module, loader(24))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave()
