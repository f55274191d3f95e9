"""How long the tests over samples take for a model of 4 layers of 8 heads.

python tests/benchmarks/statistics_speed.py
"""

import time
from collections.abc import Callable

import torch

from qkov_lightning import bootstrap_standard_error, permutation_test

LAYERS, HEADS, BLOCKS, SAMPLES, WEIGHTS, DRAWS = 4, 8, 4, 100, 2048, 1000


def main() -> None:
    cells = LAYERS * HEADS * BLOCKS
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(2 * SAMPLES, cells, WEIGHTS, generator=generator)
    pairs = torch.rand(cells, 2 * SAMPLES, 2 * SAMPLES, generator=generator)
    is_a = torch.arange(2 * SAMPLES) < SAMPLES
    tests: dict[str, Callable[[], object]] = {
        "permutation test": lambda: permutation_test(gradients, is_a, num_permutations=DRAWS),
        "bootstrap": lambda: bootstrap_standard_error(pairs, is_a, num_resamples=DRAWS),
    }
    print(
        f"{LAYERS} x {HEADS} x {BLOCKS} cells of {WEIGHTS} weights, {SAMPLES} samples of each of two tasks, {DRAWS:,} draws, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| what | seconds | processor seconds |\n| --- | --- | --- |")
    for name, test in tests.items():
        wall, processor = time.perf_counter(), time.process_time()
        test()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print(f"| {name} | {wall:.1f} | {processor:.1f} |", flush=True)


if __name__ == "__main__":
    main()
