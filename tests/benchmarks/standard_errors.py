"""Standard errors over the true spread: repeated runs of simulated streams, with an EMA Fisher.

    python tests/benchmarks/standard_errors.py

Prints, for each score, the range over cells of (root mean square of the standard errors / standard deviation
of the score over runs): pairs of two tasks, and in brackets pairs within one task. 200 runs tell a ratio to
5%.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkov_lightning import EmpiricalFisher, HeadInterference
from qkov_lightning.scores.scores import SCORES

TASKS = ("a", "b")
NUM_RUNS = 200
NUM_WEIGHTS = 200
STREAMS = ((32, 0.0, 10**9), (128, 0.0, 10**9), (128, 0.95, 8), (128, 0.95, 2))
"""Samples of each task, decay of the Fisher, and samples of each task in a captured step."""


def gradients(generator: torch.Generator, num_samples: int, task: int, kind: str) -> Tensor:
    """Per-sample gradients of two heads.

    A mean, noise of full or low rank, and weights of different sizes.
    """
    fixed = torch.Generator().manual_seed(100 + task)
    mean = 0.3 * torch.randn(2, NUM_WEIGHTS, generator=fixed)
    scale = torch.randn(2, NUM_WEIGHTS, generator=fixed).exp()
    noise = torch.randn(num_samples, 2, NUM_WEIGHTS, generator=generator)
    if kind == "heavy tails":
        noise = noise * (0.7 * torch.randn(num_samples, 1, 1, generator=generator)).exp()
    if kind == "low rank":
        factors = torch.randn(2, 4, NUM_WEIGHTS, generator=fixed)
        drawn = torch.randn(num_samples, 2, 4, generator=generator)
        noise = torch.einsum("nhr,hrw->nhw", drawn, factors) + 0.3 * noise
    return (mean + noise) * scale


def measure(
    seed: int, num_samples: int, decay: float, per_step: int, kind: str, known: bool
) -> dict[str, Tensor]:
    """One run; the Fisher taken as known or not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([gradients(generator, num_samples, task, kind) for task in range(2)])
    tasks = [task for task in TASKS for _ in range(num_samples)]
    steps = [n // per_step for n in range(num_samples)] * 2
    fisher = EmpiricalFisher(decay)
    fisher.fold([x], tasks, steps)
    metric = HeadInterference(TASKS, num_layers=1, num_heads=2)
    shares = None if known else fisher.shares(tasks, steps)
    metric.update(x, tasks, fisher.pooled(), layer=0, block="Q", fisher_shares=shares)
    return metric.compute()


def main() -> None:
    """Print the ratios."""
    for kind in ("full rank", "heavy tails", "low rank"):
        for num_samples, decay, per_step in STREAMS:
            print(f"{kind}, {num_samples} samples, decay {decay}, {min(per_step, num_samples)} a step")
            for known in (True, False):
                runs = [measure(seed, num_samples, decay, per_step, kind, known) for seed in range(NUM_RUNS)]
                for score in SCORES if not known else ("interference", "relative"):
                    values = torch.stack([run[score][:, :, 0, :, 0] for run in runs])
                    errors = torch.stack([run[f"{score}_standard_error"][:, :, 0, :, 0] for run in runs])
                    ratio = errors.square().mean(dim=0).sqrt() / values.std(dim=0)
                    cross, own = ratio[[0, 1], [1, 0]], ratio[[0, 1], [0, 1]]
                    print(
                        f"  {score}{', Fisher taken as known' if known else ''}: {cross.min():.2f} to {cross.max():.2f} "
                        f"({own.min():.2f} to {own.max():.2f})"
                    )


if __name__ == "__main__":
    main()
