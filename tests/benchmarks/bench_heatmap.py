"""What a heatmap costs, compared with training on the same samples and with a loop over pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from caches import STORAGES, measured, written_cache
from shapes import TASKS, batch_of, loss_of, qwen3
from timing import Ratio, interleaved, ratio, timed
from torch import Tensor

from qkov_lightning import (
    EmpiricalFisher,
    GradientCapture,
    HeadInterference,
    Projection,
    find_projections,
    task,
)
from qkov_lightning.capture.gradients import head_gradients
from qkov_lightning.scores.functional import sample_pairs
from qkov_lightning.scores.updates import damped

GOALS = {"exact": "1.0", "sampled": "0.1"}


@pytest.mark.parametrize("storage", STORAGES)
def bench_validation_pass(storage: str, benchmark: Callable, report: Callable, tmp_path: Path) -> None:
    model = qwen3(num_layers=2).train()
    batches = [batch_of(4) for _ in range(4)]
    cache = written_cache(model, batches, tmp_path, storage)

    def train() -> None:
        for batch in batches:
            loss_of(model, batch["tokens"]).backward()
            model.zero_grad()

    variants = {"measure": lambda: measured(cache, model), "train": train}
    times = benchmark.pedantic(interleaved, (variants, 3), rounds=1)
    report(
        f"Qwen3-0.6B, 2 layers, 16 samples x 128 tokens, {storage}: validation pass / forward + backward",
        ratio(times["measure"], times["train"]),
        GOALS[storage],
    )


def bench_loop_over_pairs(benchmark: Callable, report: Callable) -> None:
    """100 samples of each of two tasks, 2 layers x 4 heads x 4 blocks, all in memory, no extrapolation."""
    model = qwen3(num_layers=2, hidden=128, intermediate=256, num_heads=4, num_kv_heads=4, head_dim=32)
    projections = find_projections(model)
    gradients, tasks = _gradients(model, projections, num_samples=200)
    fishers = {}
    for projection in projections:
        fisher = EmpiricalFisher()
        fisher.update(gradients[projection], tasks)
        fishers[projection] = fisher.pooled()

    def heatmap() -> Tensor:
        metric = HeadInterference(TASKS, num_layers=2, num_heads=4)
        for one in projections:
            metric.update(gradients[one], tasks, fishers[one], layer=one.layer, block=one.block)
        return metric.compute()["interference"]

    rows = {name: [i for i, own in enumerate(tasks) if own == name] for name in TASKS}
    first, second = (rows[name] for name in TASKS)

    # Of each head, the samples of each task side by side: as the cache gives them.
    slices = {
        one: [(gradients[one][first, head], gradients[one][second, head]) for head in range(one.num_heads)]
        for one in projections
    }

    def matrices() -> list[Tensor]:
        return [
            sample_pairs(a, b, fisher)
            for one in projections
            for (a, b), fisher in zip(slices[one], fishers[one], strict=True)
        ]

    contributions = {one: gradients[one].square() for one in projections}
    references = {one: damped(fishers[one], 1e-3) for one in projections}
    fast = interleaved({"heatmap": heatmap, "matrices": matrices}, 10)
    pairs_of: dict[tuple[str, str], Tensor] = {}
    seconds = {}
    for a, b in itertools.product(TASKS, TASKS):

        def loop(a: str = a, b: str = b) -> None:
            pairs_of[a, b] = _loop(contributions, gradients, references, rows[a], rows[b])

        seconds[a, b] = timed(loop)
    benchmark.pedantic(heatmap, rounds=5)

    # Both must say the same.
    for (i, a), (j, b) in itertools.product(enumerate(TASKS), enumerate(TASKS)):
        expected = pairs_of[a, b].nanmean(dim=(0, 1))
        found = torch.stack([
            heatmap()[i, j, p.layer, : p.num_heads, "QKVO".index(p.block)] for p in projections
        ])
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=0)
    found = torch.stack(matrices(), dim=-1).view(100, 100, len(projections), -1)
    torch.testing.assert_close(found, pairs_of[TASKS], rtol=1e-3, atol=1e-6)

    def times_faster(slow: list[tuple[float, float]], name: str) -> Ratio:
        wall, processor = (sum(column) for column in zip(*slow, strict=True))
        return Ratio(wall / median(fast[name].wall), processor / median(fast[name].processor))

    what = "100 x 100 samples, 32 cells of 4,096 weights"
    report(
        f"{what}: loop over pairs / all scores with standard errors, 4 task pairs",
        times_faster(list(seconds.values()), "heatmap"),
        "1,000",
    )
    report(
        f"{what}: loop over pairs / pair matrices, 1 task pair",
        times_faster([seconds[TASKS]], "matrices"),
        "100",
    )


def _gradients(
    model: torch.nn.Module, projections: list[Projection], num_samples: int
) -> tuple[dict[Projection, Tensor], tuple[str, ...]]:
    batch = batch_of(num_samples, num_tokens=16)
    with GradientCapture(model, projections) as capture:
        capture.start()
        with task(batch["task"]):
            loss_of(model, batch["tokens"]).backward()
        (step,) = capture.finish()
    gradients = {one: head_gradients(step.factors[one.module_name], one, step.scales) for one in projections}
    return gradients, step.samples.tasks


def _loop(
    contributions: dict[Projection, Tensor],
    gradients: dict[Projection, Tensor],
    references: dict[Projection, Tensor],
    samples_a: list[int],
    samples_b: list[int],
) -> Tensor:
    """M_ij pair by pair, head by head, as it is written down; NaN for a sample with itself."""
    result = torch.full(
        (len(samples_a), len(samples_b), len(gradients), next(iter(gradients)).num_heads), torch.nan
    )
    for row, i in enumerate(samples_a):
        for column, j in enumerate(samples_b):
            if i == j:
                continue
            for index, projection in enumerate(gradients):
                contribution, gradient = contributions[projection][i], gradients[projection][j]
                reference = references[projection]
                for head in range(projection.num_heads):
                    score = (contribution[head] / reference[head]) * gradient[head].abs()
                    result[row, column, index, head] = score.sum()
    return result
