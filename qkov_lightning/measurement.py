"""From the cache to a heatmap: one streamed pass, one projection in memory at a time."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qkov_lightning.cache import CacheError, CacheRecord, GradientCache
from qkov_lightning.capture import is_trainable
from qkov_lightning.fisher import EmpiricalFisher
from qkov_lightning.gradients import head_gradients, select_samples
from qkov_lightning.heatmap import BlockInfo, InterferenceHeatmap, Layer, SamplePair, Status
from qkov_lightning.interference import SCORES, STEP_SIZE, UpdateDirection, sample_pairs
from qkov_lightning.metric import HeadInterference
from qkov_lightning.projections import BLOCKS, Block, Projection, num_heads, num_layers

CHUNK_BYTES = 32 * 2**20
"""Per-sample gradients made at once: small enough for the processor's caches."""

KEEP_BYTES = 512 * 2**20
"""Gradients of one projection are kept between passes up to this size, and made again beyond it."""

PAIRS_PER_CELL = 3

MAX_CELLS = 20_000_000
"""Values of one score in a heatmap: 100 tasks at 28 layers x 16 heads."""

Rates = Mapping[tuple[int, Block], Float[Tensor, "head weight"]]
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


class _ProjectionGradients:
    """Per-sample gradients of one projection over many records: chunks of samples, readable many times."""

    def __init__(self, projection: Projection, records: Sequence[CacheRecord], device: torch.device) -> None:
        self._projection = projection
        self._device = device
        self.records = [record for record in records if self._is_readable(record)]
        self._kept: list[tuple[CacheRecord, slice, Tensor]] | None = None

    def _is_readable(self, record: CacheRecord) -> bool:
        if self._projection.module_name not in record.modules:
            return False
        try:
            record.read(self._projection.module_name)
        except CacheError as error:
            warnings.warn(f"{error} Its samples are left out.", stacklevel=5)
            return False
        return True

    def __iter__(self) -> Iterator[Tensor]:
        return (chunk for _, _, chunk in self.chunks())

    def chunks(self) -> Iterator[tuple[CacheRecord, slice, Float[Tensor, "sample head weight"]]]:
        """Chunks with the record and the samples that they hold, oldest first."""
        if self._kept is not None:
            yield from self._kept
            return
        made: list[tuple[CacheRecord, slice, Tensor]] = []
        num_bytes = 0
        for record in self.records:
            source = record.read(self._projection.module_name)
            size, start = 1, 0
            while start < len(record.samples):
                samples = slice(start, min(start + size, len(record.samples)))
                part = select_samples(source, samples.start, samples.stop)
                chunk = head_gradients(part, self._projection, record.scales[samples]).to(self._device)
                start = samples.stop
                size = max(1, CHUNK_BYTES // max(1, chunk[0].nbytes))
                num_bytes += chunk.nbytes
                if num_bytes <= KEEP_BYTES:
                    made.append((record, samples, chunk))
                yield record, samples, chunk
        if num_bytes <= KEEP_BYTES:
            self._kept = made


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
        CacheError: If the Fisher cannot be written or read, or there are too many tasks for a heatmap.
    """
    selected = cache.records()
    if not selected:
        return None
    records = [record for record, _ in selected]
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
    try:
        fisher_directory.mkdir(parents=True, exist_ok=True)
        for projection in own:
            gradients = _ProjectionGradients(projection, records, torch.device(device))
            fisher = _fold(
                projection, gradients, fisher_directory, previous_fisher, folded_until, fisher_decay
            )
            if gradients.records and fisher.tasks:
                indices = _task_indices(gradients.records, masks, tasks)
                metric.update(
                    gradients,
                    indices,
                    fisher.pooled().to(device),
                    layer=projection.layer,
                    block=projection.block,
                    rates=None if rates is None else rates[projection.layer, projection.block].to(device),
                )
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
        pairs = _hottest_pairs(heatmap, own, records, masks, fisher_directory, damping, num_hot_cells, device)
    except CacheError as error:
        failure = error
    agree(failure)
    pairs = gather(pairs)
    pairs.sort(key=lambda pair: -pair.value)
    return replace(heatmap, pairs=tuple(pairs))


def _fisher_path(directory: Path, projection: Projection) -> Path:
    return directory / f"{projection.layer:04d}-{projection.block}.safetensors"


def _fold(
    projection: Projection,
    gradients: _ProjectionGradients,
    directory: Path,
    previous: Path | None,
    folded_until: int,
    decay: float,
) -> EmpiricalFisher:
    """The Fisher with all steps from ``folded_until`` on folded in, and written."""
    path = _fisher_path(directory, projection)
    known = previous is not None and _fisher_path(previous, projection).exists()
    fisher = (
        EmpiricalFisher.load(_fisher_path(previous, projection))
        if previous and known
        else EmpiricalFisher(decay)
    )
    new = (item for item in gradients.chunks() if item[0].step >= folded_until)
    for _, chunks in itertools.groupby(new, key=lambda item: item[0].step):
        totals: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()
        for record, samples, chunk in chunks:
            names = record.samples.tasks[samples]
            for task in dict.fromkeys(names):
                rows = torch.tensor([name == task for name in names], device=chunk.device)
                total = chunk[rows].square().sum(dim=0).cpu()
                totals[task] = totals[task] + total if task in totals else total
                counts[task] += int(rows.sum())
        fisher.fold({task: total / counts[task] for task, total in totals.items()})
    if fisher.tasks:
        fisher.save(path)
    return fisher


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
    records: Sequence[CacheRecord],
    masks: dict[Path, Bool[Tensor, sample]],
    fisher_directory: Path,
    damping: float,
    num_hot_cells: int,
    device: torch.device | str,
) -> list[SamplePair]:
    """The strongest sample pairs of each hot cell in the given projections."""
    hot: dict[tuple[int, str], list[Any]] = {}
    for a, b in heatmap.task_pairs:
        for cell in heatmap.cells(a, b)[:num_hot_cells]:
            hot.setdefault((cell.layer, cell.block), []).append(cell)
    pairs = []
    for projection in projections:
        cells = hot.get((projection.layer, projection.block), [])
        if not cells:
            continue
        gradients = _ProjectionGradients(projection, records, torch.device(device))
        fisher = EmpiricalFisher.load(_fisher_path(fisher_directory, projection)).pooled().to(device)
        for cell in cells:
            slices: dict[str, list[Tensor]] = {cell.task_a: [], cell.task_b: []}
            ids: dict[str, list[str]] = {cell.task_a: [], cell.task_b: []}
            for record, samples, chunk in gradients.chunks():
                for row, index in enumerate(range(samples.start, samples.stop)):
                    task = record.samples.tasks[index]
                    if task in slices and bool(masks[record.path][index]):
                        slices[task].append(chunk[row, cell.head])
                        ids[task].append(record.samples.ids[index])
            if not all(slices.values()):
                continue  # the files were deleted since the cell was scored, which has been warned of
            matrix = sample_pairs(
                torch.stack(slices[cell.task_a]), torch.stack(slices[cell.task_b]), fisher[cell.head], damping
            )
            if cell.task_a == cell.task_b:
                matrix.fill_diagonal_(-1)
            for flat in matrix.flatten().topk(min(PAIRS_PER_CELL, matrix.numel())).indices.tolist():
                i, j = divmod(flat, matrix.shape[1])
                pairs.append(
                    SamplePair(cell.task_a, ids[cell.task_a][i], cell.task_b, ids[cell.task_b][j],
                               cell.layer, cell.head, cell.block, float(matrix[i, j]))
                )  # fmt: skip
    return pairs
