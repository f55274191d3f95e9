"""What the monitor costs on a GPU: one table, in a few minutes, from models that are made here.

python gpu.py                (says so and ends where there is no GPU)
python gpu.py --device cpu   (a rehearsal, with a small model and numbers that mean nothing)
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import torch
from caches import STORAGES, measured, written_cache
from shapes import LanguageModel, batch_of, loss_of, qwen3
from timing import interleaved, timed
from torch import Tensor, nn
from trainees import Trainee

from qkov_lightning import InterferenceMonitor
from qkov_lightning.capture.factors import GradientFactors
from qkov_lightning.capture.gradients import dense_gradients
from qkov_lightning.scores.reduction import slice_statistics

ROUNDS = 20
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = {"num_layers": 1, "hidden": 64, "intermediate": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


class Card:
    """The device, and what it can do: measured, not read from a data sheet."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_gpu = self.device.type == "cuda"
        self.accelerator = "gpu" if self.is_gpu else "cpu"
        self.name = torch.cuda.get_device_name() if self.is_gpu else "processor (a rehearsal)"
        self.size = 1 if self.is_gpu else 64  # how much smaller the tensors of a rehearsal are

    def seconds(self, run: Callable[[], object], rounds: int = 10) -> float:
        """Median time of a run, the kernels that it starts included."""
        run()
        return median(timed(partial(self.finish, run))[0] for _ in range(rounds))

    def finish(self, run: Callable[[], object]) -> None:
        """Run, and wait for the kernels."""
        run()
        if self.is_gpu:
            torch.cuda.synchronize()

    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.ones(2**28 // self.size, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def matrix_rate(self) -> float:
        """Operations a second of a large product of float32 matrices."""
        size = 8192 // self.size
        one = torch.randn(size, size, device=self.device)
        return 2 * size**3 / self.seconds(lambda: one @ one)


def training_steps(card: Card, precision: str, model: nn.Module, batch: dict) -> list[tuple[str, str]]:
    """Step with the monitor / plain step, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def trainee(name: str, *callbacks: InterferenceMonitor) -> Trainee:
            module = LanguageModel(copy.deepcopy(model).to(PRECISIONS[precision]))
            return Trainee(module, root / name, *callbacks, accelerator=card.accelerator)

        trainees = {"plain": trainee("plain")} | {
            name: trainee(name, InterferenceMonitor(every_n_steps=every, max_samples_per_task=8))
            for name, every in (("every step", 1), ("every tenth step", 10))
        }
        turns = {name: partial(card.finish, partial(one.step, batch)) for name, one in trainees.items()}
        times = interleaved(turns, ROUNDS)
        for one in trainees.values():
            one.stop()
    plain = times["plain"].wall
    rows = [(f"{precision}: plain step", f"{1e3 * median(plain):.1f} ms")]
    for name in trainees.keys() - {"plain"}:
        # The mean: one step in ten is captured.
        ratio = sum(times[name].wall) / sum(plain)
        rows.append((f"{precision}: step with the monitor, {name} captured / plain step", f"{ratio:.3f}"))
    return sorted(rows, reverse=True)


def heatmaps(card: Card, model: nn.Module, batches: list[dict]) -> list[tuple[str, str]]:
    """Validation pass / forward and backward over the same samples."""

    def train() -> None:
        for batch in batches:
            loss_of(model, batch["tokens"].to(card.device)).backward()
            model.zero_grad()

    rows = []
    for storage in STORAGES:
        with tempfile.TemporaryDirectory() as folder:
            cache = written_cache(model, batches, Path(folder), storage, card.accelerator)
            model.to(card.device)  # Lightning takes it back when training ends
            seconds = card.seconds(lambda cache=cache: measured(cache, model), rounds=3)
        ratio = seconds / card.seconds(train, rounds=5)
        rows.append((
            f"heatmap of {sum(len(b['task']) for b in batches)} samples, {storage}",
            f"{seconds:.2f} s",
        ))
        rows.append((f"heatmap / (forward + backward), {storage}", f"{ratio:.1f}"))
    return rows


def rates(card: Card, num_samples: int = 16, num_tokens: int = 512) -> list[tuple[str, str]]:
    """How much of what the card can do is used, by per-sample gradients and by the sums over them."""
    features = 2048 // card.size
    tokens = torch.randn(num_samples * num_tokens, features, device=card.device)
    offsets = torch.arange(num_samples + 1) * num_tokens
    factors = GradientFactors(tokens, tokens.clone(), offsets)
    seconds = card.seconds(lambda: dense_gradients(factors))
    products = 2 * len(tokens) * features**2 / seconds / card.matrix_rate()
    gradients = dense_gradients(factors).gradient.view(num_samples, 16, -1)
    tasks = torch.arange(num_samples, device=card.device) % 2
    fisher = gradients.square().mean(dim=0)

    def sums() -> Tensor:
        return slice_statistics([gradients], tasks, 2, fisher, 1e-3).push

    # Read three times: for sums, for products with them, and for how these move with each sample.
    read = 3 * gradients.nbytes / card.seconds(sums) / card.bandwidth()
    return [
        ("per-sample gradients, float32: share of the rate of a large matrix product", f"{products:.0%}"),
        (
            "sums of a heatmap: share of the bandwidth of a copy, if gradients are read three times",
            f"{read:.0%}",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    card_name = parser.parse_args().device
    if card_name == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.")
        return
    torch.manual_seed(0)
    card = Card(card_name)
    model = (qwen3(num_layers=28) if card.is_gpu else qwen3(**SMALL)).train()
    num_tokens = 512 if card.is_gpu else 16
    rows = rates(card)
    for precision in PRECISIONS:
        rows += training_steps(card, precision, model, batch_of(8, num_tokens))
    model = (qwen3(num_layers=8) if card.is_gpu else qwen3(**SMALL)).train()
    rows += heatmaps(card, model, [batch_of(8, num_tokens) for _ in range(4)])
    print(f"{card.name}, PyTorch {torch.__version__}; {num_tokens} tokens a sample, 8 samples a step")
    print("\n| | result |\n|---|---|")
    for what, result in rows:
        print(f"| {what} | {result} |")


if __name__ == "__main__":
    main()
