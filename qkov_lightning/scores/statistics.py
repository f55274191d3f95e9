"""What the scores are made of: sums over the weights of a slice, per sample, and their sampling variance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

MIN_SAMPLES = 2
"""A task with fewer samples in a slice has no score there: a variance needs two."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A score of every ordered task pair (a, b) and head, NaN where a task has fewer than two samples.

    Attributes:
        value: The score.
        variance: Its sampling variance over samples of both tasks, and over all samples that the Fisher
            holds.
        replicates: The score without each group of samples that is left out together, to first order; None
            where the statistics name no such groups.
    """

    value: Float[Tensor, "task_a task_b head"]
    variance: Float[Tensor, "task_a task_b head"]
    replicates: Float[Tensor, "group task_a task_b head"] | None = None


WITHOUT_HEADS = frozenset({"membership", "groups", "num_terms", "step_size", "dropped"})
"""What the statistics say of the samples, the same at every head."""


@dataclass(frozen=True, eq=False)
class SliceStatistics:
    r"""What the scores are made of: sums over weights, per sample, in float64.

    The samples stand in the order of their tasks.

    Attributes:
        membership: 1 where a sample belongs to a task.
        sensitivity: :math:`\langle u_i, \bar v_t \rangle` for each sample i and task t.
        push: :math:`\langle \bar u_t, v_i \rangle`.
        self_pair: :math:`\langle u_i, v_i \rangle`.
        absolute_norm: :math:`\sum_k |g_{ik}|`.
        alignment: :math:`\langle g_i, \bar g_t \rangle`.
        squared_norm: :math:`\sum_k g_{ik}^2`.
        whitened_alignment: :math:`\langle g_i, \bar g_t / (I + \epsilon) \rangle`.
        whitened_squared_norm: :math:`\sum_k g_{ik}^2 / (I_k + \epsilon)`.
        response: :math:`r_{it} = \langle g_i, d_t \rangle` with the update direction :math:`d_t` of each task
            t; for a sample's own task, that of its other samples.
        own_slope: :math:`\langle g_i, d_t \rangle` with the direction of its own task t, the sample included.
        slope_influence: How the mean response of each task t to the direction of a sample's own task moves
            with that sample, :math:`\langle \bar g_t, \partial d / \partial j \rangle`.
        half_responses: The same as ``response`` with the direction of each half of the samples of task t.
        curvature_influence: How the mean curvature along it moves with that sample.
        left_out: :math:`\langle \bar u_a, \bar v_b \rangle` without each sample, and with the Fisher of the
            rest; None where the Fisher is known.
        groups: Group of each sample, counted from 0: samples of one group vary together.
        num_terms: Terms that each sample's own loss is the mean of.
        step_size: Length of the step along the update direction.
        dropped: 1 where a replicate leaves a sample out, with others of its group; None without replicates.
    """

    membership: Float[Tensor, "task sample"]
    sensitivity: Float[Tensor, "sample task head"]
    push: Float[Tensor, "sample task head"]
    self_pair: Float[Tensor, "sample head"]
    absolute_norm: Float[Tensor, "sample head"]
    alignment: Float[Tensor, "sample task head"]
    squared_norm: Float[Tensor, "sample head"]
    whitened_alignment: Float[Tensor, "sample task head"]
    whitened_squared_norm: Float[Tensor, "sample head"]
    response: Float[Tensor, "sample task head"]
    own_slope: Float[Tensor, "sample head"]
    half_responses: Float[Tensor, "sample half task head"]
    slope_influence: Float[Tensor, "sample task head"]
    curvature_influence: Float[Tensor, "sample task head"]
    left_out: Float[Tensor, "sample task_a task_b head"] | None
    groups: Int[Tensor, sample]
    num_terms: Float[Tensor, sample]
    step_size: float
    dropped: Float[Tensor, "sample group"] | None = None

    @classmethod
    def side_by_side(cls, parts: Sequence[SliceStatistics]) -> SliceStatistics:
        """Those of the same samples at several slices, as if these were heads of one."""
        first = parts[0]
        per_head: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts], dim=-1)
            for name, value in vars(first).items()
            if name not in WITHOUT_HEADS and value is not None
        }
        return replace(first, **per_head)

    @property
    def curvature(self) -> Float[Tensor, "sample task head"]:
        """Curvature of each sample's loss along each task's direction, without the noise of the direction."""
        first, second = self.half_responses.unbind(dim=1)
        return _column(self.num_terms, 3) * first * second

    @property
    def count(self) -> Float[Tensor, task]:
        """Samples of each task."""
        return self.membership.sum(dim=1)

    def task_mean(self, per_sample: Float[Tensor, sample * rest]) -> Float[Tensor, task * rest]:
        """Mean over the samples of each task."""
        return torch.tensordot(self.membership, per_sample, dims=1) / _column(self.count, per_sample.ndim)

    def of_own_task(self, per_task: Float[Tensor, task * rest]) -> Float[Tensor, sample * rest]:
        """The entry of each sample's own task."""
        return torch.tensordot(self.membership.T, per_task, dims=1)

    def without_self(
        self, per_sample: Float[Tensor, "sample task head"]
    ) -> Float[Tensor, "sample task head"]:
        """Marginals with the pair (i, i) taken out of the mean over the sample's own task."""
        own = self.membership.T.unsqueeze(-1).bool()
        count = self.of_own_task(self.count)[:, None, None]
        return torch.where(own, (count * per_sample - self.self_pair[:, None]) / (count - 1), per_sample)

    def pair_estimate(
        self,
        value: Float[Tensor, "task_a task_b head"],
        as_a: Float[Tensor, "sample task_b head"],
        as_b: Float[Tensor, "sample task_a head"],
    ) -> Estimate:
        """A score with its sampling variance, from the influence of each sample on it.

        Args:
            value: The score.
            as_a: Influence of a sample as a member of its task A, on the pair with each task B.
            as_b: Influence as a member of task B, on the pair with each task A.
        """
        as_a, as_b = self._centred(as_a), self._centred(as_b)
        member = self.membership.T.unsqueeze(-1)
        return self._estimate(
            value,
            (member[:, a, None] * as_a + member * as_b[:, a, None] for a in range(len(self.count))),
        )

    def left_out_estimate(
        self,
        value: Float[Tensor, "task_a task_b head"],
        left_out: Float[Tensor, "sample task_a task_b head"],
    ) -> Estimate:
        """A score with its sampling variance, from its values without each sample (Tukey 1958)."""
        count = self.of_own_task(self.count)[:, None, None]
        return self._estimate(
            value, (-(count - 1) * self._centred(left_out[:, a]) for a in range(len(value)))
        )

    def _estimate(
        self,
        value: Float[Tensor, "task_a task_b head"],
        influences: Iterable[Float[Tensor, "sample task_b head"]],
    ) -> Estimate:
        variances, replicates = [], []
        for own_value, influence in zip(value, influences, strict=True):
            variances.append(self._variance(influence))
            if self.dropped is not None:
                replicates.append(own_value - self._lost(influence, self.dropped))
        no_data = self.count < MIN_SAMPLES
        no_data = (no_data[:, None] | no_data[None, :]).unsqueeze(-1)
        return Estimate(
            value.masked_fill(no_data, torch.nan),
            torch.stack(variances).masked_fill(no_data, torch.nan),
            torch.stack(replicates, dim=1).masked_fill(no_data, torch.nan) if replicates else None,
        )

    def _lost(
        self, influence: Float[Tensor, "sample task head"], dropped: Float[Tensor, "sample group"]
    ) -> Float[Tensor, "group task head"]:
        r"""What a score loses without each group of samples, to first order.

        .. math:: \sum_{t} \frac{n_t}{n_t - m_t} \sum_{i \in g, \, i \in t} \psi_i

        with the m of the n samples of each task t that are in the group: the infinitesimal jackknife (Jaeckel
        1972; Efron 1982, chapter 6), in the form that is exact for a mean.
        """
        left = self.count[:, None] - self.membership @ dropped
        weight = dropped * self.of_own_task(self.count[:, None] / left)
        return torch.tensordot(weight.T, influence, dims=1)

    def _variance(self, influence: Float[Tensor, "sample task head"]) -> Float[Tensor, "task head"]:
        r"""Sampling variance of a score, from what each sample moves it by.

        .. math:: \sum_g \Big( \sum_{i \in g} c_i \, \psi_i \Big)^2

        with :math:`\psi_i` of mean zero over the task of sample i, summed over each group g of samples (Liang
        & Zeger 1986), and :math:`c_i^2 = n / (n - 1)` with the n groups of its task. Every sample is a group
        of its own where none are given.
        """
        grouped = influence.new_zeros(int(self.groups.max()) + 1, *influence.shape[1:])
        grouped.index_add_(0, self.groups, influence * self._correction())
        return grouped.square().sum(dim=0)

    def _centred(self, influence: Float[Tensor, "sample task head"]) -> Float[Tensor, "sample task head"]:
        """Influence on a mean over a task: less its own mean, and divided by the number of samples."""
        count = self.of_own_task(self.count)[:, None, None]
        return (influence - self.of_own_task(self.task_mean(influence))) / count

    def _correction(self) -> Float[Tensor, "sample 1 1"]:
        """Of the degree of freedom that the mean of each task takes."""
        seen = torch.zeros(len(self.count), int(self.groups.max()) + 1).to(self.membership)
        seen.scatter_add_(1, self.groups.expand(len(self.count), -1), self.membership)
        number = (seen > 0).sum(dim=1).to(self.membership)
        return _column(self.of_own_task((number / (number - 1).clamp(min=1)).sqrt()), 3)


def _column(values: Tensor, ndim: int) -> Tensor:
    return values.view(-1, *(1,) * (ndim - 1))
