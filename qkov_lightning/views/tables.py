"""A heatmap in long form: a row per cell for pandas, nested numbers for ``dvc metrics diff``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkov_lightning.heads.projections import BLOCKS, Block
from qkov_lightning.measure.cells import Cell
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_key, pair_label
from qkov_lightning.scores.scores import HARM, SCORES
from qkov_lightning.store.files import whole_file

COLUMNS = (
    "step", "epoch", "task_a", "task_b", "layer", "layer_name", "head", "block", "score", "value",
    "standard_error", "num_samples_a", "num_samples_b",
)  # fmt: skip
"""Columns of a row."""

Row = tuple[Any, ...]


class SelectionError(ValueError):
    """A heatmap has no such pair, score or step."""


@dataclass(frozen=True)
class Selection:
    """Which part of a heatmap to show.

    Attributes:
        pairs: Ordered task pairs.
        score: Score that is drawn and sorted by.
        block: The only block, or all.
        top: Most cells per pair, or all.
    """

    pairs: tuple[tuple[str, str], ...]
    score: str
    block: Block | None = None
    top: int | None = None

    def cells(self, heatmap: InterferenceHeatmap, a: str, b: str) -> list[Cell]:
        """Cells of a pair, the ones with most interference first; by harm, in the order of the verdict."""
        if self.score == HARM and (a, b) in heatmap.task_pairs:
            cells = list(heatmap.verdict.pair(a, b).cells)
        else:
            cells = heatmap.cells(a, b, self.score)
            cells = cells[::-1] if SCORES[self.score].falling else cells
        return [cell for cell in cells if self.block in {None, cell.block}][: self.top]


def select(
    heatmap: InterferenceHeatmap,
    pair: str | None = None,
    score: str = HARM,
    block: Block | None = None,
    top: int | None = None,
) -> Selection:
    """A checked selection.

    Args:
        heatmap: What to select from.
        pair: ``<task_a>__<task_b>``, the task that is hurt first, as in the names of scalars and figures; all
            pairs of different tasks by default, the worst first.
        score: Which score.
        block: The only block.
        top: Most cells per pair.

    Returns:
        The selection.

    Raises:
        SelectionError: If the heatmap has no such pair or score.
    """
    if score not in heatmap.scores:
        raise SelectionError(f"Unknown score {score!r}; this heatmap has {', '.join(heatmap.scores)}.")
    if pair is None:
        pairs = tuple(one.tasks for one in heatmap.verdict.pairs)
        return Selection(pairs, score, block, top)
    for a in heatmap.tasks:
        for b in heatmap.tasks:
            if pair in {f"{a}__{b}", pair_key(a, b), pair_label(a, b)}:
                return Selection(((a, b),), score, block, top)
    known = ", ".join(pair_key(a, b) for a, b in heatmap.task_pairs)
    raise SelectionError(f"Unknown pair {pair!r}; this heatmap has {known}, and each task with itself.")


def selected_rows(heatmap: InterferenceHeatmap, selection: Selection) -> Iterator[Row]:
    """Rows of the selected cells in the order of ``COLUMNS``, hottest first in each pair.

    Args:
        heatmap: The result.
        selection: Which part.

    Yields:
        A row per cell.
    """
    for a, b in selection.pairs:
        for cell in selection.cells(heatmap, a, b):
            yield _row(heatmap, a, b, cell.layer, cell.head, BLOCKS.index(cell.block), selection.score)


def cell_rows(heatmap: InterferenceHeatmap) -> Iterator[Row]:
    """Every cell that has data, of every ordered task pair (the controls too) and every score.

    Args:
        heatmap: The result.

    Yields:
        Rows in the order of ``COLUMNS``: pair, score, layer, head, block.
    """
    for a in heatmap.tasks:
        for b in heatmap.tasks:
            for score in heatmap.scores:
                for layer, head, block in (~heatmap.values(a, b, score).isnan()).nonzero().tolist():
                    yield _row(heatmap, a, b, layer, head, block, score)


def _row(heatmap: InterferenceHeatmap, a: str, b: str, layer: int, head: int, block: int, score: str) -> Row:
    at = (layer, head, block)
    samples_a, samples_b = (int(heatmap.num_samples[heatmap.tasks.index(task)][at]) for task in (a, b))
    value, error = float(heatmap.values(a, b, score)[at]), float(heatmap.errors(a, b, score)[at])
    return (heatmap.step, heatmap.epoch, a, b, layer, heatmap.layers[layer].name, head, BLOCKS[block], score,
            value, error, samples_a, samples_b)  # fmt: skip


def to_csv(columns: Sequence[str], rows: Iterator[Row] | Sequence[Row]) -> str:
    """CSV text with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def to_json(columns: Sequence[str], rows: Iterator[Row] | Sequence[Row]) -> str:
    """JSON text: a list of objects, null for what is not a number."""
    objects = [
        {name: None if value != value else value for name, value in zip(columns, row, strict=True)}
        for row in rows
    ]
    return json.dumps(objects, ensure_ascii=False, indent=1, allow_nan=False)


def metrics(heatmap: InterferenceHeatmap) -> dict[str, Any]:
    """Numbers to compare between runs, nested by pair, score and block; what has no data is absent.

    Args:
        heatmap: The result.

    Returns:
        ``{"<a>__<b>": {"<score>": {"mean": ..., "max": ..., "min": ..., "block_means": {"Q": ...}}}}``,
        with means over cells that have data.
    """
    result: dict[str, Any] = {}
    for a, b in heatmap.task_pairs:
        pair = result.setdefault(pair_key(a, b), {})
        for score in heatmap.scores:
            values = heatmap.values(a, b, score)
            known = values[~values.isnan()]
            if not known.numel():
                continue
            blocks = {
                block: float(values[..., index].nanmean())
                for index, block in enumerate(BLOCKS)
                if not bool(values[..., index].isnan().all())
            }
            pair[score] = {
                "mean": float(known.mean()),
                "max": float(known.max()),
                "min": float(known.min()),
                "block_means": blocks,
            }
    return result


def write_tables(heatmap: InterferenceHeatmap, directory: Path) -> None:
    """Write ``cells.csv`` and ``metrics.json``, each completely or not at all.

    Args:
        heatmap: The result.
        directory: Where; it is made if needed.

    Raises:
        OSError: If the disk refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("cells.csv", to_csv(COLUMNS, cell_rows(heatmap))),
        ("metrics.json", json.dumps(metrics(heatmap), indent=2, ensure_ascii=False) + "\n"),
    ):
        with whole_file(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
