"""Which score predicts harm? Scores against the rise of A's loss after training on B in ONE cell.

A model is trained on task A, half-way or until it converged. Then, for every cell of the attention, task B is
trained in this cell alone, by one step of SGD or by k steps of Adam, and the loss of A is measured on windows
that no score has seen. Scores and anchors are computed from other windows, and compared by rank over the
cells.

    python tests/benchmarks/validity.py --seeds 2
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from confined import (
    CONTEXT,
    LAYERS,
    TASKS,
    FromLayer,
    ModelCell,
    Texts,
    all_cells,
    cell_gradients,
    make_model,
    train,
)
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

from qkov_lightning.scores.reduction import slice_statistics
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.updates import damped

sys.path.insert(0, str(Path(__file__).parents[1] / "scores"))
from planted import named_first

RECOMMENDED = "loss_rise"
NUM_SAMPLES, NUM_HELD_OUT, BATCH_SIZE = 256, 256, 16
SGD_RATE, ADAM_RATE, ADAM_STEPS = 0.3, 2e-3, (5, 15)
PROTOCOLS = ("1 step of SGD", *(f"{steps} steps of Adam" for steps in ADAM_STEPS))
STARTS = {"half-trained on A": 100, "converged on A": 450}
COLOURS = {"half-trained on A": ("#E69F00", "o"), "converged on A": ("#0072B2", "s")}


def measured_rises(model: nn.Module, texts: Texts, a: str, b: str, seed: int) -> dict[str, list[float]]:
    """Rise of the loss of A for every cell and protocol."""
    generator = torch.Generator().manual_seed(seed)
    held_out = FromLayer(model, texts.draw(a, NUM_HELD_OUT, generator))
    whole = FromLayer(model, texts.draw(b, NUM_SAMPLES, generator))
    batches = [FromLayer(model, texts.draw(b, BATCH_SIZE, generator)) for _ in range(max(ADAM_STEPS))]
    with torch.no_grad():
        start = held_out.loss(LAYERS).item()
    rises: dict[str, list[float]] = {protocol: [] for protocol in PROTOCOLS}

    def note(protocol: str, cell: ModelCell) -> None:
        with torch.no_grad():
            rises[protocol].append(held_out.loss(cell.layer).item() - start)

    for cell in all_cells(model):
        before = cell.weight.detach().clone()
        (gradient,) = torch.autograd.grad(whole.loss(cell.layer), cell.weight)
        cell.weight.data[cell.slice] -= SGD_RATE * gradient[cell.slice]
        note(PROTOCOLS[0], cell)
        cell.weight.data.copy_(before)
        first, second = (torch.zeros_like(before[cell.slice]) for _ in range(2))
        for step, batch in enumerate(batches, start=1):
            (gradient,) = torch.autograd.grad(batch.loss(cell.layer), cell.weight)
            first.lerp_(gradient[cell.slice], 0.1)
            second.lerp_(gradient[cell.slice].square(), 0.001)
            move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            cell.weight.data[cell.slice] -= ADAM_RATE * move
            if step in ADAM_STEPS:
                note(f"{step} steps of Adam", cell)
        cell.weight.data.copy_(before)
    return rises


def predictions(gradients: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Every score and anchor of every task pair and cell, the larger the worse: ``[task, task, cell]``."""
    fisher = torch.stack([own.square().mean(dim=0) for own in gradients.values()]).mean(dim=0)
    indices = torch.arange(len(TASKS)).repeat_interleave(NUM_SAMPLES)
    samples = [torch.cat(list(gradients.values()))]
    # The loss of a window is the mean over its bytes.
    terms = torch.full((len(samples[0]),), float(CONTEXT), dtype=torch.float64)
    statistics = {
        update: slice_statistics(samples, indices, len(TASKS), fisher, 1e-3, update, num_terms=terms)
        for update in ("sgd", "adam")
    }
    # The anchors that are no scores. The prototype divided by the Fisher of task A itself.
    squares = torch.stack([own.square().mean(dim=0) for own in gradients.values()])
    pushes = torch.stack([own.abs().mean(dim=0) for own in gradients.values()])
    norms = torch.stack([own.mean(dim=0).norm(dim=-1) for own in gradients.values()])
    anchors = {
        "gradient norm of B": norms.expand(len(TASKS), -1, -1),
        "prototype formula": torch.einsum("ack,bck->abc", squares / damped(squares, 1e-3), pushes),
        "random": torch.rand(len(TASKS), *norms.shape, generator=torch.Generator().manual_seed(0)),
    }
    result = {}
    for protocol in PROTOCOLS:
        adam = "Adam" in protocol
        step_size = ADAM_RATE * int(protocol.split()[0]) if adam else SGD_RATE
        chosen = replace(statistics["adam" if adam else "sgd"], step_size=step_size)
        scores = {
            n: score.function(chosen).value * (-1 if score.falling else 1) for n, score in SCORES.items()
        }
        result[protocol] = scores | anchors
    return result


