"""Train a small decoder on prose, code and arithmetic, and see where the three tasks interfere.

Run with ``make demo``, or ``python examples/demo.py`` where qkov-lightning[tensorboard] is installed.
"""

import logging
import warnings
from pathlib import Path

import torch
from byte_model import ByteDecoder, TextTasks
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from qkov_lightning import InterferenceMonitor
from qkov_lightning.views.terminal import overview


class ByteLanguageModel(LightningModule):
    """Next-byte prediction. Nothing here knows about the monitor."""

    def __init__(
        self, width: int = 128, num_heads: int = 4, num_layers: int = 4, learning_rate: float = 2e-3
    ) -> None:
        super().__init__()
        self.decoder = ByteDecoder(width, num_heads, num_layers)
        self.learning_rate = learning_rate

    def loss(self, batch: dict) -> Tensor:
        text = batch["bytes"]
        return functional.cross_entropy(self.decoder(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["bytes"]))
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch["bytes"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


def main() -> None:
    # One process reads data that is in memory: Lightning's advice to add workers does not apply. The other
    # two lines are Lightning's own affairs.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    seed_everything(0, verbose=False)
    monitor = InterferenceMonitor()
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name="demo"),
        callbacks=[monitor, RichProgressBar()],
        enable_model_summary=False,
        limit_train_batches=150,
    )
    trainer.fit(ByteLanguageModel(), TextTasks())

    console = Console()
    console.print(overview(monitor.heatmap))
    results = (
        monitor.results.relative_to(Path.cwd())
        if monitor.results.is_relative_to(Path.cwd())
        else monitor.results
    )
    for what, path in {
        "heatmap (JSON)": results / "latest.json",
        "every epoch": results / "snapshots",
        "figures": results / "figures",
        "TensorBoard": Path(trainer.logger.log_dir),
    }.items():
        console.print(f"{what:<16} {path}", soft_wrap=True, highlight=False)
    console.print(
        f"\nOpen it with:    .venv/bin/tensorboard --logdir {trainer.logger.save_dir}",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main()
