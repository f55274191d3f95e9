"""Whether the samples suffice: what they can see, and what more of them would decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qkov_lightning.measure.cells import Cell

GROWTH = (1.25, 1.5, 2.0, 3.0, 4.0)
"""By how much the samples are thought to grow."""


@dataclass(frozen=True)
class Sufficiency:
    """Whether the samples suffice.

    Attributes:
        num_samples: Samples of the task that has fewest.
        visible: Rise of the loss that is called sure in a cell of median error.
        more_samples: Samples to add to each task.
        decides: Undecided cells that are expected to be decided then.
    """

    num_samples: int
    visible: float
    more_samples: int
    decides: int


def expected_of_more(
    cells: Sequence[Cell], freedom: np.ndarray, sure: Sequence[bool], alpha: float, num_samples: int
) -> Sufficiency:
    r"""What these samples can see, and what more of them would decide.

    Effects and noise are taken as normal: with effects of variance :math:`\tau^2` in units of the errors, a
    cell whose t is z now will have one of mean :math:`\sqrt{g}\, z\, \tau^2 / (\tau^2 + 1)` and variance
    :math:`1 + g\, \tau^2 / (\tau^2 + 1)` with g times the samples (empirical Bayes; the median of z squared
    gives :math:`\tau`, whatever a few large cells do).

    Args:
        cells: All cells that were judged, at least one.
        freedom: Degrees of freedom of their errors.
        sure: Which of them are sure by now.
        alpha: Share of wrong cells among the sure ones.
        num_samples: Samples of the task that has fewest.

    Returns:
        The fewest more samples that decide half of what the most would.
    """
    num_sure = sum(sure)
    error = np.array([cell.standard_error for cell in cells])
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, np.abs([cell.value for cell in cells]) / error, 0.0)
    spread = max(0.0, float(np.median(z**2)) / stats.chi2.median(1) - 1)
    kept = spread / (spread + 1)

    def bound(rejected: float) -> np.ndarray:
        return stats.t.isf(alpha * max(1.0, rejected) / len(cells) / 2, freedom)

    def decided(growth: float) -> int:
        mean, width = math.sqrt(growth) * z * kept, math.sqrt(1 + growth * kept)
        rejected = float(num_sure)
        for _ in range(10):  # each cell that is decided lowers the bound for the others
            at = bound(rejected)
            chance = stats.norm.sf((at - mean) / width) + stats.norm.sf((at + mean) / width)
            rejected = max(float(num_sure), float(chance.sum()))
        return round(float(chance[~np.array(sure)].sum()))

    most = decided(GROWTH[-1])
    growth = next(growth for growth in GROWTH if decided(growth) >= most / 2) if most else GROWTH[-1]
    more = math.ceil(num_samples * (growth - 1))
    return Sufficiency(num_samples, float(np.median(bound(float(num_sure)) * error)), more, decided(growth))
