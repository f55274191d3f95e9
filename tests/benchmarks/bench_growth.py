"""How time and bytes grow: exponents of straight lines through the logarithms, 1 = linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import linear_regression

import pytest
from caches import STORAGES, bytes_per_sample, measured, written_cache
from shapes import batch_of, qwen3
from timing import timed

SIZES = {"samples": (32, 64, 128, 256, 512), "tokens": (32, 128, 512), "layers": (1, 2, 4, 8)}


@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize("storage", STORAGES)
def bench_growth(storage: str, what: str, benchmark: Callable, report: Callable, tmp_path: Path) -> None:
    def run(size: int) -> tuple[float, float]:
        of = {"samples": 32, "tokens": 32, "layers": 1, what: size}
        model = qwen3(of["layers"], hidden=128, intermediate=128)
        batches = [batch_of(16, of["tokens"]) for _ in range(of["samples"] // 16)]
        cache = written_cache(model, batches, tmp_path / str(size), storage)
        seconds = min(timed(lambda: measured(cache, model))[1] for _ in range(2))
        return seconds, bytes_per_sample(cache) * of["samples"]

    results = benchmark.pedantic(lambda: [run(size) for size in SIZES[what]], rounds=1)
    sizes = [math.log(size) for size in SIZES[what]]
    for kind, values in zip(
        ("processor time of the validation pass", "bytes on disk"), zip(*results, strict=True), strict=True
    ):
        slope = linear_regression(sizes, [math.log(value) for value in values]).slope
        report(
            f"{storage}: exponent of {kind} in {what}, {SIZES[what][0]} to {SIZES[what][-1]}",
            f"{slope:.2f}",
            "1",
        )
