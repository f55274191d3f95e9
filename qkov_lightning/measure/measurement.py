"""From the cache to a heatmap: the Fisher, the scores, and the sample pairs of the hottest cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qkov_lightning.capture.gradients import owned_gradients
from qkov_lightning.heads.projections import BLOCKS, Block, Projection, num_heads, num_layers
from qkov_lightning.heads.weights import is_trainable
from qkov_lightning.measure.heatmap import BlockInfo, Cell, InterferenceHeatmap, Layer, SamplePair, Status
from qkov_lightning.scores.fisher import EmpiricalFisher
from qkov_lightning.scores.metric import HeadInterference
from qkov_lightning.scores.scores import SCORES, sample_pairs
from qkov_lightning.scores.updates import STEP_SIZE, UpdateDirection, damped
from qkov_lightning.store.cache import CacheError, CacheRecord, GradientCache
from qkov_lightning.store.sampling import Coordinates, stored_name, stored_projection
from qkov_lightning.store.streaming import HELD_BYTES, CacheReader, head_gradients_of, restricted

PAIRS_PER_CELL = 3

MAX_CELLS = 20_000_000
"""Values of one score in a heatmap: 100 tasks at 28 layers x 16 heads."""

Rates = Mapping[tuple[int, Block], Float[Tensor, "_ _"]]
"""What the optimiser multiplies a gradient with, by layer and block."""

Gather = Callable[[list[SamplePair]], list[SamplePair]]
Agree = Callable[[CacheError | None], None]


def raise_alone(error: CacheError | None) -> None:
    """Agreement of a single process with itself.

    Raises:
        CacheError: If there is an error.
    """
    if error is not None:
        raise error


def measure_interference(
    cache: GradientCache,
    projections: Sequence[Projection],
    model: nn.Module,
    *,
    fisher_directory: Path,
    previous_fisher: Path | None = None,
    folded_until: int = 0,
    fisher_decay: float = 0.95,
    damping: float = 1e-3,
    update: UpdateDirection = "adam",
    step_size: float = STEP_SIZE,
    rates: Rates | None = None,
    num_hot_cells: int = 10,
    coordinates: Coordinates | None = None,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = lambda pairs: pairs,
    agree: Agree = raise_alone,
    step: int = 0,
    epoch: int = 0,
    notes: dict[str, Any] | None = None,
    on_projection: Callable[[], None] = lambda: None,
) -> InterferenceHeatmap | None:
    """Fold the new steps into the Fisher, score every cell, and find the sample pairs of the hottest.

    Args:
        cache: Samples of all processes.
        projections: What to score.
        model: Tells which projections are frozen.
        fisher_directory: Where the Fisher is written, a file per projection.
        previous_fisher: Where it was written last time.
        folded_until: First captured step that the previous Fisher does not hold.
        fisher_decay: Decay of a new Fisher.
        damping: Added to the Fisher, relative to its mean over a slice.
        update: Direction in which a task updates the weights.
        step_size: Length of the step along it.
        rates: What the optimiser multiplies a gradient with, instead of the direction.
        num_hot_cells: Cells per task pair whose sample pairs are searched.
        coordinates: Weights that the cache holds of each head; all of them by default.
        device: Where the arithmetic runs.
        rank: This process; it takes every ``world_size``-th layer.
        world_size: Number of processes.
        gather: Joins the sample pairs of all processes.
        agree: Raises in all processes if one of them has an error: one that stopped alone would leave the others waiting.
        step: Optimiser steps done, for the result.
        epoch: Epoch, for the result.
        notes: Facts about the run, for the result.
        on_projection: Called when one of the projections is done, to show progress.

    Returns:
        The heatmap, the same in every process; None if the cache is empty.

    Raises:
        CacheError: If the Fisher cannot be written or read, if there are too many tasks for a heatmap, or if the cache
            holds other weights than the coordinates say.
    """
    selected = cache.records()
    if not selected:
        return None
    records = [record for record, _ in selected]
    _check_coordinates(records, coordinates)
    masks = {record.path: mask for record, mask in selected}
    tasks = sorted({
        record.samples.tasks[i] for record, mask in selected for i in mask.nonzero().flatten().tolist()
    })
    num_cells = len(tasks) ** 2 * num_layers(projections) * num_heads(projections) * len(BLOCKS)
    if num_cells > MAX_CELLS:
        raise CacheError(
            f"{len(tasks)} tasks ({tasks[0]!r}, {tasks[1]!r}, ...) make {num_cells:,} cells, more than the {MAX_CELLS:,} that "
            "a heatmap can hold. Is `task_of` the identifier of a sample? Map it to fewer tasks."
        )
    metric = HeadInterference(
        tasks, num_layers(projections), num_heads(projections), damping, update, step_size
    ).to(device)
    own = [projection for projection in projections if projection.layer % world_size == rank]
    failure: CacheError | None = None
    reader = CacheReader(records, device)
    try:
        fisher_directory.mkdir(parents=True, exist_ok=True)
        for projection in own:
            previous = EmpiricalFisher(fisher_decay)
            if previous_fisher and (path := _fisher_path(previous_fisher, projection)).exists():
                previous = EmpiricalFisher.load(path, device)
            parts = []
            for gradients in head_gradients_of(reader, _stored(projection, coordinates)):
                fisher = previous.part(gradients.heads)
                fisher.fold(gradients, gradients.tasks, gradients.steps, folded_until)
                parts.append(fisher)
                if fisher.tasks:
                    metric.update(
                        gradients,
                        _task_indices(gradients.records, masks, tasks),
                        fisher.pooled(),
                        layer=projection.layer,
                        block=projection.block,
                        first_head=gradients.heads.start,
                        rates=_rates(projection, rates, coordinates, gradients.heads),
                        weights=_weights(projection, coordinates, gradients.heads),
                    )
            whole = EmpiricalFisher.joined(parts) if parts else previous
            if whole.tasks:
                whole.save(_fisher_path(fisher_directory, projection))
            on_projection()
    except CacheError as error:
        failure = error
    except OSError as error:
        failure = CacheError(f"The Fisher cannot be written to {fisher_directory}: {error}")
    agree(failure)
    result = {name: value.cpu() for name, value in metric.compute().items()}
    heatmap = InterferenceHeatmap(
        tasks=tuple(tasks),
        layers=_layers(projections, model, result["num_samples"]),
        scores={score: result[score] for score in SCORES},
        standard_errors={score: result[f"{score}_standard_error"] for score in SCORES},
        num_samples=result["num_samples"],
        step=step,
        epoch=epoch,
        notes=notes or {},
    )
    pairs: list[SamplePair] = []
    try:
        pairs = _hottest_pairs(
            heatmap, own, reader, masks, fisher_directory, damping, num_hot_cells, coordinates
        )
    except CacheError as error:
        failure = error
    agree(failure)
    pairs = gather(pairs)
    pairs.sort(key=lambda pair: -pair.value)
    return replace(heatmap, pairs=tuple(pairs))


def _stored(projection: Projection, coordinates: Coordinates | None) -> Projection:
    return projection if coordinates is None else stored_projection(projection)


def _weights(
    projection: Projection, coordinates: Coordinates | None, heads: slice
) -> Float[Tensor, "head replicate coordinate"] | None:
    if coordinates is None:
        return None
    return coordinates.slices[stored_name(projection)].weight[heads]


def _rates(
    projection: Projection, rates: Rates | None, coordinates: Coordinates | None, heads: slice
) -> Float[Tensor, "head weight"] | None:
    """Rates of the weights that the cache holds; asked for only where it holds some: frozen blocks have no rates."""
    if rates is None:
        return None
    whole = rates[projection.layer, projection.block][heads]
    if coordinates is None:
        return whole
    drawn = coordinates.slices[stored_name(projection)]
    num_other = drawn.slice_size // projection.head_dim
    index = (drawn.own * num_other + drawn.other)[heads].flatten(1)
    return whole.gather(1, index.to(whole.device))


def _check_coordinates(records: Sequence[CacheRecord], coordinates: Coordinates | None) -> None:
    """Refuse a cache of other weights.

    Raises:
        CacheError: If there is a record of some.
    """
    expected = None if coordinates is None else coordinates.fingerprint
    for record in records:
        if record.fingerprint != expected:
            kinds = [
                "exact factors" if mark is None else f"gradients at the sampled weights {mark}"
                for mark in (record.fingerprint, expected)
            ]
            raise CacheError(
                f"Cache file {record.path} holds {kinds[0]}, expected {kinds[1]}. Give each run a cache directory of its own."
            )


def _fisher_path(directory: Path, projection: Projection) -> Path:
    return directory / f"{projection.layer:04d}-{projection.block}.safetensors"


def _task_indices(
    records: Sequence[CacheRecord], masks: dict[Path, Bool[Tensor, sample]], tasks: Sequence[str]
) -> Tensor:
    """Task of every sample of the records, -1 for those beyond the budget."""
    indices = []
    for record in records:
        known = torch.tensor([tasks.index(name) if name in tasks else -1 for name in record.samples.tasks])
        indices.append(known.masked_fill(~masks[record.path], -1))
    return torch.cat(indices)


def _layers(projections: Sequence[Projection], model: nn.Module, num_samples: Tensor) -> tuple[Layer, ...]:
    names: dict[int, str] = {}
    blocks: dict[int, dict[Any, BlockInfo]] = {}
    for projection in projections:
        measured = bool(num_samples[:, projection.layer, :, BLOCKS.index(projection.block)].any())
        status: Status = "measured" if measured else "no data"
        if not is_trainable(model.get_submodule(projection.module_name)):
            status = "frozen" if not measured else status
        names[projection.layer] = projection.layer_name
        blocks.setdefault(projection.layer, {})[projection.block] = BlockInfo(
            projection.module_name, projection.num_heads, projection.query_group, status
        )
    return tuple(Layer(names.get(i, f"layer {i}"), blocks.get(i, {})) for i in range(num_layers(projections)))


def _hottest_pairs(
    heatmap: InterferenceHeatmap,
    projections: Sequence[Projection],
    reader: CacheReader,
    masks: dict[Path, Bool[Tensor, sample]],
    fisher_directory: Path,
    damping: float,
    num_hot_cells: int,
    coordinates: Coordinates | None,
) -> list[SamplePair]:
    """The strongest sample pairs of each hot cell in the given projections."""
    hot: dict[tuple[int, str], list[Cell]] = {}
    for a, b in heatmap.task_pairs:
        for cell in heatmap.cells(a, b)[:num_hot_cells]:
            hot.setdefault((cell.layer, cell.block), []).append(cell)
    pairs = []
    for projection in projections:
        cells = hot.get((projection.layer, projection.block), [])
        if not cells:
            continue
        fisher = EmpiricalFisher.load(_fisher_path(fisher_directory, projection), reader.device).pooled()
        for head in sorted({cell.head for cell in cells}):
            own = [cell for cell in cells if cell.head == head]
            weights = _weights(projection, coordinates, slice(head, head + 1))
            each = None if weights is None else weights.to(fisher).flatten(1)
            # A pair is a sum over weights: one that stands for many is divided by less.
            denominator = damped(fisher[head][None], damping, each) / (1 if each is None else each)
            stored = _stored(projection, coordinates)
            ids, matrices = _pair_matrices(own, stored, reader, masks, denominator[0])
            if not matrices:
                continue  # the files were deleted since the cell was scored, which has been warned of
            for cell, matrix in zip(own, matrices, strict=True):
                if cell.task_a == cell.task_b:
                    matrix.fill_diagonal_(-1)
                for flat in matrix.flatten().topk(min(PAIRS_PER_CELL, matrix.numel())).indices.tolist():
                    i, j = divmod(flat, matrix.shape[1])
                    pairs.append(
                        SamplePair(cell.task_a, ids[cell.task_a][i], cell.task_b, ids[cell.task_b][j],
                                   cell.layer, cell.head, cell.block, float(matrix[i, j]))
                    )  # fmt: skip
    return pairs


def _pair_matrices(
    cells: Sequence[Cell],
    projection: Projection,
    reader: CacheReader,
    masks: dict[Path, Bool[Tensor, sample]],
    denominator: Float[Tensor, weight],
) -> tuple[dict[str, list[str]], list[Tensor]]:
    """Identifiers of the samples by task, and for cells of one head the interference of all their pairs.

    It is a sum over weights: as many features of the head at a time as fit into memory.
    """
    head = slice(cells[0].head, cells[0].head + 1)
    tasks = {task for cell in cells for task in (cell.task_a, cell.task_b)}
    denominator = denominator.view(projection.head_dim, -1)
    num_samples = sum(len(record.samples) for record in reader.readable(projection.module_name))
    feature_bytes = num_samples * reader.slice_bytes(projection) // projection.head_dim
    matrices: list[Tensor | None] = [None] * len(cells)
    # The gradients by record and by task, their contributions, and their magnitudes: four of a kind.
    num_features = max(1, HELD_BYTES // (4 * max(1, feature_bytes)))
    for features in torch.arange(projection.head_dim).split(num_features):
        slices: dict[str, list[Tensor]] = {task: [] for task in tasks}
        ids: dict[str, list[str]] = {task: [] for task in tasks}
        for record, part in reader.parts(restricted(projection, head, features)):
            gradients = owned_gradients(part).flatten(1)
            for index, (task, name) in enumerate(zip(record.samples.tasks, record.samples.ids, strict=True)):
                if task in tasks and bool(masks[record.path][index]):
                    slices[task].append(gradients[index])
                    ids[task].append(name)
        if not all(slices.values()):
            return {}, []
        stacked = {task: torch.stack(rows) for task, rows in slices.items()}
        for index, cell in enumerate(cells):
            matrix = sample_pairs(
                stacked[cell.task_a], stacked[cell.task_b], denominator[features].flatten(), damping=0.0
            )
            known = matrices[index]
            matrices[index] = matrix if known is None else known + matrix
    return ids, [matrix for matrix in matrices if matrix is not None]
