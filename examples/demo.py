"""Train a small decoder on prose, code and arithmetic, and see where the three tasks interfere.

Run with ``make demo``, or ``python examples/demo.py`` where qkov-lightning[tensorboard] is installed.
"""

import logging
import warnings
from pathlib import Path

import torch
from byte_model import ByteDecoder, TextTasks
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from qkov_lightning import InterferenceMonitor
from qkov_lightning.views.screen import screen


class ByteLanguageModel(LightningModule):
    """Next-byte prediction. Nothing here knows about the monitor."""

    def __init__(
        self, width: int = 128, num_heads: int = 4, num_layers: int = 4, learning_rate: float = 2e-3
    ) -> None:
        super().__init__()
        self.decoder = ByteDecoder(width, num_heads, num_layers)
        self.learning_rate = learning_rate
        self.example_input_array = torch.randint(256, (2, 16))

    def forward(self, text: Tensor) -> Tensor:
        return self.decoder(text)

    def loss(self, batch: dict) -> Tensor:
        text = batch["bytes"]
        return functional.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

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
    console = Console()
    console.print(
        "A small decoder learns prose, code and arithmetic for 4 epochs: about three minutes on two cores."
    )
    monitor = InterferenceMonitor(every_n_steps=5, max_samples_per_task=256, sample_text_of=text_of)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name="demo"),
        # Weights alone are enough for `qkov probe`; nothing resumes from here, so that no cache has to stay.
        callbacks=[monitor, RichProgressBar(), ModelCheckpoint(save_weights_only=True)],
        enable_model_summary=False,
        limit_train_batches=150,
    )
    trainer.fit(ByteLanguageModel(), TextTasks())

    results = monitor.results
    if results.is_relative_to(Path.cwd()):
        results = results.relative_to(Path.cwd())
    console.print()
    console.print(screen(monitor.heatmap, str(results)))
    console.print(
        f"\nTensorBoard: tensorboard --logdir {trainer.logger.save_dir}", soft_wrap=True, highlight=False
    )


def text_of(batch: dict) -> list[str]:
    """What a sample says, to be shown beside its number."""
    return [bytes(one.tolist()).decode(errors="replace") for one in batch["bytes"]]


if __name__ == "__main__":
    main()
