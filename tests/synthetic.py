"""Heatmaps with known numbers, and a small training run, for tests of what is shown."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from qkov_lightning.measure.cells import BlockInfo, Layer, SamplePair
from qkov_lightning.measure.heatmap import InterferenceHeatmap


def make_heatmap(
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    tasks: tuple[str, ...] = ("math", "code"),
    step: int = 120,
    epoch: int = 3,
    seed: int = 0,
) -> InterferenceHeatmap:
    """Layer 1 frozen in all blocks, layer 0 block Q head 1 without data.

    Every other cell has its own value.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(tasks), len(tasks), layers, heads, 4)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    values[..., 1, :, :] = torch.nan
    values[..., 0, 1, 0] = torch.nan
    values[..., kv_heads:, 1:3] = torch.nan
    counts = torch.full((len(tasks), layers, heads, 4), 50.0, dtype=torch.float64)
    infos = []
    for layer in range(layers):
        status: Any = "frozen" if layer == 1 else "measured"
        blocks: Any = {
            block: BlockInfo(f"layers.{layer}.{block}", kv_heads if block in "KV" else heads,
                             heads // kv_heads if block in "KV" else 1, status)
            for block in "QKVO"
        }  # fmt: skip
        infos.append(Layer(f"layers.{layer}.attention", blocks))
    scores = {
        "interference": 10 * values,
        "relative": 2 * values,
        "cosine": 2 * values - 1,
        "loss_rise": 1 - 2 * values,
    }
    errors = dict.fromkeys(scores, 0.05 + 0 * values)
    pairs = tuple(
        SamplePair(tasks[0], f"a{i}", tasks[-1], f"b{i}", 0, 0, "Q", float(9 - i)) for i in range(3)
    )
    return InterferenceHeatmap(
        tasks, tuple(infos), scores, errors, counts, step, epoch, pairs, {"batches": 7}
    )


class TinyAttention(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyTasks(LightningModule):
    """Two tasks on random vectors; Lightning's own class, whichever namespace it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = TinyAttention()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = (self.self_attn(batch["x"]) - batch["x"].flip(-1)).square().mean(dim=(1, 2)).mean()
        self.log("train_loss", loss, batch_size=len(batch["x"]))
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["x"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"x": torch.randn(3, 8, generator=generator), "task": ("math", "code")[i % 2]} for i in range(16)
    ]
    return DataLoader(samples, 4)


def train(monitor: Any, path: Path, trainer: Any = Trainer, model: Any = None, **kwargs: Any) -> Any:
    """Two epochs with validation."""
    options = {"enable_progress_bar": False, "max_epochs": 2, **kwargs}
    fitted = trainer(
        default_root_dir=path, accelerator="cpu", callbacks=[monitor, *options.pop("callbacks", [])],
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    fitted.fit(model or TinyTasks(), loader(), loader())
    return fitted
