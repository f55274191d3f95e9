"""A small byte-level decoder and three real texts that every Python installation carries."""

import pydoc_data.topics
import random
import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class SelfAttention(nn.Module):
    """Causal attention with separate projections."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(context.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then a feed-forward network, each with a residual connection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, num_heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.attention_norm(x))
        return x + self.mlp(x)


class ByteDecoder(nn.Module):
    """Predicts the next byte at every position."""

    def __init__(self, width: int = 128, num_heads: int = 4, num_layers: int = 4, context: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.Sequential(*(Layer(width, num_heads) for _ in range(num_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.token(tokens) + self.position[: tokens.shape[1]]))


def prose() -> dict[str, str]:
    """The Python reference's topics."""
    return {f"topics/{name}": text for name, text in pydoc_data.topics.topics.items() if len(text) > 2000}


def code() -> dict[str, str]:
    """Source files of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return {file.name: file.read_text("utf-8", errors="replace") for file in files}


def math() -> dict[str, str]:
    """Arithmetic problems, worked out."""
    generator = random.Random(0)
    texts = {}
    for part in range(200):
        lines = []
        for _ in range(150):
            a, b = generator.randrange(100), generator.randrange(100)
            lines.append(
                generator.choice([f"{a} + {b} = {a + b}", f"{a} - {b} = {a - b}", f"{a} * {b} = {a * b}"])
            )
        texts[f"arithmetic/{part}"] = "\n".join(lines)
    return texts


class Windows(Dataset):
    """Random windows of the texts; the same index always gives the same window."""

    def __init__(self, num_samples: int, context: int, seed: int) -> None:
        self.tasks = {"prose": prose(), "code": code(), "math": math()}
        self.num_samples, self.context, self.seed = num_samples, context, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict:
        generator = random.Random(self.seed * 1_000_003 + index)
        task = generator.choice(list(self.tasks))
        name = generator.choice(list(self.tasks[task]))
        text = self.tasks[task][name].encode()
        start = generator.randrange(max(1, len(text) - self.context - 1))
        window = text[start : start + self.context + 1].ljust(self.context + 1)
        return {"bytes": torch.tensor(list(window)), "task": task, "sample_id": f"{name}@{start}"}


class TextTasks(LightningDataModule):
    """Batches that mix the three tasks."""

    def __init__(
        self, num_train: int = 7200, num_validation: int = 240, batch_size: int = 12, context: int = 96
    ) -> None:
        super().__init__()
        self.num_train, self.num_validation = num_train, num_validation
        self.batch_size, self.context = batch_size, context

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.num_train, self.context, seed=0), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.num_validation, self.context, seed=1), self.batch_size)

    def probe_dataloader(self) -> DataLoader:
        """Fixed samples, for `qkov probe` and `qkov protect`."""
        return DataLoader(Windows(96, self.context, seed=2), self.batch_size)
