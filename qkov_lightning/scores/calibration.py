r"""Statistics of sampled weights, calibrated to what the sums at all weights tell.

Most scores are inner products of sums over the samples of two tasks. Where these sums are known at every
weight, so are the inner products, whatever was kept of each sample. The statistics of the samples, estimates
from some of the weights, are then moved so that their means over each task are the known ones (calibration;
Deville & Särndal 1992, Journal of the American Statistical Association 87): by a factor where they are sums
of terms of one sign, by a shift where the terms cancel. What the sums do not tell stays an estimate: standard
errors, curvature, and what a sample does to its own task.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qkov_lightning.scores.spans import inner
from qkov_lightning.scores.statistics import SliceStatistics
from qkov_lightning.scores.updates import UpdateDirection, damped, update_rate


@dataclass(frozen=True, eq=False)
class KnownMeans:
    """Means over the samples of each task, of what :class:`SliceStatistics` holds, from all weights.

    Attributes:
        sensitivity: Of task a to the magnitudes of task b.
        absolute_norm: Sum of the magnitudes.
        alignment: Inner product of the mean gradients.
        squared_norm: Sum of the squares.
        whitened_alignment: Inner product of the mean gradients, whitened.
        whitened_squared_norm: Sum of the squares, whitened.
        response: Of task a to the update direction of task b.
    """

    sensitivity: Float[Tensor, "task_a task_b head"]
    absolute_norm: Float[Tensor, "task head"]
    alignment: Float[Tensor, "task_a task_b head"]
    squared_norm: Float[Tensor, "task head"]
    whitened_alignment: Float[Tensor, "task_a task_b head"]
    whitened_squared_norm: Float[Tensor, "task head"]
    response: Float[Tensor, "task_a task_b head"]

    @classmethod
    def of(
        cls,
        means: Float[Tensor, "3 task head weight"],
        has_samples: Bool[Tensor, task],
        damping: float,
        update: UpdateDirection | Float[Tensor, "head weight"] = "adam",
    ) -> KnownMeans:
        """From the means of gradients, magnitudes and squares over the samples of each task.

        The Fisher is the mean of the squares of the tasks that have samples.

        Args:
            means: In this order, at all weights of some heads.
            has_samples: Whether a task has any; what is said of one that has none means nothing.
            damping: Added to a mean square, relative to its mean over the slice.
            update: Direction in which a task updates the slice.
        """
        heads = range(means.shape[2])
        parts = [cls._of_head(means[:, :, head : head + 1], has_samples, damping,
                              update[head : head + 1] if isinstance(update, Tensor) else update)
                 for head in heads]  # fmt: skip
        joined = {
            one.name: torch.cat([getattr(part, one.name) for part in parts], dim=-1) for one in fields(cls)
        }
        return cls(**joined)

    @classmethod
    def _of_head(
        cls,
        means: Float[Tensor, "3 task 1 weight"],
        has_samples: Bool[Tensor, task],
        damping: float,
        update: UpdateDirection | Float[Tensor, "1 weight"],
    ) -> KnownMeans:
        gradient, absolute, square = means
        inverse = 1 / damped(square[has_samples].mean(dim=0), damping)
        rate = update_rate(update, square, damping * square.mean(dim=-1, keepdim=True))
        return cls(
            sensitivity=inner(square * inverse, absolute).double(),
            absolute_norm=absolute.double().sum(dim=-1),
            alignment=inner(gradient, gradient).double(),
            squared_norm=square.double().sum(dim=-1),
            whitened_alignment=inner(gradient * inverse, gradient).double(),
            whitened_squared_norm=(square * inverse).double().sum(dim=-1),
            response=inner(gradient, gradient * rate).double(),
        )

    def repeated(self, times: int) -> KnownMeans:
        """Those of each head several times, side by side as if they were heads."""
        return KnownMeans(*(getattr(self, one.name).repeat_interleave(times, dim=-1) for one in fields(self)))


def calibrated(statistics: SliceStatistics, known: KnownMeans) -> SliceStatistics:
    """The statistics of samples, moved so that their means over each task are the known ones.

    Args:
        statistics: Of some weights of each head.
        known: Of all weights of the same heads.
    """
    s = statistics
    is_own = s.membership.T.unsqueeze(-1).bool()

    def growth(known_mean: Tensor, value: Tensor) -> Tensor:
        mean = s.task_mean(value)
        return torch.where(mean > 0, known_mean / mean, torch.ones_like(mean))

    def factor(known_mean: Tensor, value: Tensor) -> Tensor:
        return s.of_own_task(growth(known_mean, value))

    def shift(known_mean: Tensor, value: Tensor) -> Tensor:
        # Without a sample a mean is none, and 0 times it would be none for all.
        difference = (known_mean - s.task_mean(value)).transpose(0, -1)
        return s.of_own_task(torch.where(s.count > 0, difference, 0.0).transpose(0, -1))

    sensitivity = factor(known.sensitivity, s.sensitivity)
    # A response to the own task leaves the sample itself out, which the sums do not tell.
    response = shift(known.response, s.response).masked_fill(is_own, 0.0)
    own_response = known.response.diagonal(dim1=0, dim2=1).T
    return replace(
        s,
        sensitivity=s.sensitivity * sensitivity,
        push=s.push * factor(known.sensitivity.transpose(0, 1), s.push),
        self_pair=s.self_pair * (sensitivity * is_own).sum(dim=1),
        absolute_norm=s.absolute_norm * factor(known.absolute_norm, s.absolute_norm),
        alignment=s.alignment + shift(known.alignment, s.alignment),
        squared_norm=s.squared_norm * factor(known.squared_norm, s.squared_norm),
        whitened_alignment=s.whitened_alignment + shift(known.whitened_alignment, s.whitened_alignment),
        whitened_squared_norm=s.whitened_squared_norm
        * factor(known.whitened_squared_norm, s.whitened_squared_norm),
        response=s.response + response,
        own_slope=s.own_slope + shift(own_response, s.own_slope),
        half_responses=s.half_responses + response[:, None],
        left_out=None if s.left_out is None else s.left_out * growth(known.sensitivity, s.sensitivity),
    )
