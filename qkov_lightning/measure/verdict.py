"""Which cells do harm for sure: what the scores of a heatmap come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import special, stats
from torch import Tensor

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.cells import Cell
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.jackknife import jackknife_error
from qkov_lightning.measure.sufficiency import Sufficiency, expected_of_more

HARM = "loss_rise"
"""The score that says how much a task is hurt: the only one in units of its loss."""

ALPHA = 0.05
"""Share of wrong cells among those that are called sure (Benjamini & Hochberg 1995)."""


@dataclass(frozen=True)
class Part:
    """What the cells of a head, a layer or a block come to together.

    Attributes:
        name: As in ``L3.H1``, ``L3`` or ``Q``.
        rise: Predicted rise of the loss. Under grouped-query attention, a shared K or V head counts in equal
            parts for the query heads that it serves.
        standard_error: Of the rise, as in :class:`PairVerdict`.
        num_harmful: Its cells that surely hurt.
        num_helpful: Its cells that surely help.
    """

    name: str
    rise: float
    standard_error: float
    num_harmful: int
    num_helpful: int


@dataclass(frozen=True)
class PairVerdict:
    """What training ``task_b`` does to ``task_a``, cell by cell.

    Attributes:
        task_a: Task that is hurt or helped.
        task_b: Task that pushes.
        harmful: Cells in which the loss of task A rises for sure, the largest rise first.
        undecided: Cells of which the samples do not tell whether they help or hurt, the largest rise first.
        helpful: Cells in which the loss falls for sure, the largest fall first.
        rise: Predicted rise of the loss of task A, all cells together.
        standard_error: Of the rise. Where the heatmap does not know how cells vary together, the sum of their
            errors, which it is at most.
        heads: The same by head, the largest rise first.
        layers: By layer.
        blocks: By block.
    """

    task_a: str
    task_b: str
    harmful: tuple[Cell, ...]
    undecided: tuple[Cell, ...]
    helpful: tuple[Cell, ...]
    rise: float
    standard_error: float
    heads: tuple[Part, ...]
    layers: tuple[Part, ...]
    blocks: tuple[Part, ...]

    @property
    def num_cells(self) -> int:
        """Cells that were tested."""
        return len(self.harmful) + len(self.undecided) + len(self.helpful)

    @property
    def num_undecided(self) -> int:
        """Cells of which the samples do not tell whether they help or hurt."""
        return len(self.undecided)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells in the order in which to look at them: sure harm first, sure help last."""
        return (*self.harmful, *self.undecided, *reversed(self.helpful))

    @property
    def sure_harm(self) -> float:
        """Rise of the loss in the cells that surely hurt."""
        return math.fsum(cell.value for cell in self.harmful)

    def share(self, cell: Cell) -> float:
        """Share of the sure harm of the pair that a cell carries; 0 where it does none."""
        return cell.value / self.sure_harm if cell in self.harmful else 0.0


@dataclass(frozen=True)
class Verdict:
    """What the task pairs of a heatmap do to each other.

    Attributes:
        pairs: Every judged pair, the one with the most sure harm first, then by predicted rise.
        alpha: Share of wrong cells among the sure ones.
        sufficiency: Whether the samples suffice; None without a cell.
    """

    pairs: tuple[PairVerdict, ...]
    alpha: float
    sufficiency: Sufficiency | None

    @property
    def harmful(self) -> tuple[Cell, ...]:
        """Cells with sure harm in any pair, the largest rise of a loss first."""
        return tuple(sorted((cell for pair in self.pairs for cell in pair.harmful), key=lambda c: -c.value))

    @property
    def helpful(self) -> tuple[Cell, ...]:
        """Cells with sure help in any pair, the largest fall of a loss first."""
        return tuple(sorted((cell for pair in self.pairs for cell in pair.helpful), key=lambda c: c.value))

    @property
    def num_cells(self) -> int:
        """Cells that were tested, over all pairs."""
        return sum(pair.num_cells for pair in self.pairs)

    @property
    def rise(self) -> float:
        """Predicted rise of all losses, over all pairs and cells."""
        return math.fsum(pair.rise for pair in self.pairs)

    @property
    def most_affected(self) -> str | None:
        """Task that is hurt most for sure, whoever pushes; None if none is."""
        return self._most(lambda pair: pair.task_a)

    @property
    def most_pushing(self) -> str | None:
        """Task that hurts the others most for sure; None if none does."""
        return self._most(lambda pair: pair.task_b)

    def _most(self, task_of: Callable[[PairVerdict], str]) -> str | None:
        harm: dict[str, float] = {}
        for pair in self.pairs:
            harm[task_of(pair)] = harm.get(task_of(pair), 0.0) + pair.sure_harm
        worst = max(harm, key=harm.__getitem__, default=None)
        return worst if worst is not None and harm[worst] > 0 else None

    def pair(self, a: str, b: str) -> PairVerdict:
        """The verdict on one pair.

        Raises:
            KeyError: If it was not judged.
        """
        for pair in self.pairs:
            if (pair.task_a, pair.task_b) == (a, b):
                return pair
        raise KeyError(f"{a} <- {b} was not judged.")


