"""Does freezing the worst cells help? Train on task A, then its attention on task B, with some cells frozen.

Frozen is nothing, the worst cells of the recommended score, as many at random, or those where the mean
gradient of B is largest. How much of A is forgotten is read off where the loss of B is the same for all of
them: the lowest that every one of them reaches.

    python tests/benchmarks/freezing.py --seeds 12
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from confined import TASKS, Texts, all_cells, cell_gradients, make_model, next_byte_loss, train
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qkov_lightning import HeadFreezer, head_interference

RECOMMENDED = "loss_rise"
NUM_SAMPLES, NUM_HELD_OUT, BATCH_SIZE, EVERY = 128, 128, 15, 6
RATE, STEPS_A, STEPS_B = 2e-3, 250, 48
CONDITIONS = ("nothing", RECOMMENDED, "random", "gradient norm of B")


class Attention(LightningModule):
    """Trains the attention projections of a model, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_proj" in name)

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        return next_byte_loss(self.model, windows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), RATE)


class Losses(Callback):
    """Loss of both tasks on held-out windows, every few steps."""

    def __init__(self, held_out: dict[str, Tensor]) -> None:
        self.held_out = held_out
        self.curve: list[list[float]] = []

    @torch.no_grad()
    def note(self, module: Any) -> None:
        self.curve.append([
            next_byte_loss(module.model, windows).item() for windows in self.held_out.values()
        ])

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.note(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            self.note(module)


def worst_cells(
    model: nn.Module, texts: Texts, a: str, b: str, seed: int, count: int
) -> dict[str, list[str]]:
    """What to freeze under each condition."""
    generator = torch.Generator().manual_seed(200 + seed)
    gradients = {task: cell_gradients(model, texts.draw(task, NUM_SAMPLES, generator)) for task in (a, b)}
    fisher = torch.stack([own.square().mean(dim=0) for own in gradients.values()]).mean(dim=0)
    names = [task for task, own in gradients.items() for _ in own]
    scores = head_interference(torch.cat(list(gradients.values())), names, fisher, step_size=RATE * STEPS_B)
    orders = {
        RECOMMENDED: scores[a, b][RECOMMENDED],
        "random": torch.rand(len(fisher), generator=generator),
        "gradient norm of B": gradients[b].mean(dim=0).norm(dim=-1),
    }
    cells = [cell.name for cell in all_cells(model)]
    chosen = {name: [cells[i] for i in order.topk(count).indices] for name, order in orders.items()}
    return {"nothing": []} | chosen


def curves_of(seed: int, count: int) -> dict[str, np.ndarray]:
    """Losses of A and B along the training on B, under each condition."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    a, b = list(itertools.permutations(TASKS, 2))[seed % 6]
    texts, generator = Texts(), torch.Generator().manual_seed(100 + seed)
    model = make_model()
    train(model, torch.optim.AdamW(model.parameters(), RATE), texts, (a,), STEPS_A, generator)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = worst_cells(model, texts, a, b, seed, count)
    held_out = {task: texts.draw(task, NUM_HELD_OUT, generator) for task in (a, b)}
    batches = texts.draw(b, STEPS_B * BATCH_SIZE, generator)
    curves = {}
    for condition, cells in frozen.items():
        model.load_state_dict(start)
        losses = Losses(held_out)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[HeadFreezer(cells), losses] if cells else [losses], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Attention(model), DataLoader(batches, BATCH_SIZE))
        curves[condition] = np.array(losses.curve)
    print(f"seed {seed}, {a} then {b}: {summary(curves)}", flush=True)
    return curves


def forgetting(curves: dict[str, np.ndarray]) -> dict[str, float]:
    """Rise of A's loss where the loss of B first falls to what every condition reaches."""
    target = max(curve[:, 1].min() for curve in curves.values())
    result = {}
    for condition, curve in curves.items():
        at = int((curve[:, 1] <= target).argmax())
        share = 0.0
        if at:
            share = (curve[at - 1, 1] - target) / (curve[at - 1, 1] - curve[at, 1])
            result[condition] = float(
                curve[at - 1, 0] + share * (curve[at, 0] - curve[at - 1, 0]) - curve[0, 0]
            )
        else:
            result[condition] = 0.0
    return result


def summary(curves: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {rise:+.3f}" for name, rise in forgetting(curves).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--cells", type=int, default=16, help="cells to freeze, of 48")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(curves_of, range(arguments.seeds), [arguments.cells] * arguments.seeds))
    rises = {name: np.array([forgetting(curves)[name] for curves in runs]) for name in CONDITIONS}
    print(f"\nRise of A's loss at equal loss of B, {arguments.cells} of 48 cells frozen, {len(runs)} seeds "
          f"({time.monotonic() - started:.0f} s)\n")  # fmt: skip
    print(
        "| frozen | median | mean ± standard deviation | of random, median over seeds | less than random in |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, rise in rises.items():
        share = np.median(rise / rises["random"])
        less = (rise < rises["random"]).mean()
        label = f"worst by `{name}`" if name == RECOMMENDED else name
        print(
            f"| {label} | {np.median(rise):.3f} | {rise.mean():.3f} ± {rise.std(ddof=1):.3f} | {share:.2f} | {less:.0%} |"
        )


if __name__ == "__main__":
    main()
