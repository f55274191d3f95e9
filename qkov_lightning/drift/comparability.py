"""Do two heatmaps measure the same cells, in the same way?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.heatmap import InterferenceHeatmap

CONDITIONS = ("fisher", "damping")
"""Notes of a heatmap that must agree, or the two do not measure the same thing."""


class NotComparableError(ValueError):
    """The two heatmaps do not measure the same cells, or not well enough."""


def check_comparable(
    baseline: InterferenceHeatmap, current: InterferenceHeatmap, scores: Sequence[str]
) -> Bool[Tensor, "layer head block"]:
    """The cells to judge: all that exist and train.

    Raises:
        NotComparableError: If the two heatmaps do not both have data there.
    """
    if set(baseline.tasks) != set(current.tasks):
        raise NotComparableError(
            f"The baseline has the tasks {', '.join(baseline.tasks)}, the current heatmap {', '.join(current.tasks)}. "
            "Measure both on the same tasks."
        )
    if len(baseline.tasks) < 2:
        raise NotComparableError(
            f"The heatmaps have one task, {baseline.tasks[0]!r}: interference needs at least two."
        )
    for condition in CONDITIONS:
        old, new = baseline.notes.get(condition), current.notes.get(condition)
        if old != new:
            raise NotComparableError(
                f"The baseline was measured with {condition} = {old!r}, the current heatmap with {new!r}. "
                "Measure both in the same way."
            )
    kinds = [heatmap.notes.get("replicates", "exact") for heatmap in (baseline, current)]
    if baseline.replicates and current.replicates and kinds[0] != kinds[1]:
        raise NotComparableError(
            f"The baseline was measured with {kinds[0]} replicates, the current heatmap with {kinds[1]} ones: their "
            f"differences are not those of the samples. Measure both with replicates={kinds[0]!r}, or both with "
            f"replicates={kinds[1]!r}."
        )
    measured = _check_head_maps(baseline, current)
    order = [current.tasks.index(task) for task in baseline.tasks]
    different = ~torch.eye(len(order), dtype=torch.bool)
    for score in scores:
        for which, heatmap in (("baseline", baseline), ("current heatmap", current)):
            if score not in heatmap.scores or score not in heatmap.standard_errors:
                raise NotComparableError(
                    f"The {which} has no score {score!r}; it has {', '.join(heatmap.scores)}."
                )
            _check_data(which, score, heatmap, different[:, :, None, None, None] & measured)
    return measured


def _check_head_maps(
    baseline: InterferenceHeatmap, current: InterferenceHeatmap
) -> Bool[Tensor, "layer head block"]:
    if baseline.num_layers != current.num_layers:
        raise NotComparableError(
            f"The baseline has {baseline.num_layers} attention layers, the current heatmap {current.num_layers}: "
            "they come from different models."
        )
    measured = torch.zeros(baseline.num_samples.shape[1:], dtype=torch.bool)
    for index, (old, new) in enumerate(zip(baseline.layers, current.layers, strict=True)):
        descriptions = [
            {
                "name": layer.name,
                **{
                    block: (info.num_heads, info.query_group, info.status == "frozen")
                    for block, info in layer.blocks.items()
                },
            }
            for layer in (old, new)
        ]
        if descriptions[0] != descriptions[1]:
            raise NotComparableError(
                f"Layer {index} differs: the baseline has {_describe(descriptions[0])}, the current heatmap "
                f"{_describe(descriptions[1])}. Heatmaps of different models cannot be compared."
            )
        for block, info in old.blocks.items():
            if info.status != "frozen":
                measured[index, : info.num_heads, BLOCKS.index(block)] = True
    if baseline.num_samples.shape[1:] != current.num_samples.shape[1:] or not bool(measured.any()):
        raise NotComparableError("The heatmaps have no cell in common that trains.")
    return measured


def _describe(layer: dict[str, object]) -> str:
    blocks = [
        f"{block}: {value[0]} heads in groups of {value[1]}{', frozen' if value[2] else ''}"
        for block, value in layer.items()
        if isinstance(value, tuple)
    ]
    return f"`{layer['name']}` ({'; '.join(blocks)})"


def _check_data(
    which: str,
    score: str,
    heatmap: InterferenceHeatmap,
    expected: Bool[Tensor, "task_a task_b layer head block"],
) -> None:
    values, errors = heatmap.scores[score], heatmap.standard_errors[score]
    if values.shape != expected.shape or errors.shape != expected.shape:
        raise NotComparableError(
            f"The {which} has {score!r} in shape {tuple(values.shape)}, expected {tuple(expected.shape)}."
        )
    known = values.isfinite() & errors.isfinite()
    if score in heatmap.replicates:
        replicates = heatmap.replicates[score]
        if replicates.shape[1:] != expected.shape or len(replicates) < 2:
            raise NotComparableError(
                f"The {which} has replicates of {score!r} in shape {tuple(replicates.shape)}, expected at least two of "
                f"{tuple(expected.shape)}."
            )
        known &= replicates.isfinite().all(dim=0)
    lost = expected & ~known
    if bool(lost.any()):
        a, b, layer, head, block = lost.nonzero()[0].tolist()
        raise NotComparableError(
            f"The {which} has no data for {score!r} in {int(lost.sum())} of {int(expected.sum())} values, the first at "
            f"{heatmap.tasks[a]} x {heatmap.tasks[b]}, L{layer}.H{head}.{BLOCKS[block]}. Missing data is not 'no drift': "
            "measure at least two samples of every task there, with gradients that are not all zero."
        )