def judge(
    heatmap: InterferenceHeatmap, pairs: Sequence[tuple[str, str]] | None = None, alpha: float = ALPHA
) -> Verdict:
    """Tell the cells in which one task surely hurts or helps another from those that the samples leave open.

    Each cell's predicted rise of the loss (``loss_rise``) is compared with its standard error by a t test of
    both sides, all cells of all pairs together corrected by Benjamini & Hochberg (1995).

    Args:
        heatmap: What to judge.
        pairs: Ordered task pairs (hurt, pushing); all pairs of different tasks by default.
        alpha: Share of wrong cells, in expectation, among those that are called sure.

    Returns:
        The verdict. Cells without data are not judged.

    Raises:
        ValueError: If the heatmap has no ``loss_rise``, or does not know a task.
    """
    if HARM not in heatmap.scores:
        raise ValueError(
            f"The heatmap has no {HARM!r} ({', '.join(heatmap.scores)}), which says how much a task is hurt: measure it "
            "again."
        )
    pairs = heatmap.task_pairs if pairs is None else pairs
    cells = [heatmap.cells(a, b, HARM) for a, b in pairs]
    every = [cell for own in cells for cell in own]
    freedom = np.array([_freedom(heatmap, cell) for cell in every])
    p_values = _p_values(every, freedom)
    corrected = stats.false_discovery_control(p_values) if every else p_values
    sure = dict(zip(every, (corrected <= alpha).tolist(), strict=True))
    judged = [_pair(heatmap, a, b, own, sure) for (a, b), own in zip(pairs, cells, strict=True)]
    judged.sort(key=lambda pair: (-pair.sure_harm, -pair.rise))
    num_samples = min(heatmap.samples_per_task.values(), default=0)
    sufficiency = expected_of_more(every, freedom, list(sure.values()), alpha, num_samples) if every else None
    return Verdict(tuple(judged), alpha, sufficiency)


def _p_values(cells: Sequence[Cell], freedom: np.ndarray) -> np.ndarray:
    value = np.array([cell.value for cell in cells])
    error = np.array([cell.standard_error for cell in cells])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, np.abs(value) / error, np.where(value == 0, 0.0, np.inf))
    return 2 * special.stdtr(freedom, -t)


def _freedom(heatmap: InterferenceHeatmap, cell: Cell) -> int:
    """Degrees of freedom of a standard error: those of the groups left out, or of the smaller task."""
    known = heatmap.notes.get("degrees_of_freedom")
    if isinstance(known, int) and known > 0:
        return known
    counts = heatmap.num_samples[:, cell.layer, cell.head, BLOCKS.index(cell.block)]
    return max(1, int(min(counts[heatmap.tasks.index(task)] for task in (cell.task_a, cell.task_b))) - 1)


def _pair(
    heatmap: InterferenceHeatmap, a: str, b: str, cells: Sequence[Cell], sure: dict[Cell, bool]
) -> PairVerdict:
    everything = torch.ones_like(heatmap.values(a, b, HARM))
    marks = torch.zeros_like(everything)
    for cell in cells:
        marks[cell.layer, cell.head, BLOCKS.index(cell.block)] = math.copysign(sure[cell], cell.value)

    def part(name: str, weight: Float[Tensor, "layer head block"]) -> Part:
        own = marks * (weight > 0)
        rise, error = _sum(heatmap, a, b, weight)
        return Part(name, rise, error, int((own > 0).sum()), int((own < 0).sum()))

    def only(*where: int | slice) -> Float[Tensor, "layer head block"]:
        weight = torch.zeros_like(everything)
        weight[where] = 1
        return weight

    def largest_first(parts: list[Part]) -> tuple[Part, ...]:
        return tuple(sorted(parts, key=lambda one: -one.rise))

    layers = sorted({cell.layer for cell in cells})
    rise, error = _sum(heatmap, a, b, everything)
    return PairVerdict(
        a,
        b,
        harmful=tuple(cell for cell in cells if sure[cell] and cell.value > 0),
        undecided=tuple(cell for cell in cells if not sure[cell] or cell.value == 0),
        helpful=tuple(cell for cell in reversed(cells) if sure[cell] and cell.value < 0),
        rise=rise,
        standard_error=error,
        heads=largest_first([part(name, weight) for name, weight in _head_weights(heatmap, layers)]),
        layers=largest_first([part(f"L{layer}", only(layer)) for layer in layers]),
        blocks=largest_first([
            part(block, only(slice(None), slice(None), index))
            for index, block in enumerate(BLOCKS)
            if any(cell.block == block for cell in cells)
        ]),
    )


def _head_weights(
    heatmap: InterferenceHeatmap, layers: Sequence[int]
) -> list[tuple[str, Float[Tensor, "layer head block"]]]:
    """For each query head, what share of each cell is its own."""
    result = []
    for layer in layers:
        infos = heatmap.layers[layer].blocks
        for head in range(max(info.num_heads * info.query_group for info in infos.values())):
            weight = torch.zeros(heatmap.num_layers, heatmap.num_heads, len(BLOCKS))
            for block, info in infos.items():
                if head // info.query_group < info.num_heads:
                    weight[layer, head // info.query_group, BLOCKS.index(block)] = 1 / info.query_group
            result.append((f"L{layer}.H{head}", weight))
    return result


def _sum(
    heatmap: InterferenceHeatmap, a: str, b: str, weight: Float[Tensor, "layer head block"]
) -> tuple[float, float]:
    """Rise in some cells together, and its standard error."""
    rise = float((heatmap.values(a, b, HARM).nan_to_num() * weight).sum())
    replicates = heatmap.replicates.get(HARM)
    if replicates is None:
        return rise, float((heatmap.errors(a, b, HARM).nan_to_num() * weight).sum())
    own = replicates[:, heatmap.tasks.index(a), heatmap.tasks.index(b)].nan_to_num()
    return rise, float(jackknife_error((own * weight).flatten(1).sum(dim=1)))
