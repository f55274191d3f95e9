"""How often the gate raises a false alarm, and how often it finds a planted drift.

Trains one tiny decoder, on three texts (heavy-tailed gradients) or on three filters of noise (light-tailed ones). Null
pairs: two probes of disjoint samples of this one checkpoint. Planted drifts: one known head is trained until one task
is more sensitive there to what another pushes, and its weights are mixed with the old ones so that the score rises by
a given share of its value.

    python tests/benchmarks/calibration.py --tasks texts --pairs 200 --planted 0
    python tests/benchmarks/calibration.py --tasks filters --pairs 200 --planted 50
"""

import argparse
import copy
import sys
import time
import warnings
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkov_lightning import InterferenceHeatmap, check_drift, probe_interference

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import byte_model

CONTEXT, HEADS, WIDTH = 32, 4, 32
LAYER, HEAD, BLOCK, SCORE = 1, 2, "O", "relative"
OWN = slice(HEAD * WIDTH // HEADS, (HEAD + 1) * WIDTH // HEADS)
EFFECTS = (0.25, 0.5, 1.0)


class Tasks(Protocol):
    names: tuple[str, ...]

    def model(self) -> nn.Module: ...
    def draw(self, task: str, count: int, generator: torch.Generator) -> Tensor: ...
    def loss(self, model: nn.Module, samples: Tensor) -> Tensor: ...


class Texts:
    """Windows of prose, code and arithmetic; the loss is that of the next byte."""

    names = ("prose", "code", "math")

    def __init__(self) -> None:
        sources = {"prose": byte_model.prose(), "code": byte_model.code(), "math": byte_model.math()}
        self.bytes = {task: torch.tensor(list("\n".join(t.values()).encode())) for task, t in sources.items()}

    def model(self) -> nn.Module:
        return byte_model.ByteDecoder(WIDTH, HEADS, num_layers=2, context=CONTEXT)

    def draw(self, task: str, count: int, generator: torch.Generator) -> Tensor:
        text = self.bytes[task]
        starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
        return text[starts + torch.arange(CONTEXT + 1)]

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        return functional.cross_entropy(model(samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten())


class FilterDecoder(nn.Module):
    """Reads numbers, and the task in a channel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8 + 3, WIDTH)
        self.layers = nn.Sequential(*(byte_model.Layer(WIDTH, HEADS) for _ in range(2)))
        self.write = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.layers(self.read(x)))


class Filters:
    """Noise; each task wants another linear function of the running mean of what came so far."""

    names = ("low", "middle", "high")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.targets = torch.randn(3, 8, 8, generator=generator)

    def model(self) -> nn.Module:
        return FilterDecoder()

    def draw(self, task: str, count: int, generator: torch.Generator) -> Tensor:
        flag = functional.one_hot(torch.tensor(self.names.index(task)), 3).expand(count, CONTEXT, 3)
        return torch.cat([torch.randn(count, CONTEXT, 8, generator=generator), flag], dim=-1)

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        past = samples[..., :8].cumsum(1) / torch.arange(1, CONTEXT + 1).sqrt()[:, None]
        wanted = torch.einsum("ntx,ntk,kxy->nty", past, samples[..., 8:], self.targets)
        return (model(samples) - wanted).square().mean()


def measure(model: nn.Module, tasks: Tasks, count: int, generator: torch.Generator) -> InterferenceHeatmap:
    probe = [{"x": tasks.draw(task, count, generator), "task": task} for task in tasks.names]
    return probe_interference(model, probe, loss=lambda m, batch: tasks.loss(m, batch["x"]), num_hot_cells=0)


def train(tasks: Tasks, steps: int = 400) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = tasks.model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = tasks.loss(model, torch.cat([tasks.draw(task, 8, generator) for task in tasks.names]))
        loss.backward()
        optimizer.step()
    print(f"checkpoint: {steps} steps, loss {loss.item():.2f}", flush=True)
    return model.eval()


def head_weights(model: nn.Module) -> list[Tensor]:
    """Views of everything that the planted head owns."""
    attention = model.layers[LAYER].self_attn
    rows = [getattr(attention, name).weight.data[OWN] for name in ("q_proj", "k_proj", "v_proj")]
    return [*rows, attention.o_proj.weight.data[:, OWN]]


def plant(model: nn.Module, tasks: Tasks, pair: tuple[str, str], steps: int, goal: float) -> nn.Module:
    """Train the head until task a is so much more sensitive to what task b pushes there."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    prefix = f"layers.{LAYER}.self_attn."
    weights = dict(model.named_parameters())
    trained = {prefix + f"{name}_proj.weight": weights[prefix + f"{name}_proj.weight"] for name in "qkvo"}
    output = prefix + "o_proj.weight"
    optimizer = torch.optim.Adam(trained.values(), 1e-2)
    masks = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    for name, mask in masks.items():
        mask[(slice(None), OWN) if name == output else OWN] = 1

    def sample_loss(weight: Tensor, sample: Tensor) -> Tensor:
        return tasks.loss(lambda x: functional_call(model, {**weights, output: weight}, (x,)), sample[None])

    a, b = (tasks.names.index(task) for task in pair)
    with sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            squares, absolutes = [], []
            for task in tasks.names:
                own = vmap(grad(sample_loss), (None, 0))(weights[output], tasks.draw(task, 24, generator))
                squares.append(own[:, :, OWN].square().mean(dim=0))
                absolutes.append(own[:, :, OWN].abs().mean(dim=0))
            fisher = torch.stack(squares).mean(dim=0)
            score = (squares[a] / (fisher + 1e-3 * fisher.mean()) * absolutes[b]).sum() / absolutes[b].sum()
            if step % 20 == 0 or score > goal:
                print(f"  planting, step {step}: {SCORE} {score.item():.2f}", flush=True)
            if score > goal:
                break
            optimizer.zero_grad()
            (-score).backward()
            for name, weight in trained.items():
                weight.grad *= masks[name]
            optimizer.step()
    return model


def mixed(old: nn.Module, new: nn.Module, share: float) -> nn.Module:
    model = copy.deepcopy(old)
    for weight, before, after in zip(head_weights(model), head_weights(old), head_weights(new), strict=True):
        weight.copy_(torch.lerp(before, after, share))
    return model


def true_value(model: nn.Module, tasks: Tasks, pair: tuple[str, str]) -> float:
    """The score in the planted cell, on 256 samples a task."""
    heatmap = measure(model, tasks, 256, torch.Generator().manual_seed(3))
    return float(heatmap.values(*pair, SCORE)[LAYER, HEAD, "QKVO".index(BLOCK)])


def share_for(
    old: nn.Module, new: nn.Module, tasks: Tasks, pair: tuple[str, str], effect: float
) -> tuple[float, float]:
    """Share of the new weights that raises the score by ``effect`` of its value, and the rise that it gives."""
    start = true_value(old, tasks, pair)
    low, high = 0.0, 1.0
    for _ in range(5):
        middle = (low + high) / 2
        rise = true_value(mixed(old, new, middle), tasks, pair) / start - 1
        low, high = (middle, high) if rise < effect else (low, middle)
    return middle, rise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", choices=["texts", "filters"], default="texts")
    parser.add_argument("--pairs", type=int, default=200, help="null pairs")
    parser.add_argument("--planted", type=int, default=50, help="pairs for each planted drift")
    parser.add_argument("--samples", type=int, default=64, help="samples of each task")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*requires_grad=True to a scalar.*")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    started = time.monotonic()
    tasks: Tasks = Texts() if arguments.tasks == "texts" else Filters()
    model = train(tasks)
    generator = torch.Generator().manual_seed(4)
    alarms = {0.0: 0, 0.05: 0}
    for number in range(1, arguments.pairs + 1):
        first, second = (measure(model, tasks, arguments.samples, generator) for _ in range(2))
        for tolerance in alarms:
            alarms[tolerance] += check_drift(first, second, tolerance=tolerance).drifted
        if number % 20 == 0:
            rates = ", ".join(f"{count}/{number} at tolerance {t:g}" for t, count in alarms.items())
            print(f"null pairs: false alarms {rates} ({time.monotonic() - started:.0f} s)", flush=True)
    if not arguments.planted:
        return

    heatmap = measure(model, tasks, 512, torch.Generator().manual_seed(3))
    at = (LAYER, HEAD, "QKVO".index(BLOCK))
    pair = min(heatmap.task_pairs, key=lambda pair: abs(float(heatmap.values(*pair, SCORE)[at]) - 0.8))
    value = float(heatmap.values(*pair, SCORE)[at])
    print(f"planting in L{LAYER}.H{HEAD}.{BLOCK}: {pair[1]} pushes on {pair[0]}, {value:.2f}", flush=True)
    planted = plant(model, tasks, pair, steps=300, goal=2.3 * value)
    for effect in EFFECTS:
        share, rise = share_for(model, planted, tasks, pair, effect)
        changed = mixed(model, planted, share)
        found = named = 0
        for _ in range(arguments.planted):
            first = measure(model, tasks, arguments.samples, generator)
            report = check_drift(first, measure(changed, tasks, arguments.samples, generator))
            found += report.drifted
            top = report.findings[0] if report.drifted else None
            named += top is not None and (top.layer, top.head) == (LAYER, HEAD)
        print(
            f"effect {effect:g} (true rise {rise:.0%}, share {share:.2f}): found {found}/{arguments.planted}, planted head "
            f"named first {named}/{arguments.planted} ({time.monotonic() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
