"""What the other libraries that capture per-sample gradients from a training loop cost, beside the monitor.

All capture the attention projections of one model in every step of one loop, on the same samples, and write
them to disk. "x (y)": ratio of wall clock times x, of processor times y, to the plain step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from caches import bytes_per_sample
from memory import peak_of
from peers import PEERS, bytes_below, problem
from shapes import LanguageModel, batch_of, gpt2, qwen3
from timing import interleaved, ratio
from trainees import Trainee

from qkov_lightning import GradientCache, InterferenceMonitor

SHAPES = {"GPT-2, 12 layers": gpt2, "Qwen3-0.6B, 4 layers": qwen3}
OURS: dict[str, Any] = {
    "qkov_lightning, factors": "factors",
    "qkov_lightning, sums and 512 weights of each head": "summed",
    "qkov_lightning, 512 weights of each head": "sampled",
}
"""Our ways to store, by name."""


@pytest.mark.parametrize("shape", SHAPES)
def bench_step_and_bytes(
    shape: str, benchmark: Callable, report: Callable, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, rounds = SHAPES[shape](), request.config.getoption("rounds")
    monitors = {
        name: InterferenceMonitor(every_n_steps=1, keep_cache=True, storage=storage)
        for name, storage in OURS.items()
    }
    trainees = {"plain": Trainee(LanguageModel(copy.deepcopy(model)), tmp_path)} | {
        name: Trainee(LanguageModel(copy.deepcopy(model)), tmp_path / OURS[name], monitor)
        for name, monitor in monitors.items()
    }
    for number, (name, (package, make)) in enumerate(PEERS.items()):
        reason = problem(package)
        if reason is not None:
            report(f"{shape}: {name}", f"not measured, `import {package}` fails: {reason}")
            continue
        folder = tmp_path / f"peer-{number}" / "store"
        trainees[name] = Trainee(LanguageModel(copy.deepcopy(model)), tmp_path, make(folder))
    batch = batch_of(2)
    for trainee in trainees.values():
        trainee.step(batch)  # Lightning fetches one batch ahead: a step trains on the batch before
    turns = {name: partial(trainee.step, batch) for name, trainee in trainees.items()}
    times = benchmark.pedantic(interleaved, (turns, rounds), rounds=1)
    for trainee in trainees.values():
        trainee.stop()
    stored = {
        name: bytes_per_sample(GradientCache(Path(monitor.state_dict()["cache"])))
        for name, monitor in monitors.items()
    }
    for number, name in enumerate(PEERS):
        stored[name] = bytes_below(tmp_path / f"peer-{number}") / (2 * (rounds + 2))
    for name in trainees:
        if name != "plain":
            report(f"{shape}: step with {name} / plain step", ratio(times[name], times["plain"]))
            report(f"{shape}: MB a sample on disk, {name}", f"{stored[name] / 1e6:.3g}")


def bench_peak_memory(benchmark: Callable, report: Callable) -> None:
    plain = benchmark.pedantic(peak_of, ("train", "0"), rounds=1)
    what = f"GPT-2 small with its vocabulary, 2 x 128 tokens: peak memory / without ({plain / 1e9:.2f} GB)"
    report(f"{what}, {next(iter(OURS))}", f"{peak_of('train', '1') / plain:.3f}")
    for name, (package, _) in PEERS.items():
        if problem(package) is None:
            report(f"{what}, {name}", f"{peak_of('beside', name) / plain:.3f}")
