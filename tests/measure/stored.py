"""What the cache says of the samples of a probe: the oracle of everything that streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkov_lightning import (
    GradientCache,
    GradientCapture,
    InterferenceHeatmap,
    Projection,
    ScoreSettings,
    find_projections,
    head_interference,
)
from qkov_lightning.capture.gradients import head_gradients
from qkov_lightning.capture.samples import read_labels
from qkov_lightning.measure.measurement import measure_interference
from qkov_lightning.store.stored import StoredGradients

Loss = Callable[[Any, Any], Tensor]


def filled(
    directory: Path, model: nn.Module, batches: Sequence[Any], loss: Loss, projections: Sequence[Projection]
) -> GradientCache:
    """A cache of the samples, captured from plain backward passes in evaluation mode."""
    cache = GradientCache(directory, max_samples_per_task=10**6, max_bytes=2**40)
    model.eval()
    with GradientCapture(model, projections) as capture:
        for batch in batches:
            capture.start()
            value = loss(model, batch)
            capture.note_loss(value)
            value.backward()
            labels = read_labels(batch, "task", "sample_id", "num_target_tokens")
            cache.append(0, capture.finish(lambda labels=labels: replace(labels, numbered=True)))
            model.zero_grad()
    return cache


def stored_heatmap(
    directory: Path,
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    settings: ScoreSettings | None = None,
    projections: Sequence[Projection] | None = None,
) -> InterferenceHeatmap:
    """Measured over the cache, with the plain mean Fisher of a probe; errors take samples as independent."""
    projections = list(projections or find_projections(model))
    cache = filled(directory / "cache", model, batches, loss, projections)
    with torch.no_grad():
        heatmap = measure_interference(
            StoredGradients(cache, directory / "fisher"),
            projections,
            model,
            replace(settings or ScoreSettings(), fisher_decay=0.0),
        )
    assert heatmap is not None
    return heatmap


def replicate(
    cache: GradientCache, projection: Projection, kept: Sequence[int], settings: ScoreSettings
) -> dict[str, Tensor]:
    """Scores ``[task_a, task_b, head]`` of some of the samples alone, with the Fisher of these."""
    records = [record for record, _ in cache.records()]
    gradients = torch.cat([
        head_gradients(record.read(projection.module_name), projection, record.scales) for record in records
    ])[list(kept)]
    names = [task for record in records for task in record.samples.tasks]
    terms = torch.cat([record.num_terms for record in records])[list(kept)]
    tasks = [names[place] for place in kept]
    every = sorted(set(names))
    means = [gradients[[name == task for name in tasks]].square().mean(dim=0) for task in every]
    found = head_interference(
        gradients, tasks, torch.stack(means).mean(dim=0), settings.damping, settings.update, settings.step_size,
        num_terms=terms,
    )  # fmt: skip
    return {
        score: torch.stack([torch.stack([found[a, b][score] for b in every]) for a in every])
        for score in found[every[0], every[0]]
    }
