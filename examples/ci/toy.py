"""Two tasks and a model small enough for every push; `python toy.py` trains it and writes `model.ckpt`."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

WIDTH, HEADS, LENGTH = 16, 2, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(
            functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.head = nn.Linear(WIDTH, 1)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        prediction = self.head(batch["x"] + self.attention(batch["x"])).squeeze(-1)
        return (prediction - batch["y"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Tasks(LightningDataModule):
    def samples(self, count: int, seed: int) -> list[dict]:
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for index in range(count):
            x = torch.randn(LENGTH, WIDTH, generator=generator)
            task = ("mean", "last")[index % 2]
            y = x[:, 0].mean().expand(LENGTH) if task == "mean" else x[-1, 1].expand(LENGTH)
            samples.append({"x": x, "y": y.clone(), "task": task, "sample_id": f"{seed}.{index}"})
        return samples

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples(256, seed=0), batch_size=16)

    def probe_dataloader(self) -> DataLoader:
        """The fixed samples that the gate looks at."""
        return DataLoader(self.samples(64, seed=1), batch_size=16)


if __name__ == "__main__":
    seed_everything(0)
    trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Toy(), Tasks())
    trainer.save_checkpoint("model.ckpt")
