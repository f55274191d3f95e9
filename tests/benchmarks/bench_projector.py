"""What HeadProjector adds to a training step, of 2 x 128 tokens. "x (y)": wall clock x, processor time y."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from shapes import LanguageModel, batch_of, gpt2
from timing import interleaved, ratio
from trainees import Trainee

from qkov_lightning import HeadProjector


@pytest.mark.parametrize("rank", [32, 0.5])
def bench_projected_step(
    rank: int | float, benchmark: Callable, report: Callable, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, rounds = gpt2(), request.config.getoption("rounds")
    batch = batch_of(2)
    projector = HeadProjector([batch], rank=rank)
    trainees = {
        "plain": Trainee(LanguageModel(copy.deepcopy(model)), tmp_path),
        "projected": Trainee(LanguageModel(copy.deepcopy(model)), tmp_path, projector),
    }
    times = benchmark.pedantic(
        interleaved,
        ({name: lambda one=one: one.step(batch) for name, one in trainees.items()}, rounds),
        rounds=1,
    )
    for one in trainees.values():
        one.stop()
    size = projector.subspace.num_bytes / 2**20
    report(
        f"GPT-2, 12 layers: step with HeadProjector, rank {rank} ({size:.3g} MiB) / plain step",
        ratio(times["projected"], times["plain"]),
        "1.10",
    )
