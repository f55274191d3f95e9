"""What helps against forgetting? Train on task A, then on task B, and read off A's loss at equal loss of B.

How much of A is forgotten is compared with training B without any protection, pair by pair: where the loss of
B is the lowest that both reach. So learning less is no advantage.

    python tests/benchmarks/acting.py --seeds 12
    python tests/benchmarks/acting.py --seeds 12 --full
    python tests/benchmarks/acting.py --seeds 4 --subject encoder
    python tests/benchmarks/acting.py --seeds 12 --same
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from confined import CONTEXT, all_cells, cell_gradients
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from subjects import SUBJECTS, Decoder, Subject
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qkov_lightning import HeadFreezer, HeadProjector, head_interference

NUM_SAMPLES, BATCH_SIZE = 128, 15
STEPS_B = 96
NUM_DIRECTIONS, MEMORY = 32, 64
STRENGTHS = (10.0, 100.0)
NOTHING, RANDOM = "nothing", "freeze a third of the cells, random"


class Student(LightningModule):
    """Trains the attention projections of a model, or all of it."""

    def __init__(self, subject: Subject, model: nn.Module, full: bool, slower: float = 1.0) -> None:
        super().__init__()
        self.subject, self.model, self.rate = subject, model, slower * subject.rate
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(full or subject.attention in name)
        # What tells the topics apart is the task's own, and is not shared.
        getattr(model, "topics", nn.Identity()).requires_grad_(True)

    def loss(self, samples: Tensor) -> Tensor:
        return self.subject.loss(self.model, samples)

    def training_step(self, samples: Tensor, batch_idx: int) -> Tensor:
        return self.loss(samples) + self.penalty()

    def penalty(self) -> Tensor | float:
        return 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), self.rate)


class Replay(Student):
    """A small memory of A in every batch."""

    def __init__(self, subject: Subject, model: nn.Module, full: bool, memory: Tensor) -> None:
        super().__init__(subject, model, full)
        self.memory = memory
        self.generator = torch.Generator().manual_seed(0)

    def recalled(self) -> Tensor:
        drawn = torch.randint(len(self.memory), (BATCH_SIZE,), generator=self.generator)
        return self.loss(self.memory[drawn])

    def penalty(self) -> Tensor:
        return self.recalled()


class AverageGradient(Replay):
    """A-GEM (Chaudhry et al. 2019, arXiv:1812.00420): no gradient that points against that of the memory."""

    def penalty(self) -> float:
        return 0.0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        own = [p for p in self.parameters() if p.requires_grad]
        memory = torch.autograd.grad(self.recalled(), own)
        along = sum((p.grad * g).sum() for p, g in zip(own, memory, strict=True))
        if along < 0:
            size = sum(g.square().sum() for g in memory)
            for parameter, gradient in zip(own, memory, strict=True):
                parameter.grad.sub_(along / size * gradient)


class Elastic(Student):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): each weight is held by its Fisher of A."""

    def __init__(
        self, subject: Subject, model: nn.Module, full: bool, samples: Tensor, strength: float
    ) -> None:
        super().__init__(subject, model, full)
        self.strength = strength
        self.start = [p.detach().clone() for p in model.parameters()]
        self.fisher = [torch.zeros_like(p) for p in model.parameters()]
        own = [p for p in model.parameters() if p.requires_grad]
        place = {id(p): i for i, p in enumerate(model.parameters())}
        for sample in samples:
            gradients = torch.autograd.grad(self.loss(sample[None]), own, allow_unused=True)
            for parameter, gradient in zip(own, gradients, strict=True):
                if gradient is not None:
                    # The loss of a window is the mean over its bytes.
                    terms = CONTEXT if isinstance(subject, Decoder) else 1
                    self.fisher[place[id(parameter)]] += terms * gradient.square() / len(samples)

    def penalty(self) -> Tensor:
        moved = zip(self.model.parameters(), self.start, self.fisher, strict=True)
        return self.strength / 2 * sum((fisher * (p - start).square()).sum() for p, start, fisher in moved)


class OutOfGradients(Callback):
    """Takes out of every step its part in the span of A's leading per-sample gradients, cell by cell."""

    def __init__(self, model: nn.Module, gradients: Tensor) -> None:
        self.cells = all_cells(model)
        self.bases = [
            torch.linalg.svd(gradients[:, i], full_matrices=False).Vh[:NUM_DIRECTIONS]
            for i in range(len(self.cells))
        ]

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = [cell.weight.detach()[cell.slice].clone() for cell in self.cells]

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for cell, before, basis in zip(self.cells, self.before, self.bases, strict=True):
            step = (cell.weight[cell.slice] - before).flatten()
            cell.weight[cell.slice] = before + (step - basis.T @ (basis @ step)).view_as(before)


