"""The torchmetrics face of the scores: states, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from qkov_lightning.heads.projections import BLOCKS, Block
from qkov_lightning.scores.calibration import KnownMeans, calibrated
from qkov_lightning.scores.reduction import slice_statistics
from qkov_lightning.scores.replicates import leave_out_replicates, num_variants, sampled_estimate
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.scores.statistics import MIN_SAMPLES


class _Replicates:
    """Blocks in which the samples of a head's weights stand side by side as if they were heads."""

    def __init__(self, blocks: Iterable[Tensor], num_replicates: int) -> None:
        self._blocks, self._num_replicates = blocks, num_replicates

    def __iter__(self) -> Iterator[Float[Tensor, "sample head_replicate coordinate"]]:
        for block in self._blocks:
            yield block.reshape(len(block), block.shape[1] * self._num_replicates, -1)


class HeadInterference(Metric):
    """Interference of every ordered task pair in every (layer, head, block).

    Each ``update`` brings one projection: the gradients of all samples, which it reduces to a few numbers
    per cell. States are sums with ``dist_reduce_fx="sum"``, so that processes can share the layers among
    themselves. Updating a cell twice averages the two results by their numbers of sample pairs.

    Args:
        tasks: Names of the tasks, in the order of the result's axes.
        num_layers: Number of attention layers.
        num_heads: Largest number of heads of any block.
        settings: What the scores depend on apart from the gradients.
        **kwargs: As for every :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there is no task.

    Example:
        >>> from qkov_lightning import EmpiricalFisher
        >>> gradients = torch.randn(8, 4, 32, generator=torch.Generator().manual_seed(0))
        >>> tasks = ["math"] * 4 + ["code"] * 4
        >>> fisher = EmpiricalFisher()
        >>> fisher.update(gradients, tasks)
        >>> metric = HeadInterference(["math", "code"], num_layers=1, num_heads=4)
        >>> metric.update(gradients, tasks, fisher.pooled(), layer=0, block="Q")
        >>> metric.compute()["relative"].shape  # [task, task, layer, head, block]
        torch.Size([2, 2, 1, 4, 4])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    num_pairs: Tensor
    num_samples: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        num_layers: int,
        num_heads: int,
        settings: ScoreSettings = ScoreSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not tasks:
            raise ValueError("tasks is empty, expected the names of the tasks to compare.")
        self.tasks = tuple(tasks)
        self.settings = settings
        pairs = torch.zeros(len(tasks), len(tasks), num_layers, num_heads, len(BLOCKS), dtype=torch.float64)
        for score in SCORES:
            self.add_state(f"{score}_sum", pairs.clone(), dist_reduce_fx="sum")
            self.add_state(f"{score}_variance_sum", pairs.clone(), dist_reduce_fx="sum")
        self.add_state("num_pairs", pairs.clone(), dist_reduce_fx="sum")
        self.add_state("num_samples", pairs[0].clone(), dist_reduce_fx="sum")

    def update(
        self,
        gradients: Float[Tensor, "sample head weight"] | Iterable[Float[Tensor, "sample head _"]],
        tasks: Sequence[str] | Int[Tensor, sample],
        fisher: Float[Tensor, "head weight"],
        *,
        layer: int,
        block: Block,
        first_head: int = 0,
        rates: Float[Tensor, "head weight"] | None = None,
        weights: Float[Tensor, "head replicate coordinate"] | None = None,
        fisher_shares: Float[Tensor, sample] | None = None,
        groups: Int[Tensor, sample] | None = None,
        num_terms: Float[Tensor, sample] | None = None,
        known: KnownMeans | None = None,
    ) -> None:
        """Add one projection, or some heads of it.

        Args:
            gradients: Per-sample gradients; or blocks of weights, one after the other, in an iterable that
                can be read several times.
            tasks: Task of each sample, by name or by index into ``tasks`` (-1 leaves a sample out).
            fisher: Fisher pooled over tasks, on the same weights.
            layer: Layer of the projection.
            block: Block of the projection.
            first_head: Head that the first row of ``gradients`` belongs to.
            rates: What the optimiser multiplies a gradient with, weight by weight, instead of the direction
                that the metric was made with.
            weights: Where only some weights of each head were kept, in independent samples one after the
                other: how many weights each one stands for, over all samples. The sampling error is added to
                the standard errors.
            fisher_shares: Share of each sample's square in the Fisher, as from
                :meth:`EmpiricalFisher.shares`: the standard errors then include that the Fisher varies with
                the samples. It is taken as known without them.
            groups: Group of each sample, counted from 0. Samples of one group (of one document, say) may vary
                together; every sample is a group of its own without them.
            num_terms: Terms (target tokens) that the loss of each sample is the mean of; 1 without them.
            known: What sums at all weights tell, where only some were kept of each sample: then scores are
                exact as far as it goes.

        Raises:
            ValueError: If a task is unknown, or the sizes do not fit each other or the metric.
        """
        indices = tasks if isinstance(tasks, Tensor) else self._indices(tasks)
        blocks = [gradients] if isinstance(gradients, Tensor) else gradients
        heads = slice(first_head, first_head + fisher.shape[0])
        num_layers, num_heads = self.num_samples.shape[1:3]
        if not 0 <= layer < num_layers or heads.stop > num_heads:
            raise ValueError(
                f"layer {layer}, heads {heads.start} to {heads.stop - 1}: the metric was made for "
                f"{num_layers} layers and {num_heads} heads."
            )
        each: Tensor | None = None
        replicates = 1
        if weights is not None:
            replicates = weights.shape[1]
            each = replicates * weights.flatten(0, 1)  # of its own sample alone
            blocks = _Replicates(blocks, replicates)
            fisher = fisher.reshape(len(each), -1)
            rates = None if rates is None else rates.reshape(len(each), -1)
        statistics = slice_statistics(
            blocks,
            indices.to(fisher.device),
            len(self.tasks),
            fisher,
            self.settings.damping,
            self.settings.update if rates is None else rates,
            self.settings.step_size,
            each,
            replicates,
            fisher_shares,
            groups,
            num_terms,
        )
        cell = (..., layer, heads, BLOCKS.index(block))
        count = statistics.count
        enough = count >= MIN_SAMPLES
        num_pairs = count[:, None] * (count[None, :] - torch.eye(len(count)).to(count))
        num_pairs = torch.where(enough[:, None] & enough[None, :], num_pairs, 0).unsqueeze(-1)
        statistics = leave_out_replicates(statistics, replicates)
        if known is not None:
            statistics = calibrated(statistics, known.repeated(num_variants(replicates)))
        for score in SCORES.values():
            estimate = sampled_estimate(score, statistics, replicates)
            # A NaN without pairs is "no data yet"; any other NaN (0 / 0) stays one.
            value = torch.where(num_pairs > 0, estimate.value * num_pairs, 0)
            variance = torch.where(num_pairs > 0, estimate.variance * num_pairs.square(), 0)
            getattr(self, f"{score.name}_sum")[cell] += value.to(self.num_pairs)
            getattr(self, f"{score.name}_variance_sum")[cell] += variance.to(self.num_pairs)
        self.num_pairs[cell] += num_pairs.to(self.num_pairs)
        self.num_samples[cell] += count[:, None].to(self.num_samples)

    def compute(self) -> dict[str, Tensor]:
        """Scores of all cells.

        Returns:
            For each score its value and its ``<score>_standard_error``, of shape
            ``[task_a, task_b, layer, head, block]``, NaN where there is no data; and ``num_samples`` of
            shape ``[task, layer, head, block]``.
        """
        result = {}
        for score in SCORES:
            result[score] = getattr(self, f"{score}_sum") / self.num_pairs
            result[f"{score}_standard_error"] = getattr(self, f"{score}_variance_sum").sqrt() / self.num_pairs
        result["num_samples"] = self.num_samples
        return result

    def plot(
        self,
        val: dict[str, Tensor] | None = None,
        ax: Axes | None = None,
        *,
        score: str = "relative",
        pair: tuple[str, str] | None = None,
    ) -> tuple[Figure, Axes]:
        """Draw one score of one task pair: blocks side by side, layers down, heads across.

        Args:
            val: What ``compute`` returned; computed by default.
            ax: Where to draw; by default a new figure, which gets a colour bar too.
            score: Which score.
            pair: Task whose sensitivity is measured, and task that pushes; the first two tasks by default.

        Returns:
            The figure and the axis.

        Raises:
            ValueError: If a task or the score is unknown.
        """
        from qkov_lightning.views.facets import draw_strip, scale_of  # a view, asked for only here

        result = self.compute() if val is None else val
        if score not in SCORES:
            raise ValueError(f"Unknown score {score!r}; there are {', '.join(SCORES)}.")
        first, second = self._indices(pair or (self.tasks[0], self.tasks[-1 if len(self.tasks) < 2 else 1]))
        values = result[score].detach().cpu().double()
        largest = float(values.nan_to_num(0.0).abs().max())
        # A head that no layer has samples of does not exist, as K and V heads under grouped-query attention.
        seen = result["num_samples"].detach().cpu().sum(dim=(0, 1)) > 0
        num_heads = [int(heads.nonzero().max()) + 1 if heads.any() else len(heads) for heads in seen.T]
        new_figure = ax is None
        if ax is None:
            from matplotlib import pyplot  # chooses a display, so only when one is asked for

            _, ax = pyplot.subplots()
        draw_strip(ax, values[first, second].numpy(), num_heads, scale_of(score, len(self.tasks), largest))
        ax.set_title(f"{score}: {self.tasks[first]} <- {self.tasks[second]}")
        figure = getattr(ax.figure, "figure", None)  # the whole one, if the axis is in a subfigure
        if figure is None:
            raise ValueError("ax belongs to no figure; make it with `Figure.add_subplot`.")
        if new_figure:
            figure.colorbar(ax.images[0], ax=ax)
        return figure, ax

    def _indices(self, tasks: Sequence[str]) -> Tensor:
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown:
            raise ValueError(
                f"Unknown task {', '.join(map(repr, unknown))}: the metric was made for {', '.join(self.tasks)}."
            )
        return torch.tensor([self.tasks.index(task) for task in tasks], dtype=torch.int64)
