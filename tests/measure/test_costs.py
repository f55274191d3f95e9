"""What a measurement is said to cost before it runs."""

from __future__ import annotations

import re

import pytest
import torch
from models import Classifier, GroupedAttention
from rich.console import Console
from torch import nn

from qkov_lightning import find_projections
from qkov_lightning.measure.costs import Cost, Samples, Speed, cost_table, costs_of

SPEED = Speed(products=1e9, elements=1e8)
KV = 2 * 3 * 10 + 2 * 5 * 10
WEIGHTS = 3 * (4 * 3 * 10 + KV + 4 * 5 * 10)
"""Of three layers of four query heads of three features, two key-value heads of three and of five."""


def model(layers: int = 3) -> nn.Module:
    return Classifier([GroupedAttention() for _ in range(layers)], width=10)


def costs(samples: Samples = Samples(16, 2, 6), **options: float) -> dict[str, Cost]:  # noqa: B008
    found = costs_of(model(), find_projections(model()), samples, SPEED, **options)
    return {cost.way: cost for cost in found}


def test_a_probe_needs_memory_for_its_sums_and_no_disk() -> None:
    found = costs()
    # Four sums a task; with cubes, and a sum for each half and ordered pair. Four for gradients that wait.
    linear, exact = found["probe, linear replicates"], found["probe, exact replicates"]
    assert linear.disk_bytes == exact.disk_bytes == 0
    assert linear.memory_bytes == 128 * 2**20 + 4 * WEIGHTS * (8 + 2 + 8 + 4)
    assert exact.memory_bytes == 128 * 2**20 + 4 * WEIGHTS * (8 * 17 + 4)
    assert costs(Samples(160, 2, 6))["probe, linear replicates"].memory_bytes == linear.memory_bytes


def test_less_memory_makes_more_sweeps_that_take_longer() -> None:
    whole = costs()["probe, linear replicates"]
    parts = costs(max_memory_gb=4 * 22 * 250 / 2**30)["probe, linear replicates"]
    assert whole.remark.startswith("1 sweep, 3 passes")
    assert int(parts.remark.split()[0]) >= 6
    assert parts.memory_bytes <= 128 * 2**20 + 4 * 22 * 250
    assert parts.seconds > 1.3 * whole.seconds
    assert "probe, exact replicates" not in costs(max_memory_gb=4 * 22 * 250 / 2**30)


def test_a_model_that_does_not_train_costs_nothing() -> None:
    frozen = model().requires_grad_(False)
    found = costs_of(frozen, find_projections(frozen), Samples(16, 2, 6), SPEED)
    assert {cost.seconds for cost in found} == {0.0}
    assert all("0 sweeps" in cost.remark for cost in found if cost.way.startswith("probe"))


def test_time_grows_with_samples_and_speed() -> None:
    once, twice = costs(Samples(16, 2, 6)), costs(Samples(32, 2, 6))
    for way, cost in once.items():
        assert twice[way].seconds == pytest.approx(2 * cost.seconds)


def test_auto_is_what_the_monitor_and_the_probe_would_take() -> None:
    def taken(**options: float) -> set[str]:
        return {way for way, cost in costs(**options).items() if cost.remark.endswith("what auto takes")}

    assert taken() == {"cache, exact", "probe, exact replicates"}
    assert taken(max_memory_gb=3e-4) == {"cache, exact", "probe, linear replicates"}


def test_auto_takes_the_first_of_three_storages_that_fits() -> None:
    """A sample takes 25 kB exactly (6,144 weights), 12 kB sampled; sums of two tasks 147 kB."""
    wide = Classifier([GroupedAttention(width=64, heads=2, kv_heads=1, size=16, value_size=16)], width=64)
    for budget, way in ((1.0, "exact"), (2.1e-3, "summed"), (3e-4, "sampled")):
        found = costs_of(wide, find_projections(wide), Samples(24, 2, 64), SPEED, max_cache_gb=budget)
        chosen = [cost for cost in found[:3] if cost.remark.endswith("what auto takes")]
        assert [cost.way for cost in chosen] == [f"cache, {way}"]
    summed = found[1]
    # Of all projections in training, and of the largest one once more in a measurement.
    assert summed.memory_bytes == 256 * 2**20 + 2 * 3 * 4 * (6144 + 2048)
    # Two generations now and at two checkpoints each, and twice the samples at 512 weights of 6 heads.
    assert summed.disk_bytes == 6 * 2 * 3 * 4 * 6144 + 2 * 48 * 4 * 512 * 6


def test_a_model_without_memory_is_measured_on_paper() -> None:
    with torch.device("meta"):
        empty = model()
    found = costs_of(empty, find_projections(empty), Samples(), SPEED)
    assert [cost.way for cost in found] == [
        cost.way for cost in costs_of(model(), find_projections(model()), Samples(), SPEED)
    ]


def test_the_table_names_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    samples = Samples(16, 2, 6)
    found = costs_of(model(), find_projections(model()), samples, Speed.of(torch.device("cpu")))
    Console(width=150).print(cost_table(model(), found, samples))
    text = capsys.readouterr().out
    assert "A heatmap of 16 samples of 6 tokens of each of 2 tasks" in text
    for cost in found:
        assert re.search(rf"{cost.way}.* (s|min|h) ", text)
