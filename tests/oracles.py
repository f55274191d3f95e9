"""Slow, obviously right counterparts of what the package computes, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def batch_of_one_gradients(
    model: nn.Module, weights: dict[str, Tensor], losses: Callable[[int], Tensor], num_samples: int
) -> dict[str, Tensor]:
    """Gradient of each sample's own loss by ordinary autograd, one sample at a time."""
    collected: dict[str, list[Tensor]] = {name: [] for name in weights}
    for sample in range(num_samples):
        gradients = torch.autograd.grad(losses(sample), list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            collected[name].append(torch.zeros_like(weight) if gradient is None else gradient.detach())
    return {name: torch.stack(values).double() for name, values in collected.items()}


def naive_interference(a: Tensor, b: Tensor, fisher: Tensor, damping: float, same: bool) -> Tensor:
    """M_ij by a loop over sample pairs and weights; pairs (i, i) of one task are NaN."""
    epsilon = damping * sum(float(value) for value in fisher) / len(fisher)
    matrix = torch.zeros(len(a), len(b), dtype=torch.float64)
    for i in range(len(a)):
        for j in range(len(b)):
            total = 0.0
            for k in range(len(fisher)):
                total += float(a[i, k]) ** 2 / (float(fisher[k]) + epsilon) * abs(float(b[j, k]))
            matrix[i, j] = float("nan") if same and i == j else total
    return matrix


def naive_relative(a: Tensor, b: Tensor, fisher: Tensor, damping: float, same: bool) -> float:
    push = sum(sum(abs(float(value)) for value in row) for row in b) / len(b)
    return float(naive_interference(a, b, fisher, damping, same).nanmean()) / push


def naive_cosine(a: Tensor, b: Tensor, same: bool) -> float:
    if not same:
        return float(torch.nn.functional.cosine_similarity(a.mean(0), b.mean(0), dim=0))
    products = [float(a[i] @ a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
    return sum(products) / len(products) / float(a.mean(0) @ a.mean(0))


def online_fisher(steps: list[Tensor], decay: float) -> Tensor:
    """The recursion as written in the paper, one step after the other."""
    average, weight = torch.zeros_like(steps[0][0], dtype=torch.float64), 0.0
    for gradients in steps:
        average = decay * average + (1 - decay) * torch.stack([g.double() ** 2 for g in gradients]).mean(0)
        weight = decay * weight + (1 - decay)
    return average / weight


def naive_conflict(a: Tensor, b: Tensor, fisher: Tensor, damping: float, same: bool) -> float:
    """The cosine, of gradients divided by the root of the damped Fisher."""
    root = (fisher + damping * float(fisher.sum()) / len(fisher)) ** 0.5
    return naive_cosine(a / root, b / root, same)


def naive_direction(
    samples: Tensor, damping: float, update: str | Tensor, some: Tensor | None = None
) -> Tensor:
    """Mean gradient over the root of the damped mean square (Adam), alone (SGD), or times given rates.

    The mean gradient may be that of some of the samples.
    """
    result = torch.zeros(samples.shape[1], dtype=torch.float64)
    squares = [sum(float(row[k]) ** 2 for row in samples) / len(samples) for k in range(len(result))]
    some = samples if some is None else some
    for k in range(len(result)):
        mean = sum(float(row[k]) for row in some) / len(some)
        if isinstance(update, Tensor):
            mean *= float(update[k])
        elif update == "adam":
            mean /= (squares[k] + damping * sum(squares) / len(squares)) ** 0.5
        result[k] = mean
    return result


def naive_responses(a: Tensor, b: Tensor, damping: float, update: str | Tensor, same: bool) -> list[float]:
    """Of each sample of a to the direction of b's samples; within a task, of the other ones."""
    responses = []
    for i in range(len(a)):
        others = torch.cat([b[:i], b[i + 1 :]]) if same else b
        responses.append(float(a[i] @ naive_direction(others, damping, update)))
    return responses


def naive_curvatures(a: Tensor, b: Tensor, damping: float, update: str | Tensor, same: bool) -> list[float]:
    """Of each sample of a along the direction of b's: the product of its responses to every second sample."""
    curvatures = []
    for i in range(len(a)):
        kept = [j for j in range(len(b)) if not (same and j == i)]
        product = 1.0
        halves = [[j for j in kept if j % 2 == half] for half in (0, 1)]
        for half in halves:
            some = b[half if all(halves) else kept]
            product *= float(a[i] @ naive_direction(b[kept], damping, update, some))
        curvatures.append(product)
    return curvatures
