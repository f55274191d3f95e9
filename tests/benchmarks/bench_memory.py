"""Peak resident memory, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from caches import STORAGES
from memory import peak_of

from qkov_lightning.store.streaming import HELD_BYTES

# What streaming.py states: gradients, the Fishers of one projection (two tasks) and factors of two steps of 8
# x 128 tokens; here for Q, 2,048 x 256 weights, in float32.
CAP = HELD_BYTES + 4 * (2 * 2048 * 256 + 2 * 8 * 128 * (2048 + 256))


def bench_memory_of_training(benchmark: Callable, report: Callable) -> None:
    plain = benchmark.pedantic(peak_of, ("train", "0"), rounds=1)
    for every_n_steps, what in ((1, "every"), (10, "every tenth")):
        monitored = peak_of("train", str(every_n_steps))
        report(
            f"GPT-2 small with its vocabulary, 2 x 128 tokens: peak memory with the monitor, {what} step captured / without ({plain / 1e9:.2f} GB)",
            f"{monitored / plain:.3f}",
            "1.05",
        )


@pytest.mark.parametrize("storage", STORAGES)
def bench_memory_of_validation(storage: str, benchmark: Callable, report: Callable, tmp_path: Path) -> None:
    for num_samples in (32, 128, 512):
        arguments = ("validate", str(tmp_path / str(num_samples)), str(num_samples), storage)
        added = peak_of(*arguments) if num_samples > 32 else benchmark.pedantic(peak_of, arguments, rounds=1)
        report(
            f"1 layer, 16 heads of 128 x 256 weights, {storage}, {num_samples} samples: peak memory that the validation pass adds",
            f"{added / 2**20:.0f} MiB",
            f"{CAP / 2**20:.0f} MiB",
        )
