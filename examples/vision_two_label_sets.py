"""One vision transformer, two label sets: do "which digit?" and "is it even?" get in each other's way?

Needs transformers and scikit-learn, whose 1797 handwritten digits of 8 x 8 pixels it trains on.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTModel

from qkov_lightning import InterferenceMonitor
from qkov_lightning.views.screen import screen

LABELS = {"digit": lambda digit: digit, "parity": lambda digit: digit % 2}
NUM_CLASSES = {"digit": 10, "parity": 2}


class TwoLabelSets(LightningModule):
    """A shared vision transformer with a classifier per label set."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=4,
        )  # fmt: skip
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifiers = nn.ModuleDict({task: nn.Linear(64, n) for task, n in NUM_CLASSES.items()})

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Each sample's own loss, and whether its label was found."""
        image = self.vit(batch["image"]).last_hidden_state[:, 0]
        losses, correct = image.new_zeros(len(image)), image.new_zeros(len(image))
        for task, classifier in self.classifiers.items():
            of_task = torch.tensor([name == task for name in batch["task"]], device=image.device)
            logits, label = classifier(image[of_task]), batch["label"][of_task]
            losses[of_task] = functional.cross_entropy(logits, label, reduction="none")
            correct[of_task] = (logits.argmax(dim=1) == label).to(correct)
        return losses, correct

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return self(batch)[0].mean()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("accuracy", self(batch)[1].mean(), prog_bar=True, batch_size=len(batch["task"]))

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.parameters(), 1e-3)


def samples() -> list[dict]:
    """Every image twice: once with each label."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return [
        {"image": image, "label": label(int(digit)), "task": task, "sample_id": f"image {index}"}
        for index, (image, digit) in enumerate(zip(images, digits.target, strict=True))
        for task, label in LABELS.items()
    ]


def main(max_epochs: int = 5) -> None:
    seed_everything(0, verbose=False)
    everything = samples()
    validation, train = everything[:594], everything[594:]
    monitor = InterferenceMonitor()
    trainer = Trainer(max_epochs=max_epochs, callbacks=[monitor])
    trainer.fit(TwoLabelSets(), DataLoader(train, 32, shuffle=True), DataLoader(validation, 128))
    Console().print(f"Validation accuracy {float(trainer.callback_metrics['accuracy']):.2f}")
    Console().print(screen(monitor.heatmap, str(monitor.results)))


if __name__ == "__main__":
    main()
