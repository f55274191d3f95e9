"""Which cells do harm for sure: what the scores of a heatmap come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.heads.projections import BLOCKS
from qkov_lightning.measure.cells import Cell
from qkov_lightning.measure.certainty import ALPHA, degrees_of_freedom, jackknife_error, sure_signs
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.names import pair_label
from qkov_lightning.measure.sufficiency import Sufficiency, expected_of_more
from qkov_lightning.scores.scores import HARM


@dataclass(frozen=True)
class Part:
    """What the cells of a head, a layer or a block come to together.

    Attributes:
        name: As in ``L3.H1``, ``L3`` or ``Q``.
        rise: Predicted rise of the loss. Under grouped-query attention, a shared K or V head counts in equal
            parts for the query heads that it serves.
        standard_error: Of the rise, as in :class:`PairVerdict`.
        num_cells: Its cells that were tested.
        num_harmful: Those that surely hurt.
        num_helpful: Those that surely help.
    """

    name: str
    rise: float
    standard_error: float
    num_cells: int
    num_harmful: int
    num_helpful: int


@dataclass(frozen=True, repr=False)
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
    def tasks(self) -> tuple[str, str]:
        """The task that is hurt or helped, and the one that pushes."""
        return self.task_a, self.task_b

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

    def __repr__(self) -> str:
        rise = f"{self.rise:+.3g} ± {self.standard_error:.1g}"
        counts = f"{len(self.harmful)} cells hurt, {len(self.helpful)} help, {self.num_undecided} undecided"
        return f"<{pair_label(self.task_a, self.task_b)}: rise of the loss {rise}; {counts}>"

    def share(self, cell: Cell) -> float:
        """Share of the sure harm of the pair that a cell carries; 0 where it does none."""
        return cell.value / self.sure_harm if cell in self.harmful else 0.0


@dataclass(frozen=True, repr=False)
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
    def worst(self) -> tuple[Cell, ...]:
        """What to look at first: those with sure harm, or else the undecided ones; the largest rise first."""
        undecided = (cell for pair in self.pairs for cell in pair.undecided)
        return self.harmful or tuple(sorted(undecided, key=lambda cell: -cell.value))

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

    def __repr__(self) -> str:
        counts = f"{len(self.harmful)} of {self.num_cells} cells hurt, {len(self.helpful)} help"
        return f"<Verdict: {counts}; {', '.join(map(repr, self.pairs))}>"

    def pair(self, a: str, b: str) -> PairVerdict:
        """The verdict on one pair.

        Raises:
            KeyError: If it was not judged.
        """
        for pair in self.pairs:
            if pair.tasks == (a, b):
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
    signs = sure_signs(heatmap, HARM, pairs, alpha)
    judged = [_pair(heatmap, a, b, signs[a, b]) for a, b in pairs]
    judged.sort(key=lambda pair: (-pair.sure_harm, -pair.rise))
    return Verdict(tuple(judged), alpha, _sufficiency(heatmap, judged, alpha))


def _sufficiency(
    heatmap: InterferenceHeatmap, judged: Sequence[PairVerdict], alpha: float
) -> Sufficiency | None:
    cells: list[Cell] = []
    freedom: list[float] = []
    for pair in judged:
        known = degrees_of_freedom(heatmap, pair.task_a, pair.task_b)
        cells += pair.cells
        freedom += [float(known[_at(cell)]) for cell in pair.cells]
    if not cells:
        return None
    sure = {cell for pair in judged for cell in (*pair.harmful, *pair.helpful)}
    num_samples = min(heatmap.samples_per_task.values())
    return expected_of_more(cells, np.array(freedom), [cell in sure for cell in cells], alpha, num_samples)


def _at(cell: Cell) -> tuple[int, int, int]:
    return cell.layer, cell.head, BLOCKS.index(cell.block)


def _pair(
    heatmap: InterferenceHeatmap, a: str, b: str, signs: Float[Tensor, "layer head block"]
) -> PairVerdict:
    cells = heatmap.cells(a, b, HARM)
    everything = torch.ones_like(signs)

    def part(name: str, weight: Float[Tensor, "layer head block"]) -> Part:
        own = signs[weight > 0]
        rise, error = _sum(heatmap, a, b, weight)
        counts = (int(which.sum()) for which in (~own.isnan(), own > 0, own < 0))
        return Part(name, rise, error, *counts)

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
        harmful=tuple(cell for cell in cells if signs[_at(cell)] > 0),
        undecided=tuple(cell for cell in cells if signs[_at(cell)] == 0),
        helpful=tuple(cell for cell in reversed(cells) if signs[_at(cell)] < 0),
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