class Results:
    """Rank correlations by protocol and score, one for every run."""

    def __init__(self) -> None:
        self.starts: list[str] = []
        self.values: dict[str, dict[str, list[float]]] = {p: defaultdict(list) for p in PROTOCOLS}

    def add(self, start: str, ranks: dict[str, dict[str, float]]) -> None:
        self.starts.append(start)
        for protocol, by_score in ranks.items():
            for score, rank in by_score.items():
                self.values[protocol][score].append(rank)

    def of(self, protocol: str, score: str, start: str | None = None) -> np.ndarray:
        chosen = [start in {None, one} for one in self.starts]
        return np.array(self.values[protocol][score])[chosen]


def table(results: Results) -> str:
    """Medians, 10% and 90% quantiles, and how often the recommended score is better."""
    starts = list(dict.fromkeys(results.starts))
    lines = []
    for protocol in PROTOCOLS:
        head = ["score", "median", "10% to 90%", *starts, f"{RECOMMENDED} is better in"]
        lines += [f"\n{protocol} ({len(results.starts)} runs)\n", "| " + " | ".join(head) + " |"]
        lines.append("|" + " --- |" * len(head))
        best = results.of(protocol, RECOMMENDED)
        for score in sorted(results.values[protocol], key=lambda one: -np.median(results.of(protocol, one))):
            values = results.of(protocol, score)
            low, high = np.quantile(values, [0.1, 0.9])
            by_start = [f"{np.median(results.of(protocol, score, start)):.2f}" for start in starts]
            better = "" if score == RECOMMENDED else f"{(best > values).mean():.0%}"
            name = f"`{score}`" if score in SCORES else score
            row = [name, f"{np.median(values):.2f}", f"{low:.2f} to {high:.2f}", *by_start, better]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """One panel for each protocol, one line for each score, one mark for each run."""
    order = sorted(
        results.values[PROTOCOLS[0]],
        key=lambda score: np.mean([np.median(results.of(protocol, score)) for protocol in PROTOCOLS]),
    )
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(PROTOCOLS), sharey=True)
    jitter = np.random.default_rng(0)
    for axis, protocol in zip(axes, PROTOCOLS, strict=True):
        for row, score in enumerate(order):
            for start, (colour, marker) in COLOURS.items():
                values = results.of(protocol, score, start)
                places = row + jitter.uniform(-0.22, 0.22, len(values))
                label = start if row == 0 else None
                axis.scatter(
                    values, places, s=13, c=colour, marker=marker, alpha=0.75, linewidths=0, label=label
                )
            median = np.median(results.of(protocol, score))
            axis.plot([median, median], [row - 0.38, row + 0.38], color="black", linewidth=2)
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set_xlim(-1, 1)
        axis.set_ylim(-0.6, len(order) - 0.4)
        axis.set_title(f"training on B in one cell: {protocol}", fontsize="small")
        axis.set_xlabel("rank correlation with the rise of A's loss", fontsize="small")
    axes[0].set_yticks(range(len(order)), order, fontsize="small")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


Run = tuple[str, dict[str, dict[str, float]]]
"""Start, and the rank correlation by protocol and score."""


def runs_of(seed: int, a: str) -> list[Run]:
    """Train one model on task A, stop at each of its starts, and measure what the other tasks do to it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    texts, generator = Texts(), torch.Generator().manual_seed(100 + seed)
    model, done, runs = make_model(), 0, []
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for start, steps in STARTS.items():
        loss = train(model, optimizer, texts, (a,), steps - done, generator)
        done = steps
        windows = torch.Generator().manual_seed(200 + seed)
        predicted = predictions({
            task: cell_gradients(model, texts.draw(task, NUM_SAMPLES, windows)) for task in TASKS
        })
        for number, b in enumerate(task for task in TASKS if task != a):
            rises = measured_rises(model, texts, a, b, 1000 * seed + 10 * TASKS.index(a) + number)
            ranks: dict[str, dict[str, float]] = {protocol: {} for protocol in PROTOCOLS}
            for protocol in PROTOCOLS:
                for name, values in predicted[protocol].items():
                    own = values[TASKS.index(a), TASKS.index(b)].numpy()
                    ranks[protocol][name] = float(spearmanr(own, rises[protocol]).statistic)
            runs.append((start, ranks))
            shown = ", ".join(f"{ranks[protocol][RECOMMENDED]:.2f}" for protocol in PROTOCOLS)
            print(
                f"{start} {a} (loss {loss:.2f}), seed {seed}, {b} pushes on {a}: {RECOMMENDED} {shown}",
                flush=True,
            )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--planted", type=int, default=100, help="seeds of planted conflicts")
    parser.add_argument("--figure", type=Path, default=Path("examples/validity.png"))
    arguments = parser.parse_args()
    started, results = time.monotonic(), Results()
    models = list(itertools.product(range(arguments.seeds), TASKS))
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        for number, runs in enumerate(pool.map(runs_of, *zip(*models, strict=True)), start=1):
            for start, ranks in runs:
                results.add(start, ranks)
            print(f"model {number} of {len(models)} is done ({time.monotonic() - started:.0f} s)", flush=True)
    print(table(results))
    for update in ("adam", "sgd"):
        found = sum(named_first(seed, update) for seed in range(arguments.planted))
        print(
            f"\nplanted conflicts, {update}: the cell is named first in {found} of {arguments.planted}",
            flush=True,
        )
    draw(results, arguments.figure)
    print(f"\nfigure: {arguments.figure}")


if __name__ == "__main__":
    main()
