"""Heatmaps of one or several runs as one HTML page that opens without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from qkov_lightning.measure.cells import printable
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.store.files import whole_file
from qkov_lightning.views.figures import NOISE, num_heads_of, score_scale
from qkov_lightning.views.interactive import colour_axis, facet_data, interactive_heatmap, require_plotly
from qkov_lightning.views.tables import SelectionError

MAX_NUMBERS = 3_000_000
"""Numbers in one page, about 25 MB: beyond, snapshots are left out evenly, and the page says so."""


@dataclass(frozen=True, eq=False)
class RunHistory:
    """The heatmaps of one run.

    Attributes:
        name: What the page calls the run.
        heatmaps: Oldest first, at least one.
    """

    name: str
    heatmaps: tuple[InterferenceHeatmap, ...]


def find_latest(run: Path) -> Path:
    """The heatmap file of a run.

    Args:
        run: A heatmap file, or a folder with a ``latest.json`` somewhere below (the newest is taken).

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is none.
    """
    if run.is_file():
        return run
    found = sorted(run.rglob("latest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"No heatmap at {run}: expected a heatmap file, or a folder with a `latest.json` below."
        )
    return found[-1]


def find_step(run: Path, step: int) -> Path:
    """The snapshot of a run at a step.

    Args:
        run: As for ``find_latest``.
        step: Optimiser steps done.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is no heatmap.
        SelectionError: If there is none of that step.
    """
    folder = find_latest(run).parent / "snapshots"
    path = folder / f"step_{step:08d}.json"
    if not path.is_file():
        steps = ", ".join(
            str(int(found.stem.removeprefix("step_"))) for found in sorted(folder.glob("step_*.json"))
        )
        raise SelectionError(f"No snapshot of step {step} in {folder}; there are {steps or 'none'}.")
    return path


def load_history(run: Path) -> RunHistory:
    """Every snapshot of a run; a single file is a history of one.

    Args:
        run: As for ``find_latest``.

    Returns:
        The history.

    Raises:
        FileNotFoundError: If there is no heatmap.
        HeatmapError: If a file is no heatmap.
    """
    latest = find_latest(run)
    snapshots = sorted((latest.parent / "snapshots").glob("step_*.json")) if latest != run else []
    heatmaps = [InterferenceHeatmap.load(path) for path in snapshots or [latest]]
    return RunHistory(str(run), tuple(heatmaps))


def write_report(histories: Sequence[RunHistory], path: Path) -> None:
    """Write the page, completely or not at all.

    Args:
        histories: The runs to choose from, at least one.
        path: The HTML file.

    Raises:
        ModuleNotFoundError: If plotly is not installed.
        OSError: If the disk refuses.
    """
    require_plotly()
    first = histories[0].heatmaps[-1]
    figure = interactive_heatmap(first, *first.task_pairs[0])
    # Plotly's own export, with its script inside: the page asks for nothing.
    chart = figure.to_html(include_plotlyjs=True, full_html=False, div_id="heatmap")
    share = MAX_NUMBERS // len(histories)
    data = {"noise": NOISE, "runs": [_run(history, share) for history in histories]}
    # "<" could end the script element.
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    template = files("qkov_lightning.views").joinpath("report.html").read_text("utf-8")
    before, between, after = _split(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(before + chart + between + text + after, encoding="utf-8")


def _split(template: str) -> tuple[str, str, str]:
    before, rest = template.split("{{FIGURE}}")
    between, after = rest.split("{{DATA}}")
    return before, between, after


def _run(history: RunHistory, max_numbers: int) -> dict[str, Any]:
    """One run in builtins: what the page's script reads."""
    last = history.heatmaps[-1]
    # A run that was restarted with other tasks or another model is shown from there on.
    same = [h for h in history.heatmaps if _shape(h) == _shape(last)]
    per_frame = 2 * sum(num_heads_of(last)) * last.num_layers * len(last.task_pairs) * len(last.scores)
    kept = _thinned(same, max(2, max_numbers // per_frame))
    scales = {score: score_scale(last, score) for score in last.scores}
    heads = num_heads_of(last)
    facts = {
        "heatmaps": f"{len(kept)} of {len(history.heatmaps)}",
        "tasks": ", ".join(printable(task) for task in last.tasks),
        "samples per task": ", ".join(f"{printable(t)} {n}" for t, n in last.samples_per_task.items()),
        "attention layers": str(last.num_layers),
        "heads (Q, K, V, O)": ", ".join(map(str, heads)),
        **{name.replace("_", " "): str(value) for name, value in last.notes.items()},
    }
    return {
        "name": history.name,
        "pairs": [[printable(a), printable(b)] for a, b in last.task_pairs],
        "scores": list(last.scores),
        "scales": {
            score: {"meaning": scale.meaning, "axis": colour_axis(scale), "falling": SCORES[score].falling}
            for score, scale in scales.items()
        },
        "layers": [layer.name for layer in last.layers],
        "layout": _axes(heads, last.num_layers),
        "height": max(380, min(1400, 180 + 22 * last.num_layers)),
        "facts": facts,
        "frames": [_frame(heatmap) for heatmap in kept],
    }


def _axes(heads: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Axes of one run: runs may differ in heads and layers."""
    axes: dict[str, Any] = {}
    start, room = 0.0, 0.94 / sum(heads)
    for index, count in enumerate(heads):
        suffix = "" if index == 0 else str(index + 1)
        axes[f"xaxis{suffix}"] = {
            "range": [-0.5, count - 0.5],
            "domain": [start, start + room * count],
            "dtick": max(1, count // 8),
        }
        axes[f"yaxis{suffix}"] = {"range": [num_layers - 0.5, -0.5], "dtick": max(1, num_layers // 14)}
        start += room * count + 0.02
    return axes


def _frame(heatmap: InterferenceHeatmap) -> dict[str, Any]:
    scales = {score: score_scale(heatmap, score) for score in heatmap.scores}
    return {
        "step": heatmap.step,
        "epoch": heatmap.epoch,
        # As in the figures: a score in units is drawn on the scale of its own heatmap, since it falls with
        # the gradients.
        "ranges": {score: [scale.low, scale.high] for score, scale in scales.items()},
        "views": [
            {score: facet_data(heatmap, a, b, score) for score in heatmap.scores}
            for a, b in heatmap.task_pairs
        ],
        "pairs": [
            [printable(pair.task_a), pair.sample_a, printable(pair.task_b), pair.sample_b,
             f"L{pair.layer}.H{pair.head}.{pair.block}", pair.value]
            for pair in heatmap.pairs
        ],
    }  # fmt: skip


def _thinned(heatmaps: Sequence[InterferenceHeatmap], most: int) -> list[InterferenceHeatmap]:
    """Evenly spread, the first and the last kept."""
    if len(heatmaps) <= most:
        return list(heatmaps)
    return [heatmaps[round(i * (len(heatmaps) - 1) / (most - 1))] for i in range(most)]


def _shape(heatmap: InterferenceHeatmap) -> tuple[Any, ...]:
    """What two heatmaps must share to be frames of one picture."""
    heads = [{block: info.num_heads for block, info in layer.blocks.items()} for layer in heatmap.layers]
    return heatmap.tasks, tuple(heatmap.scores), heads
