"""What the monitor adds to a training step, beside other ways to per-sample gradients.

Every variant trains a copy of the model in a Trainer of its own, on 2 x 128 tokens, and they take turns step
by step. "x (y)": wall clock x, processor time y, both as a ratio to the plain step. The machine's disk is
part of the wall clock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path

import pytest
from per_sample import BackwardHooks, CaptureAlone, Functional, Opacus
from shapes import LanguageModel, batch_of, gpt2, qwen3
from timing import Ratio, Times, interleaved, ratio
from torch import nn
from trainees import Trainee

from qkov_lightning import InterferenceMonitor

SHAPES = {"GPT-2, 12 layers": gpt2, "Qwen3-0.6B, 4 layers": qwen3}
OTHERS = {
    "full backward hooks that form per-sample gradients": lambda m: (LanguageModel(m), BackwardHooks()),
    "opacus GradSampleModule on the projections alone": lambda m: (LanguageModel(m), Opacus()),
    "torch.func vmap(grad)": lambda m: (Functional(m),),
}


@pytest.mark.parametrize("shape", SHAPES)
def bench_training_step(
    shape: str, benchmark: Callable, report: Callable, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, rounds = SHAPES[shape](), request.config.getoption("rounds")

    monitors = {n: InterferenceMonitor(every_n_steps=n, max_samples_per_task=8) for n in (1, 10)}

    def monitored(every_n_steps: int) -> Trainee:
        folder = tmp_path / str(every_n_steps)
        return Trainee(LanguageModel(copy.deepcopy(model)), folder, monitors[every_n_steps])

    trainees = {
        "plain": Trainee(LanguageModel(copy.deepcopy(model)), tmp_path),
        "every step": monitored(1),
        "every tenth": monitored(10),
        "unwritten": Trainee(LanguageModel(copy.deepcopy(model)), tmp_path, CaptureAlone()),
    }
    times = _take_turns(trainees, rounds, benchmark)
    assert all(monitor.state_dict()["captured_steps"] > rounds // n for n, monitor in monitors.items())
    report(
        f"{shape}: step with the monitor / plain step, every step",
        ratio(times["every step"], times["plain"]),
        "1.15",
    )
    report(f"{shape}: the same, nothing written", ratio(times["unwritten"], times["plain"]), "")
    # Step 0 warms up; 10, 20, ... are captured, those in between are not.
    captured = ratio(times["every tenth"], times["plain"], range(9, rounds, 10))
    between = ratio(times["every tenth"], times["plain"], [i for i in range(rounds) if i % 10 != 9])
    report(
        f"{shape}: step with the monitor / plain step, every tenth step",
        Ratio(*(0.9 * a + 0.1 * b for a, b in zip(astuple(between), astuple(captured), strict=True))),
        "1.05",
    )


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_other_ways(shape: str, other: str, benchmark: Callable, report: Callable, tmp_path: Path) -> None:
    model: nn.Module = SHAPES[shape]()
    module, *callbacks = OTHERS[other](copy.deepcopy(model))
    trainees = {
        "plain": Trainee(LanguageModel(model), tmp_path),
        "other": Trainee(module, tmp_path, *callbacks),
    }
    times = _take_turns(trainees, 3, benchmark)
    report(f"{shape}: step with {other} / plain step", ratio(times["other"], times["plain"]))


def _take_turns(trainees: dict[str, Trainee], rounds: int, benchmark: Callable) -> dict[str, Times]:
    batch = batch_of(2)
    for trainee in trainees.values():
        trainee.step(batch)  # Lightning fetches one batch ahead: a step trains on the batch before
    turns = {name: partial(trainee.step, batch) for name, trainee in trainees.items()}
    try:
        return benchmark.pedantic(interleaved, (turns, rounds), rounds=1)
    finally:
        for trainee in trainees.values():
            trainee.stop()
