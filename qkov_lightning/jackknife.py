r"""Standard errors that hold where one sample can carry a whole cell.

The standard errors of the scores themselves are linear in each sample and take the Fisher as known. A sample that
dominates its task's gradients moves the Fisher with it, and a ratio that it saturates no longer feels it: such errors
come out several times too small. Leaving samples out shows what they carry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.cache import GradientCache
from qkov_lightning.interference import SCORES
from qkov_lightning.metric import HeadInterference
from qkov_lightning.projections import Projection, num_heads, num_layers
from qkov_lightning.streaming import CacheReader, HeadGradients, head_gradients_of


def jackknife_errors(
    cache: GradientCache,
    projections: Sequence[Projection],
    tasks: Sequence[str],
    *,
    num_groups: int,
    damping: float = 1e-3,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Float[Tensor, "task_a task_b layer head block"]]:
    r"""Standard error of every cell, with the Fisher estimated from the same samples.

    .. math:: s^2 = \frac{G - 1}{G} \sum_{g=1}^{G} (\theta_{-g} - \bar\theta)^2

    with :math:`\theta_{-g}` the score without the g-th group of every task's samples (Quenouille 1949, Tukey 1958).

    Args:
        cache: The samples.
        projections: What to score.
        tasks: Names along the task axes.
        num_groups: Groups, at most as many as the smallest task has samples.
        damping: Added to the Fisher, relative to its mean over a slice.
        device: Where the arithmetic runs.
        rank: This process; it takes every ``world_size``-th layer.
        world_size: Number of processes.

    Returns:
        Standard errors by score, with ``num_groups - 1`` degrees of freedom.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups is {num_groups}, expected at least 2.")
    metrics = [
        HeadInterference(tasks, num_layers(projections), num_heads(projections), damping).to(device)
        for _ in range(num_groups)
    ]
    reader = CacheReader([record for record, _ in cache.records()], device)
    for projection in projections:
        if projection.layer % world_size != rank:
            continue
        for gradients in head_gradients_of(reader, projection):
            names = [name for record in gradients.records for name in record.samples.tasks]
            indices = torch.tensor([tasks.index(name) for name in names], device=device)
            groups = _groups(names, num_groups).to(device)
            sums, counts = _sums(gradients, indices, groups, len(tasks), num_groups)
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
                )
    results = [metric.compute() for metric in metrics]
    return {score: _spread(torch.stack([result[score].cpu() for result in results])) for score in SCORES}


def _groups(names: Sequence[str], num_groups: int) -> Int[Tensor, sample]:
    """Group of every sample: the samples of each task are dealt out in turn."""
    seen: Counter[str] = Counter()
    groups = []
    for name in names:
        groups.append(seen[name] % num_groups)
        seen[name] += 1
    return torch.tensor(groups)


def _sums(
    gradients: HeadGradients,
    indices: Int[Tensor, sample],
    groups: Int[Tensor, sample],
    num_tasks: int,
    num_groups: int,
) -> tuple[Float[Tensor, "task group head weight"], Float[Tensor, "task group"]]:
    """Sum of squared gradients of each task's groups, and their numbers of samples.

    Raises:
        ValueError: If there are none.
    """
    member = torch.nn.functional.one_hot(indices * num_groups + groups, num_tasks * num_groups).T
    sums: Tensor | None = None
    start = 0
    for chunk in gradients:
        part = torch.tensordot(member[:, start : start + len(chunk)].to(chunk), chunk.square(), dims=1)
        sums = part if sums is None else sums + part
        start += len(chunk)
    if sums is None:
        raise ValueError("There are no gradients to sum.")
    counts = member.sum(dim=1).to(sums)
    return sums.unflatten(0, (num_tasks, num_groups)), counts.view(num_tasks, num_groups)


def _spread(values: Float[Tensor, group * cell]) -> Float[Tensor, "*cell"]:
    return (values.var(dim=0, correction=0) * (len(values) - 1)).sqrt()
