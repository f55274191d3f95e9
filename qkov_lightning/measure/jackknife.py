r"""Standard errors that hold where one sample can carry a whole cell.

The standard errors of the scores themselves are linear in each sample and take the Fisher as known. A sample
that dominates its task's gradients moves the Fisher with it, and a ratio that it saturates no longer feels
it: such errors come out several times too small. Leaving samples out shows what they carry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.capture.samples import Samples
from qkov_lightning.heads.projections import Projection, num_heads, num_layers
from qkov_lightning.scores.metric import HeadInterference
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.scores.spans import weighted_squares
from qkov_lightning.store.cache import GradientCache
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.streaming import CacheReader, head_gradients_of

DIGITS = 6
"""Significant digits of a replicate: far more than a standard error has, and a small file."""


def jackknife_replicates(
    cache: GradientCache,
    projections: Sequence[Projection],
    tasks: Sequence[str],
    num_groups: int,
    settings: ScoreSettings = ScoreSettings(),
    processes: Processes = Processes(),
    device: torch.device | str = "cpu",
) -> dict[str, Float[Tensor, "group task_a task_b layer head block"]]:
    """Every cell without each group of every task's samples, with the Fisher estimated from the rest.

    Args:
        cache: The samples.
        projections: What to score.
        tasks: Names along the task axes.
        num_groups: Groups, at most as many as the smallest task has samples.
        settings: What the scores depend on.
        processes: Each takes some layers.
        device: Where the arithmetic runs.

    Returns:
        Replicates by score, to six significant digits.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups is {num_groups}, expected at least 2.")
    reader = CacheReader([record for record, _ in cache.records()], device)
    device = reader.device
    metrics = [
        HeadInterference(tasks, num_layers(projections), num_heads(projections), settings).to(device)
        for _ in range(num_groups)
    ]
    for projection in projections:
        if not processes.takes(projection.layer):
            continue
        for gradients in head_gradients_of(reader, projection):
            indices = torch.tensor([tasks.index(name) for name in gradients.tasks], device=device)
            groups = left_out_together(gradients.tasks, gradients.groups, num_groups).to(device)
            member = torch.nn.functional.one_hot(indices * num_groups + groups, len(tasks) * num_groups).T
            sums = weighted_squares(gradients, member.double()).unflatten(0, (len(tasks), num_groups))
            counts = member.sum(dim=1).view(len(tasks), num_groups).to(sums)
            for group, metric in enumerate(metrics):
                others = torch.arange(num_groups, device=device) != group
                kept = counts[:, others].sum(dim=1).clamp(min=1)
                present = counts.sum(dim=1) > 0
                fisher = sums[:, others].sum(dim=1) / kept[:, None, None]
                metric.update(
                    gradients,
                    indices.masked_fill(groups == group, -1),
                    fisher[present].mean(dim=0),
                    layer=projection.layer,
                    block=projection.block,
                    first_head=gradients.heads.start,
                    num_terms=gradients.num_terms,
                )
    results = [metric.compute() for metric in metrics]
    return {score: _rounded(torch.stack([result[score].cpu() for result in results])) for score in SCORES}


def num_groups_of(samples: Iterable[Samples]) -> int:
    """How many groups the task with the fewest has; a sample without a group is one of its own."""
    units: dict[str, set[object]] = {}
    for some in samples:
        for task, unit in zip(some.tasks, some.groups or some.ids, strict=True):
            units.setdefault(task, set()).add(unit)
    return min((len(own) for own in units.values()), default=0)


def left_out_together(
    tasks: Sequence[str], groups: Sequence[str | None], num_groups: int
) -> Int[Tensor, sample]:
    """Which samples are left out together.

    Neighbours, of each task an equal share, and never a part of a group.

    Neighbours rather than samples dealt out in turn: where the samples of a document follow one another, they
    stay together though nobody named the document.
    """
    units = [place if group is None else group for place, group in enumerate(groups)]
    sizes = Counter(task for task, _ in set(zip(tasks, units, strict=True)))
    seen: Counter[str] = Counter()
    places: dict[object, int] = {}
    for task, unit in dict.fromkeys(zip(tasks, units, strict=True)):
        places.setdefault(unit, seen[task] * num_groups // sizes[task])
        seen[task] += 1
    return torch.tensor([places[unit] for unit in units])


def _rounded(values: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """The numbers with ``DIGITS`` significant digits that are nearest."""
    magnitude = values.abs().clamp(min=torch.finfo(values.dtype).tiny).log10().floor()
    scale = 10.0 ** (DIGITS - 1 - magnitude).clamp(max=300)
    return (values * scale).round() / scale