class Losses(Callback):
    """Loss of both tasks on held-out windows, every few steps."""

    def __init__(self, held_out: list[Tensor]) -> None:
        self.held_out = held_out
        self.curve: list[list[float]] = []

    @torch.no_grad()
    def note(self, module: Any) -> None:
        self.curve.append([module.loss(one).item() for one in self.held_out])

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.note(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % module.subject.every == 0:
            self.note(module)


def orders(model: nn.Module, rate: float, of_a: Tensor, of_b: Tensor, seed: int) -> dict[str, list[str]]:
    """The cells to freeze, by what they are chosen by: of the scores, only those that surely hurt."""
    pooled = torch.stack([own.square().mean(dim=0) for own in (of_a, of_b)]).mean(dim=0)
    terms = torch.full((len(of_a) + len(of_b),), float(CONTEXT), dtype=torch.float64)
    names = ["a"] * len(of_a) + ["b"] * len(of_b)
    gradients = torch.cat([of_a, of_b])
    step = rate * STEPS_B / 2  # half of the way: the expansion is around its start
    scores = head_interference(gradients, names, pooled, step_size=step, num_terms=terms)["a", "b"]
    plain = head_interference(gradients, names, pooled, step_size=step)["a", "b"]
    cells = [cell.name for cell in all_cells(model)]
    by = {
        RANDOM: torch.rand(len(cells), generator=torch.Generator().manual_seed(seed)),
        "freeze a third, worst by loss_rise": scores["loss_rise"],
        "freeze a third, worst by exchange": scores["exchange"],
        "freeze a third, loss_rise without the number of terms": plain["loss_rise"],
    }
    chosen = {name: [cells[i] for i in values.topk(len(cells) // 3).indices] for name, values in by.items()}
    half = scores["loss_rise"].topk(len(cells) // 2).indices
    return chosen | {"freeze half, worst by loss_rise": [cells[i] for i in half]}


def conditions(
    subject: Subject, model: nn.Module, a: str, b: str, seed: int, full: bool
) -> Iterator[tuple[str, Student, list[Callback]]]:
    """Each with a model that has learned A alone."""
    generator = torch.Generator().manual_seed(200 + seed)
    of_a, of_b = (subject.draw(task, NUM_SAMPLES, generator) for task in (a, b))
    by_cell = isinstance(subject, Decoder) and not full
    memory, start = of_a[:MEMORY], copy.deepcopy(model.state_dict())

    def fresh() -> nn.Module:
        model.load_state_dict(start)
        return model

    def student() -> Student:
        return Student(subject, fresh(), full)

    yield NOTHING, student(), []
    yield "learning rate x 0.3", Student(subject, fresh(), full, 0.3), []
    if by_cell:
        gradients = [cell_gradients(fresh(), samples) for samples in (of_a, of_b)]
        for name, cells in orders(model, subject.rate, *gradients, seed).items():
            yield name, student(), [HeadFreezer(cells)]
    for strength in STRENGTHS:
        yield f"EWC, strength {strength:g}", Elastic(subject, fresh(), full, memory, strength), []
    yield "A-GEM, 64 samples", AverageGradient(subject, fresh(), full, memory), []
    yield "replay, 64 samples", Replay(subject, fresh(), full, memory), []
    if by_cell:
        yield "project out of A's gradients", student(), [OutOfGradients(fresh(), gradients[0])]
    for rank in (0.25, 0.5):
        projector = HeadProjector([memory], rank=rank, rest="tensors" if full else "leave")
        yield f"HeadProjector, rank {rank:g}", student(), [projector]


def curves_of(seed: int, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Losses of A and B along the training on B, under each condition."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    subject: Subject = SUBJECTS[arguments.subject]()
    a, b = subject.pairs[seed % len(subject.pairs)]
    b = a if arguments.same else b
    generator = torch.Generator().manual_seed(100 + seed)
    model = subject.make()
    learn(subject, model, a, generator)
    held_out = [subject.draw(task, subject.num_held_out, generator) for task in (a, b)]
    batches = subject.draw(b, STEPS_B * BATCH_SIZE, generator)
    curves = {}
    for name, student, callbacks in conditions(subject, model, a, b, seed, arguments.full):
        losses = Losses(held_out)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[*callbacks, losses], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(student, DataLoader(batches, BATCH_SIZE))
        curves[name] = np.array(losses.curve)
    ends = ", ".join(f"{name} {forgetting(curves, name)[0]:.2f}" for name in curves if name != NOTHING)
    print(f"seed {seed}, {a} then {b}: {ends}", flush=True)
    return curves


def learn(subject: Subject, model: nn.Module, task: str, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), subject.rate)
    for _ in range(subject.steps_before):
        optimizer.zero_grad()
        subject.loss(model, subject.draw(task, BATCH_SIZE, generator)).backward()
        optimizer.step()


def forgetting(curves: dict[str, np.ndarray], name: str, other: str = NOTHING) -> tuple[float, float]:
    """Rise of A's loss as a share of that under another condition, at the same loss of B; and that loss."""
    target = max(curves[one][:, 1].min() for one in (name, other))
    rises = []
    for curve in (curves[name], curves[other]):
        at = int((curve[:, 1] <= target).argmax())
        share = (curve[at - 1, 1] - target) / (curve[at - 1, 1] - curve[at, 1]) if at else 0.0
        rise = curve[at - 1, 0] + share * (curve[at, 0] - curve[at - 1, 0]) if at else curve[0, 0]
        rises.append(rise - curve[0, 0])
    return float(rises[0] / rises[1]), float(target)


def table(runs: list[dict[str, np.ndarray]]) -> str:
    """A row per condition: forgetting of that without protection, and the losses in the end."""
    head = [
        "protection",
        "forgetting, of none",
        "10% to 90%",
        "of random cells",
        "less than random in",
        "B's loss at the end, above none",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in runs[0]:
        ratio = np.array([forgetting(curves, name)[0] for curves in runs])
        later = np.median([curves[name][-1, 1] - curves[NOTHING][-1, 1] for curves in runs])
        row = [
            name,
            f"{np.median(ratio):.2f}",
            f"{np.quantile(ratio, 0.1):.2f} to {np.quantile(ratio, 0.9):.2f}",
        ]
        if RANDOM in runs[0] and name != RANDOM:
            against = np.array([forgetting(curves, name, RANDOM)[0] for curves in runs])
            row += [f"{np.median(against):.2f}", f"{(against < 1).mean():.0%}"]
        else:
            row += ["", ""]
        lines.append("| " + " | ".join([*row, f"{later:+.2f}"]) + " |")
    return "\n".join(lines)


def draw(runs: list[dict[str, np.ndarray]], path: Path) -> None:
    """A mark for each run, a line at the median."""
    names = [name for name in runs[0] if name != NOTHING]
    ratios = {name: np.array([forgetting(curves, name)[0] for curves in runs]) for name in names}
    names.sort(key=lambda name: -np.median(ratios[name]))
    figure = Figure(figsize=(8.5, 0.34 * len(names) + 1.1), dpi=120, layout="constrained")
    axis, jitter = figure.subplots(), np.random.default_rng(0)
    for row, name in enumerate(names):
        places = row + jitter.uniform(-0.2, 0.2, len(runs))
        axis.scatter(ratios[name].clip(-0.5, 1.6), places, s=13, c="#0072B2", alpha=0.7, linewidths=0)
        axis.plot([np.median(ratios[name])] * 2, [row - 0.38, row + 0.38], color="black", linewidth=2)
    axis.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(names)), names, fontsize="small")
    axis.set_xlim(-0.55, 1.65)
    axis.set_xlabel(
        "forgetting of A at the same loss of B; 1 = as without protection, 0 = none", fontsize="small"
    )
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--full", action="store_true", help="train the whole model, not its attention alone")
    parser.add_argument("--subject", choices=list(SUBJECTS), default="decoder")
    parser.add_argument("--same", action="store_true", help="B is A once more: what does protection cost?")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(curves_of, range(arguments.seeds), [arguments] * arguments.seeds))
    what = "the whole model trains" if arguments.full else "attention trains"
    what += ", B is A" if arguments.same else ""
    print(
        f"\n{arguments.subject}: {what}, {len(runs)} seeds ({time.monotonic() - started:.0f} s)\n\n{table(runs)}"
    )
    if arguments.figure:
        draw(runs, arguments.figure)


if __name__ == "__main__":
    main()
