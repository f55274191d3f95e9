"""Caches that a monitored training run has written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from shapes import LanguageModel
from torch import nn
from trainees import Trainee

from qkov_lightning import (
    GradientCache,
    InterferenceHeatmap,
    InterferenceMonitor,
    find_projections,
)
from qkov_lightning.measure.measurement import measure_interference
from qkov_lightning.store.sampling import Coordinates
from qkov_lightning.store.stored import StoredGradients

STORAGES: dict[str, dict[str, object]] = {"exact": {"storage": "factors"}, "sampled": {"storage": "sampled"}}
"""Options of the monitor for each way to store gradients."""


def written_cache(
    model: nn.Module, batches: Sequence[dict], folder: Path, storage: str = "exact", accelerator: str = "cpu"
) -> GradientCache:
    """The cache after one training step on each batch."""
    monitor = InterferenceMonitor(
        every_n_steps=1,
        max_samples_per_task=4096,
        max_cache_gb=64,
        cache_dir=folder,
        keep_cache=True,
        **STORAGES[storage],
    )
    trainee = Trainee(LanguageModel(model), folder, monitor, accelerator=accelerator)
    for batch in batches:
        trainee.step(batch)
    trainee.stop()
    return GradientCache(Path(monitor.state_dict()["cache"]), max_samples_per_task=4096, max_bytes=64 * 2**30)


def measured(cache: GradientCache, model: nn.Module) -> InterferenceHeatmap:
    """One validation pass in which every step is new to the Fisher, the most work that there can be."""
    module = LanguageModel(model)  # the names in the cache are those of the module that was trained
    drawn = cache.directory / "sampling" / "coordinates.safetensors"
    with torch.no_grad():
        heatmap = measure_interference(
            StoredGradients(
                cache,
                cache.directory / "fisher",
                coordinates=Coordinates.load(drawn) if drawn.exists() else None,
            ),
            find_projections(module),
            module,
        )
    assert heatmap is not None
    assert all(values.isfinite().any(dim=3).all() for values in heatmap.scores.values())
    return heatmap


def bytes_per_sample(cache: GradientCache) -> float:
    records = [record for record, _ in cache.records()]
    return sum(record.num_bytes for record in records) / sum(len(record.samples) for record in records)
