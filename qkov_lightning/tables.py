"""A heatmap in long form: a row per cell for pandas, nested numbers for ``dvc metrics diff``."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qkov_lightning.heatmap import InterferenceHeatmap, safe_name
from qkov_lightning.projections import BLOCKS

COLUMNS = (
    "step", "epoch", "task_a", "task_b", "layer", "layer_name", "head", "block", "score", "value",
    "standard_error", "num_samples_a", "num_samples_b",
)  # fmt: skip
"""Columns of a row."""

Row = tuple[Any, ...]


def cell_rows(heatmap: InterferenceHeatmap) -> Iterator[Row]:
    """Every cell that has data, of every ordered task pair (the controls too) and every score.

    Args:
        heatmap: The result.

    Yields:
        Rows in the order of ``COLUMNS``: pair, score, layer, head, block.
    """
    for i, a in enumerate(heatmap.tasks):
        for j, b in enumerate(heatmap.tasks):
            for score in heatmap.scores:
                values, errors = heatmap.values(a, b, score), heatmap.errors(a, b, score)
                for layer, head, block in (~values.isnan()).nonzero().tolist():
                    at = (layer, head, block)
                    yield (
                        heatmap.step, heatmap.epoch, a, b, layer, heatmap.layers[layer].name, head, BLOCKS[block],
                        score, float(values[at]), float(errors[at]), int(heatmap.num_samples[i][at]),
                        int(heatmap.num_samples[j][at]),
                    )  # fmt: skip


def to_csv(columns: Sequence[str], rows: Iterator[Row] | Sequence[Row]) -> str:
    """CSV text with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


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
        pair = result.setdefault(f"{safe_name(a)}__{safe_name(b)}", {})
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
        temporary = directory / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(directory / name)
