"""A heatmap as JSON: versioned, readable by anything, and back to exactly the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.cells import BlockInfo, Layer, SamplePair
from qkov_lightning.scores.scores import HARM, SCORES

SCHEMA_VERSION = 2


class HeatmapError(ValueError):
    """A file is no heatmap, or one of another schema."""


def encode(fields: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]) -> str:
    """JSON in which NaN is null.

    Args:
        fields: Those of the heatmap.
        summaries: One per task pair, for readers that want no more.
    """
    data = {
        "schema": SCHEMA_VERSION,
        "step": fields["step"],
        "epoch": fields["epoch"],
        "tasks": fields["tasks"],
        "blocks": BLOCKS,
        "layers": [
            {
                "name": layer.name,
                "placed": layer.placed,
                "blocks": {block: vars(info) for block, info in layer.blocks.items()},
            }
            for layer in fields["layers"]
        ],
        "num_samples": fields["num_samples"].long().tolist(),
        "scores": {name: _to_nested(values) for name, values in fields["scores"].items()},
        "standard_errors": {name: _to_nested(values) for name, values in fields["standard_errors"].items()},
        "pairs": [vars(pair) for pair in fields["pairs"]],
        "notes": dict(fields["notes"]),
        "replicates": {name: _to_nested(values) for name, values in fields["replicates"].items()},
        "summaries": summaries,
    }
    return json.dumps(data, allow_nan=False, ensure_ascii=False)


def decode(text: str) -> dict[str, Any]:
    """The fields of a heatmap that ``encode`` wrote.

    Raises:
        HeatmapError: If the text is no heatmap, or one of another schema.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise HeatmapError(f"not JSON: {error}") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA_VERSION:
        raise HeatmapError(
            f"heatmap schema {found!r}, expected {SCHEMA_VERSION}: another version measured it, in another way. Measure it "
            "again with this one (a baseline: `qkov probe`, then `qkov baseline update`)."
        )
    unknown = sorted(set(data.get("scores", ())) - set(SCORES))
    if unknown:
        raise HeatmapError(
            f"unknown score {', '.join(map(repr, unknown))}; this version knows {', '.join(SCORES)}. Read the file with "
            "the version that wrote it."
        )
    try:
        fields: dict[str, Any] = {
            "tasks": tuple(data["tasks"]),
            "layers": tuple(
                Layer(
                    entry["name"],
                    {block: _block(info) for block, info in entry["blocks"].items()},
                    entry.get("placed", "by name"),
                )
                for entry in data["layers"]
            ),
            "scores": {name: _from_nested(values) for name, values in data["scores"].items()},
            "standard_errors": {
                name: _from_nested(values) for name, values in data["standard_errors"].items()
            },
            "num_samples": torch.tensor(data["num_samples"], dtype=torch.float64),
            "step": int(data["step"]),
            "epoch": int(data["epoch"]),
            "pairs": tuple(SamplePair(**pair) for pair in data["pairs"]),
            "notes": dict(data["notes"]),
            "replicates": {name: _from_nested(v) for name, v in data.get("replicates", {}).items()},
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HeatmapError(f"not an interference heatmap: {type(error).__name__}: {error}") from error
    if HARM not in fields["scores"]:
        raise HeatmapError(
            f"no {HARM!r} in it ({', '.join(fields['scores'])}), which says how much a task is hurt: measure it again."
        )
    _check_shapes(fields)
    return fields


def _block(info: Mapping[str, Any]) -> BlockInfo:
    return BlockInfo(**{**info, "also": tuple(info.get("also", ()))})


def _check_shapes(fields: Mapping[str, Any]) -> None:
    """Refuse a file whose numbers do not belong together.

    Raises:
        HeatmapError: If a tensor has another shape than tasks and layers say.
    """
    num_tasks, num_layers = len(fields["tasks"]), len(fields["layers"])
    found = tuple(fields["num_samples"].shape)
    if len(found) != 4 or found[:2] != (num_tasks, num_layers):
        raise HeatmapError(
            f"num_samples has the shape {found}, expected {num_tasks} tasks, {num_layers} layers, heads and blocks."
        )
    expected = (num_tasks, num_tasks, *found[1:])
    for what in ("scores", "standard_errors", "replicates"):
        for name, values in fields[what].items():
            if tuple(values.shape[1:] if what == "replicates" else values.shape) != expected:
                raise HeatmapError(
                    f"{what} of {name!r} have the shape {tuple(values.shape)}, expected {expected} for {num_tasks} tasks "
                    f"and {num_layers} layers."
                )


def _to_nested(values: Tensor) -> Any:
    """Nested lists with null for what is not a finite number."""

    def clean(item: Any) -> Any:
        if isinstance(item, list):
            return [clean(entry) for entry in item]
        return item if math.isfinite(item) else None

    return clean(values.double().tolist())


def _from_nested(values: Any) -> Tensor:
    def fill(item: Any) -> Any:
        if isinstance(item, list):
            return [fill(entry) for entry in item]
        return math.nan if item is None else float(item)

    return torch.tensor(fill(values), dtype=torch.float64)
