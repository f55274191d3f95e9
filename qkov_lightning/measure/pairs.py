"""The pairs of samples that hurt most, in the cells that the verdict names first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qkov_lightning.capture.gradients import owned_gradients
from qkov_lightning.heads.projections import Block, Projection
from qkov_lightning.measure.cells import Cell, SamplePair
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.fisher import EmpiricalFisher
from qkov_lightning.scores.functional import pair_harm, sample_pairs
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.scores.updates import damped, update_rate
from qkov_lightning.store.stored import StoredGradients
from qkov_lightning.store.streaming import HELD_BYTES, CacheReader, restricted

PAIRS_PER_CELL = 3


def hot_cells(heatmap: InterferenceHeatmap, num_cells: int) -> dict[tuple[int, Block], list[Cell]]:
    """The cells that the verdict names first for each pair of tasks, by layer and block."""
    hot: dict[tuple[int, Block], list[Cell]] = {}
    for pair in heatmap.verdict.pairs:
        for cell in pair.cells[:num_cells]:
            hot.setdefault((cell.layer, cell.block), []).append(cell)
    return hot


def worst_pairs(
    heatmap: InterferenceHeatmap,
    projections: Sequence[Projection],
    stored: StoredGradients,
    reader: CacheReader,
    masks: dict[Path, Bool[Tensor, sample]],
    settings: ScoreSettings,
    rates: Mapping[tuple[int, Block], Float[Tensor, "_ _"]] | None = None,
) -> list[SamplePair]:
    """The sample pairs of the most harm in the cells that the verdict names first.

    Args:
        heatmap: Has the verdict.
        projections: Where to search.
        stored: What was measured, with the Fisher that was written.
        reader: Reads it.
        masks: Samples within the budget, by record.
        settings: What the scores depend on.
        rates: What the optimiser multiplies a gradient with, instead of the direction of the settings.

    Returns:
        Three pairs per cell.

    Raises:
        CacheError: If the Fisher, or a record that was readable before, cannot be read.
    """
    hot = hot_cells(heatmap, settings.num_hot_cells)
    pairs: list[SamplePair] = []
    for projection in projections:
        cells = hot.get((projection.layer, projection.block), [])
        if not cells:
            continue
        fisher = EmpiricalFisher.load(stored.fisher_path(projection), reader.device).pooled()
        for head in sorted({cell.head for cell in cells}):
            own = [cell for cell in cells if cell.head == head]
            heads = slice(head, head + 1)
            weights = stored.weights(projection, heads)
            each = torch.ones_like(fisher[head]) if weights is None else weights.to(fisher).flatten()
            rate = None if rates is None else rates[projection.layer, projection.block]
            found = _HeadPairs(
                stored.as_kept(projection),
                head,
                fisher[head],
                each,
                None if rate is None else stored.kept_of(rate, projection, heads)[0].to(fisher),
                settings,
            )
            tasks = {task for cell in own for task in (cell.task_a, cell.task_b)}
            blocks = found.blocks(reader, masks, tasks)
            for cell in own:
                pairs += found.of(cell, blocks)
    return pairs


def pairs_of_head(
    head: Projection,
    cells: Sequence[Cell],
    gradients: Float[Tensor, "sample weight"],
    tasks: Sequence[str],
    ids: Sequence[str],
    texts: Sequence[str | None],
    settings: ScoreSettings,
) -> list[SamplePair]:
    """The sample pairs of the most harm in the cells of one head, from gradients in memory.

    Args:
        head: The projection, with this head alone.
        cells: Its cells.
        gradients: Of all samples that the Fisher is the plain mean of, each task with the same weight.
        tasks: Task of each sample.
        ids: Identifier of each sample.
        texts: Text of each sample, where texts are kept.
        settings: What the scores depend on.
    """
    rows = {task: [i for i, other in enumerate(tasks) if other == task] for task in sorted(set(tasks))}
    own = {task: gradients[rows[task]] for task in rows}
    fisher = torch.stack([of.square().mean(dim=0) for of in own.values()]).mean(dim=0)
    block = _Block(
        torch.arange(head.head_dim),
        own,
        {task: [ids[i] for i in rows[task]] for task in rows},
        {task: [texts[i] for i in rows[task]] for task in rows},
    )
    found = _HeadPairs(head, 0, fisher, torch.ones_like(fisher), None, settings)
    return [pair for cell in cells for pair in found.of(cell, lambda: iter([block]))]


@dataclass(frozen=True, eq=False)
class _HeadPairs:
    """Pairs of samples in one head of one projection.

    Attributes:
        projection: The projection, as far as it was stored.
        head: The head.
        fisher: Pooled Fisher of its weights.
        each: How many weights each one stands for.
        rate: What the optimiser multiplies a gradient with, if that is known.
        settings: What the scores depend on.
    """

    projection: Projection
    head: int
    fisher: Float[Tensor, weight]
    each: Float[Tensor, weight]
    rate: Float[Tensor, weight] | None
    settings: ScoreSettings

    def blocks(
        self, reader: CacheReader, masks: dict[Path, Bool[Tensor, sample]], tasks: set[str]
    ) -> Callable[[], Iterator[_Block]]:
        """The gradients of some tasks, in blocks of weights: read once where all of them fit into memory."""
        parts = self._parts(reader)
        if len(parts) == 1:
            block = self._load(reader, masks, tasks, parts[0])
            return lambda: iter([block])
        return lambda: (self._load(reader, masks, tasks, features) for features in parts)

    def of(self, cell: Cell, blocks_of: Callable[[], Iterator[_Block]]) -> Iterator[SamplePair]:
        """The pairs of most harm in a cell."""
        a, b = cell.task_a, cell.task_b
        # The damping of the rates is a share of a mean over the whole slice.
        total, squares = 0.0, []
        for block in blocks_of():
            if not all(len(block.gradients[task]) for task in (a, b)):
                return  # the files were deleted since the cell was scored, which has been warned of
            squares.append(block.gradients[b].square().mean(dim=0))
            total += float((squares[-1] * self._own(self.each, block)).sum())
        epsilon = torch.full((1,), self.settings.damping * total / float(self.each.sum()))
        denominator = damped(self.fisher[None], self.settings.damping, self.each[None])[0] / self.each
        harm, interference = torch.zeros(()), torch.zeros(())
        for block, square in zip(blocks_of(), squares, strict=True):
            update = self.settings.update if self.rate is None else self._own(self.rate, block)[None]
            rate = update_rate(update, square[None], epsilon.to(square)[None])[0] * self._own(
                self.each, block
            )
            of_a, of_b = block.gradients[a], block.gradients[b]
            harm = harm + pair_harm(of_a, of_b, rate, self.settings.step_size).cpu()
            own = self._own(denominator, block)
            interference = interference + sample_pairs(of_a, of_b, own, damping=0.0).cpu()
        if a == b:
            harm.fill_diagonal_(-torch.inf)
        for flat in harm.flatten().topk(min(PAIRS_PER_CELL, harm.numel())).indices.tolist():
            i, j = divmod(flat, harm.shape[1])
            if harm[i, j] > 0:
                yield SamplePair(
                    a, block.ids[a][i], b, block.ids[b][j], cell.layer, cell.head, cell.block,
                    float(interference[i, j]), float(harm[i, j]), block.texts[a][i], block.texts[b][j],
                )  # fmt: skip

    def _parts(self, reader: CacheReader) -> list[Tensor]:
        """As many features of the head at a time as fit into memory."""
        num_samples = sum(len(record.samples) for record in reader.readable(self.projection.module_name))
        feature_bytes = num_samples * reader.slice_bytes(self.projection) // self.projection.head_dim
        # The gradients by record and by task, their contributions, and their magnitudes: four of a kind.
        count = max(1, HELD_BYTES // (4 * max(1, feature_bytes)))
        return list(torch.arange(self.projection.head_dim).split(count))

    def _own(self, values: Float[Tensor, weight], block: _Block) -> Float[Tensor, own]:
        return values.view(self.projection.head_dim, -1)[block.features].flatten()

    def _load(
        self,
        reader: CacheReader,
        masks: dict[Path, Bool[Tensor, sample]],
        tasks: set[str],
        features: Tensor,
    ) -> _Block:
        rows: dict[str, list[Tensor]] = {task: [] for task in tasks}
        ids: dict[str, list[str]] = {task: [] for task in tasks}
        texts: dict[str, list[str | None]] = {task: [] for task in tasks}
        head = slice(self.head, self.head + 1)
        for record, part in reader.parts(restricted(self.projection, head, features)):
            gradients = owned_gradients(part).flatten(1)
            for index, task in enumerate(record.samples.tasks):
                if task in tasks and bool(masks[record.path][index]):
                    rows[task].append(gradients[index])
                    ids[task].append(record.samples.ids[index])
                    texts[task].append(record.samples.texts[index] if record.samples.texts else None)
        stacked = {task: torch.stack(own) if own else torch.empty(0, 0) for task, own in rows.items()}
        return _Block(features, stacked, ids, texts)


@dataclass(frozen=True, eq=False)
class _Block:
    """Some weights of a head, for the samples of some tasks."""

    features: Tensor
    gradients: dict[str, Float[Tensor, "sample own"]]
    ids: dict[str, list[str]]
    texts: dict[str, list[str | None]]
