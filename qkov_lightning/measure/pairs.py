"""The pairs of samples that interfere most in the hottest cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qkov_lightning.capture.gradients import owned_gradients
from qkov_lightning.heads.projections import Projection
from qkov_lightning.measure.cells import Cell, SamplePair
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.fisher import EmpiricalFisher
from qkov_lightning.scores.functional import sample_pairs
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.scores.updates import damped
from qkov_lightning.store.stored import StoredGradients
from qkov_lightning.store.streaming import HELD_BYTES, CacheReader, restricted

PAIRS_PER_CELL = 3


def hottest_pairs(
    heatmap: InterferenceHeatmap,
    projections: Sequence[Projection],
    stored: StoredGradients,
    reader: CacheReader,
    masks: dict[Path, Bool[Tensor, sample]],
    settings: ScoreSettings,
) -> list[SamplePair]:
    """The strongest sample pairs of each hot cell in the given projections.

    Args:
        heatmap: Tells which cells are hot.
        projections: Where to search.
        stored: What was measured, with the Fisher that was written.
        reader: Reads it.
        masks: Samples within the budget, by record.
        settings: What the scores depend on.

    Returns:
        Three pairs per cell.

    Raises:
        CacheError: If the Fisher, or a record that was readable before, cannot be read.
    """
    hot: dict[tuple[int, str], list[Cell]] = {}
    for a, b in heatmap.task_pairs:
        for cell in heatmap.cells(a, b)[: settings.num_hot_cells]:
            hot.setdefault((cell.layer, cell.block), []).append(cell)
    pairs = []
    for projection in projections:
        cells = hot.get((projection.layer, projection.block), [])
        if not cells:
            continue
        fisher = EmpiricalFisher.load(stored.fisher_path(projection), reader.device).pooled()
        for head in sorted({cell.head for cell in cells}):
            own = [cell for cell in cells if cell.head == head]
            weights = stored.weights(projection, slice(head, head + 1))
            each = None if weights is None else weights.to(fisher).flatten(1)
            # A pair is a sum over weights: one that stands for many is divided by less.
            denominator = damped(fisher[head][None], settings.damping, each) / (1 if each is None else each)
            ids, matrices = _pair_matrices(own, stored.as_kept(projection), reader, masks, denominator[0])
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
