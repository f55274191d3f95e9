"""From stored gradients to a heatmap: the Fisher, the scores, and the sample pairs that hurt most."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qkov_lightning.heads.maps import find_map
from qkov_lightning.heads.projections import BLOCKS, Block, Projection, num_heads, num_layers
from qkov_lightning.measure.cells import BlockInfo, Layer, Status
from qkov_lightning.measure.folding import Folding, disk_errors
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.jackknife import unit_numbers
from qkov_lightning.measure.pairs import worst_pairs
from qkov_lightning.scores.calibration import KnownMeans
from qkov_lightning.scores.fisher import EmpiricalFisher
from qkov_lightning.scores.metric import HeadInterference
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.scores.updates import UpdateDirection
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.records import CacheRecord
from qkov_lightning.store.stored import StoredGradients
from qkov_lightning.store.streaming import CacheReader, HeadGradients, head_gradients_of

MAX_CELLS = 20_000_000
"""Values of one score in a heatmap: 100 tasks at 28 layers x 16 heads."""

Rates = Mapping[tuple[int, Block], Float[Tensor, "_ _"]]
"""What the optimiser multiplies a gradient with, by layer and block."""


def measure_interference(
    stored: StoredGradients,
    projections: Sequence[Projection],
    model: nn.Module,
    settings: ScoreSettings = ScoreSettings(),
    processes: Processes = Processes(),
    rates: Rates | None = None,
    on_projection: Callable[[], None] = lambda: None,
) -> InterferenceHeatmap | None:
    """Fold the new steps into the Fisher, score every cell, and find the sample pairs that hurt most.

    Args:
        stored: What is measured.
        projections: What to score.
        model: Tells which projections are frozen; the arithmetic runs on its device.
        settings: What the scores depend on.
        processes: Each takes some layers.
        rates: What the optimiser multiplies a gradient with, instead of the direction of the settings.
        on_projection: Called when one of the projections is done, to show progress.

    Returns:
        The heatmap, the same in every process; None if the cache is empty.

    Raises:
        CacheError: If the Fisher cannot be written or read, if there are too many tasks for a heatmap, or if
            the cache holds other weights than it should.
    """
    selected = stored.selected()
    if not selected:
        return None
    masks = {record.path: mask for record, mask in selected}
    # The Fisher also takes the steps that are beyond the budget by now.
    beyond = [record for record in stored.cache.unfolded() if record.path not in masks]
    masks |= {record.path: torch.zeros(len(record.samples), dtype=torch.bool) for record in beyond}
    records = sorted([*(record for record, _ in selected), *beyond], key=lambda record: record.path.name)
    stored.check(records)
    tasks = sorted({
        record.samples.tasks[i] for record, mask in selected for i in mask.nonzero().flatten().tolist()
    })
    check_size(tasks, projections)
    reader = CacheReader(records, next(model.parameters()).device)
    metric = HeadInterference(tasks, num_layers(projections), num_heads(projections), settings)
    metric = metric.to(reader.device)
    own = [projection for projection in projections if processes.takes(projection.layer)]
    in_window = stored.window is not None
    failures: list[CacheError] = []
    with disk_errors(stored, failures):
        for projection in own:
            folding = Folding(stored, projection, settings.fisher_decay, reader.device)
            for gradients in head_gradients_of(reader, stored.as_kept(projection)):
                indices = _task_indices(gradients.records, masks, tasks)
                fisher = folding.mean(gradients, indices >= 0) if in_window else folding.fold(gradients)
                # A frozen block has no gradients and no rates.
                rate = None if rates is None else rates[projection.layer, projection.block]
                if fisher.tasks:
                    update = settings.update if rate is None else rate[gradients.heads]
                    known = _known_means(
                        stored, projection, gradients, tasks, indices, settings, update, reader.device
                    )
                    metric.update(
                        gradients,
                        indices,
                        fisher.pooled(),
                        layer=projection.layer,
                        block=projection.block,
                        first_head=gradients.heads.start,
                        rates=None if rate is None else stored.kept_of(rate, projection, gradients.heads),
                        weights=stored.weights(projection, gradients.heads),
                        fisher_shares=_shares(fisher, gradients, indices, in_window),
                        groups=unit_numbers(gradients.tasks, gradients.ids, gradients.groups),
                        num_terms=gradients.num_terms,
                        known=known,
                    )
            folding.save()
            on_projection()
    processes.agree(failures[0] if failures else None)
    result = {name: value.cpu() for name, value in metric.compute().items()}
    heatmap = InterferenceHeatmap(
        tasks=tuple(tasks),
        layers=described_layers(projections, model, result["num_samples"]),
        scores={score: result[score] for score in SCORES},
        standard_errors={score: result[f"{score}_standard_error"] for score in SCORES},
        num_samples=result["num_samples"],
    )
    pairs = []
    try:
        pairs = worst_pairs(heatmap, own, stored, reader, masks, settings, rates)
    except CacheError as error:
        failures.append(error)
    processes.agree(failures[0] if failures else None)
    pairs = processes.gather(pairs)
    pairs.sort(key=lambda pair: -(pair.harm or 0.0))
    return replace(heatmap, pairs=tuple(pairs))


def check_size(tasks: Sequence[str], projections: Sequence[Projection]) -> None:
    """Refuse a heatmap that nobody could hold.

    Raises:
        CacheError: If there are too many tasks.
    """
    num_cells = len(tasks) ** 2 * num_layers(projections) * num_heads(projections) * len(BLOCKS)
    if num_cells > MAX_CELLS:
        raise CacheError(
            f"{len(tasks)} tasks ({tasks[0]!r}, {tasks[1]!r}, ...) make {num_cells:,} cells, more than the {MAX_CELLS:,} that "
            "a heatmap can hold. Is `task_of` the identifier of a sample? Map it to fewer tasks."
        )


def _task_indices(
    records: Sequence[CacheRecord], masks: dict[Path, Bool[Tensor, sample]], tasks: Sequence[str]
) -> Tensor:
    """Task of every sample of the records, -1 for those beyond the budget."""
    indices = []
    for record in records:
        known = torch.tensor([tasks.index(name) if name in tasks else -1 for name in record.samples.tasks])
        indices.append(known.masked_fill(~masks[record.path], -1))
    return torch.cat(indices)


def _known_means(
    stored: StoredGradients,
    projection: Projection,
    gradients: HeadGradients,
    tasks: Sequence[str],
    indices: Int[Tensor, sample],
    settings: ScoreSettings,
    update: UpdateDirection | Float[Tensor, "head weight"],
    device: torch.device,
) -> KnownMeans | None:
    """What the sums at all weights tell of the samples that count; None where there are none of just these.

    Warns:
        UserWarning: If they cannot be read.
    """
    counts = [int((indices == task).sum()) for task in range(len(tasks))]
    try:
        means = stored.means(projection, gradients.heads, tasks, counts)
    except CacheError as error:
        warnings.warn(f"{error} Scores of its cells come from sampled weights alone.", stacklevel=2)
        return None
    if means is None:
        return None
    means = means.to(device)
    update = update.to(means) if isinstance(update, Tensor) else update
    return KnownMeans.of(means, torch.tensor(counts, device=device) > 0, settings.damping, update)


def _shares(
    fisher: EmpiricalFisher, gradients: HeadGradients, indices: Int[Tensor, sample], in_window: bool
) -> Float[Tensor, sample]:
    """Share in the Fisher of each sample that counts: its own, and those of its earlier captures."""
    if in_window:  # as one step of all that count
        counted = [place for place, index in enumerate(indices.tolist()) if index >= 0]
        own = fisher.shares([gradients.tasks[place] for place in counted], [0] * len(counted))
        return torch.zeros(len(indices), dtype=own.dtype).index_copy_(
            0, torch.tensor(counted, dtype=torch.int64), own
        )
    shares = fisher.shares(gradients.tasks, gradients.steps)
    places: dict[tuple[str, str], int] = {}
    keys = list(zip(gradients.tasks, gradients.ids, strict=True))
    for place, (key, index) in enumerate(zip(keys, indices.tolist(), strict=True)):
        if index >= 0:
            places[key] = place
    known = [place for place, key in enumerate(keys) if key in places]
    owners = torch.tensor([places[keys[place]] for place in known], dtype=torch.int64)
    return torch.zeros_like(shares).index_add_(0, owners, shares[known])


def described_layers(
    projections: Sequence[Projection], model: nn.Module, num_samples: Tensor
) -> tuple[Layer, ...]:
    """What a heatmap says of its layers, and of which of their blocks samples were measured."""
    names: dict[int, str] = {}
    blocks: dict[int, dict[Any, BlockInfo]] = {}
    for projection in projections:
        measured = bool(num_samples[:, projection.layer, :, BLOCKS.index(projection.block)].any())
        status: Status = "measured" if measured else "no data"
        if not find_map(model, projection).is_trainable:
            status = "frozen" if not measured else status
        names[projection.layer] = projection.layer_name
        blocks.setdefault(projection.layer, {})[projection.block] = BlockInfo(
            projection.module_name, projection.num_heads, projection.query_group, status, projection.also
        )
    placed = {projection.layer: projection.placed for projection in projections}
    return tuple(
        Layer(names.get(i, f"layer {i}"), blocks.get(i, {}), placed.get(i, "by name"))
        for i in range(num_layers(projections))
    )
