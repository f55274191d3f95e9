"""Heatmaps of one or several runs as one HTML page that opens without a network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qkov_lightning.capture.samples import MAX_TEXT
from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.cells import SamplePair
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label, printable, readable
from qkov_lightning.scores.scores import HARM, SCORES
from qkov_lightning.store.files import whole_file
from qkov_lightning.views.answer import (
    direction,
    headline,
    next_steps,
    plus_minus,
    predicted_rise,
    roles,
    sufficiency,
    verb,
)
from qkov_lightning.views.facets import Scale
from qkov_lightning.views.figures import num_heads_of, score_scale
from qkov_lightning.views.interactive import colour_steps, facet_data, require_plotly
from qkov_lightning.views.marks import meaning_of_marks
from qkov_lightning.views.runs import RunHistory
from qkov_lightning.views.terminal import sample_names

MAX_NUMBERS = 3_000_000
"""Numbers in one page, about 25 MB: beyond, snapshots are left out evenly, and the page says so."""

MAX_WORST = 8


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
    from plotly.offline import get_plotlyjs

    share = MAX_NUMBERS // len(histories)
    data = {
        "harm": HARM,
        "rising": colour_steps(Scale("RdBu_r", -1.0, 1.0, "")),
        "falling": colour_steps(Scale("RdBu", -1.0, 1.0, "")),
        "runs": [_run(history, share) for history in histories],
    }
    # "<" could end the script element.
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    page = files("qkov_lightning.views").joinpath("report.html").read_text("utf-8")
    before, rest = page.split("{{PLOTLY}}")
    between, after = rest.split("{{DATA}}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(before + get_plotlyjs() + between + text + after, encoding="utf-8")


def _run(history: RunHistory, max_numbers: int) -> dict[str, Any]:
    """One run in builtins: what the page's script reads."""
    last = history.heatmaps[-1]
    # A run that was restarted with other tasks or another model is shown from there on.
    same = [h for h in history.heatmaps if _shape(h) == _shape(last)]
    num_views = len(last.task_pairs) + len(last.tasks)
    per_frame = 2 * sum(num_heads_of(last)) * last.num_layers * num_views * len(last.scores)
    kept = _thinned(same, max(2, max_numbers // per_frame))
    heads = num_heads_of(last)
    # The same order in every frame: that of the last verdict.
    pairs = [pair.tasks for pair in last.verdict.pairs]
    scores = last.shown_scores
    samples = ", ".join(f"{readable(task)} {count}" for task, count in last.samples_per_task.items())
    facts = {
        "heatmaps": f"{len(kept)} of {len(history.heatmaps)}",
        "tasks": printable(", ".join(map(readable, last.tasks))),
        "samples per task": printable(samples),
        "attention layers": str(last.num_layers),
        "heads (Q, K, V, O)": ", ".join(map(str, heads)),
        **{name.replace("_", " "): str(value) for name, value in last.notes.items()},
    }
    return {
        "name": history.name,
        "tasks": [printable(readable(task)) for task in last.tasks],
        "pairs": [
            {"a": printable(readable(a)), "b": printable(readable(b)), "label": printable(pair_label(a, b))}
            for a, b in pairs
        ],
        "scores": scores,
        "scales": {
            score: {
                "meaning": SCORES[score].meaning,
                "colours": colour_steps(score_scale(last, score)),
                "falling": SCORES[score].falling,
                "marks": meaning_of_marks(score),
            }
            for score in scores
        },
        "layers": [layer.name for layer in last.layers],
        "heads": heads,
        "facts": facts,
        "frames": [_frame(heatmap, pairs, scores, history.name) for heatmap in kept],
    }


def _frame(
    heatmap: InterferenceHeatmap, pairs: Sequence[tuple[str, str]], scores: Sequence[str], name: str
) -> dict[str, Any]:
    scales = {score: score_scale(heatmap, score) for score in scores}
    return {
        "step": heatmap.step,
        "epoch": heatmap.epoch,
        "answer": _answer(heatmap, pairs, name),
        "order": [[cell.name for cell in heatmap.verdict.pair(a, b).cells] for a, b in pairs],
        # As in the figures: a score in units is drawn on the scale of its own heatmap, since it falls with
        # the gradients.
        "ranges": {score: [scale.low, scale.high] for score, scale in scales.items()},
        "views": [{score: facet_data(heatmap, a, b, score) for score in scores} for a, b in pairs],
        "controls": [
            {score: _bare(facet_data(heatmap, task, task, score)) for score in scores}
            for task in heatmap.tasks
        ],
        "pairs": [_sample_pair(pair, pairs) for pair in heatmap.pairs],
    }


def _answer(heatmap: InterferenceHeatmap, pairs: Sequence[tuple[str, str]], name: str) -> dict[str, Any]:
    verdict = heatmap.verdict
    cells = []
    for cell in verdict.worst[:MAX_WORST]:
        pair = verdict.pair(cell.task_a, cell.task_b)
        does = verb(cell, pair)
        share = f"hurts, {pair.share(cell):.0%}" if does == "hurts" else does
        cells.append({
            "name": cell.name, "pair": pairs.index((cell.task_a, cell.task_b)), "layer": cell.layer,
            "head": cell.head, "block": BLOCKS.index(cell.block), "verb": does, "what": share,
            "value": plus_minus(cell.value, cell.standard_error, signed=True),
        })  # fmt: skip
    judged = [verdict.pair(a, b) for a, b in pairs]
    return {
        "headline": headline(verdict),
        "roles": roles(verdict),
        "sufficiency": sufficiency(verdict),
        "next": [
            list(step) for step in next_steps(heatmap, shlex.quote(name)) if "qkov report" not in step[1]
        ],
        "sure": bool(verdict.harmful),
        "pairs": [
            {
                "rise": predicted_rise(pair),
                "clear": direction(pair),
                "hurt": len(pair.harmful),
                "help": len(pair.helpful),
                "cells": pair.num_cells,
            }
            for pair in judged
        ],
        "worst": cells,
    }


def _sample_pair(pair: SamplePair, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    a, b = map(printable, sample_names(pair, MAX_TEXT))
    does = "is moved" if pair.harm is None else "is hurt" if pair.harm > 0 else "is helped"
    where = pairs.index((pair.task_a, pair.task_b)) if (pair.task_a, pair.task_b) in pairs else -1
    return {
        "pair": where,
        "a": a,
        "b": b,
        "verb": does,
        "name": pair.name,
        "harm": pair.harm,
        "value": pair.value,
    }


def _bare(facets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"z": facet["z"], "error": facet["error"]} for facet in facets]


def _thinned(heatmaps: Sequence[InterferenceHeatmap], most: int) -> list[InterferenceHeatmap]:
    """Evenly spread, the first and the last kept."""
    if len(heatmaps) <= most:
        return list(heatmaps)
    return [heatmaps[round(i * (len(heatmaps) - 1) / (most - 1))] for i in range(most)]


def _shape(heatmap: InterferenceHeatmap) -> tuple[Any, ...]:
    """What two heatmaps must share to be frames of one picture."""
    heads = [{block: info.num_heads for block, info in layer.blocks.items()} for layer in heatmap.layers]
    return heatmap.tasks, tuple(heatmap.scores), heads
