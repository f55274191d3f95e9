"""What a captured step costs with each storage, the wait for the writer included.

Four steps of 2 x 128 tokens at a time, then the wait until they are written; the variants take turns.
Training has one thread; the writer has another.

    python tests/benchmarks/captured_step.py
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from shapes import LanguageModel, batch_of, gpt2, qwen3
from trainees import Trainee

from qkov_lightning import InterferenceMonitor

STORAGES = ("exact", "summed", "sampled")
STEPS, ROUNDS = 4, 3


def compare(name: str, model: torch.nn.Module, folder: Path) -> None:
    batch = batch_of(2)
    monitors = {
        storage: InterferenceMonitor(every_n_steps=1, storage=storage, cache_dir=folder / storage / "cache")
        for storage in STORAGES
    }
    trainees = {"plain": Trainee(LanguageModel(copy.deepcopy(model)), folder)} | {
        storage: Trainee(LanguageModel(copy.deepcopy(model)), folder / storage, monitor)
        for storage, monitor in monitors.items()
    }

    def seconds(variant: str) -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            trainees[variant].step(batch)
        if variant in monitors:
            monitors[variant].state_dict()  # waits
        return time.perf_counter() - wall, time.process_time() - processor

    for variant in trainees:  # the first steps are slower
        seconds(variant)
    found = {variant: [] for variant in trainees}
    for _ in range(ROUNDS):
        for variant in trainees:
            found[variant].append(seconds(variant))
    wall, processor = (statistics.median(one[kind] for one in found["plain"]) for kind in (0, 1))
    for variant in STORAGES:
        ratios = [
            statistics.median(one[kind] for one in found[variant]) / plain
            for kind, plain in ((0, wall), (1, processor))
        ]
        print(
            f"{name}: step captured in {variant} storage / plain step: {ratios[0]:.2f} ({ratios[1]:.2f})",
            flush=True,
        )
    for trainee in trainees.values():
        trainee.stop()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in (("GPT-2, 12 layers", gpt2), ("Qwen3-0.6B, 4 layers", qwen3)):
            compare(name, shape(), Path(folder) / name.split(",")[0])


if __name__ == "__main__":
    main()
