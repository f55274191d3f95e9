"""How sure a number is: standard errors of the jackknife, and cells that surely differ from zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy import special, stats
from torch import Tensor

from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.scores.scores import SCORES

ALPHA = 0.05
"""Share of wrong cells among those that are called sure (Benjamini & Hochberg 1995)."""

CLEAR = 2.0
"""Standard errors beyond which a number is not mostly noise: a guide to the eye, corrected for nothing."""


def sure_signs(
    heatmap: InterferenceHeatmap,
    score: str,
    pairs: Sequence[tuple[str, str]] | None = None,
    alpha: float = ALPHA,
) -> dict[tuple[str, str], Float[Tensor, "layer head block"]]:
    """Which way a score with a sign surely points in every cell.

    Each value is compared with its standard error by a t test of both sides, all cells of all pairs together
    corrected by Benjamini & Hochberg (1995).

    Args:
        heatmap: What to judge.
        score: A score of which both signs mean something.
        pairs: Ordered task pairs (hurt, pushing); all pairs of different tasks by default.
        alpha: Share of wrong cells, in expectation, among those that are called sure.

    Returns:
        For every pair, 1 where the tasks surely interfere, -1 where they surely help, 0 where the samples do
        not tell, NaN without data.

    Raises:
        ValueError: If the heatmap does not know the score, or its sign means nothing.
    """
    if not SCORES[score].signed:
        raise ValueError(f"{score!r} has no sign, expected one of {', '.join(signed_scores())}.")
    pairs = heatmap.task_pairs if pairs is None else pairs
    values = torch.stack([heatmap.values(a, b, score) for a, b in pairs])
    errors = torch.stack([heatmap.errors(a, b, score) for a, b in pairs])
    freedom = torch.stack([degrees_of_freedom(heatmap, a, b) for a, b in pairs])
    known = ~values.isnan()
    signs = torch.full_like(values, torch.nan)
    if known.any():
        # Without an error, any value but zero is sure.
        t = torch.where(
            errors[known] > 0, values[known].abs() / errors[known], values[known].sign().abs() * torch.inf
        ).nan_to_num(nan=0.0, posinf=torch.inf)
        p_values = 2 * special.stdtr(freedom[known].numpy(), -t.numpy())
        sure = torch.from_numpy(stats.false_discovery_control(p_values) <= alpha)
        signs[known] = values[known].sign() * sure * (-1 if SCORES[score].falling else 1)
    return dict(zip(pairs, signs, strict=True))


def signed_scores() -> list[str]:
    """Scores of which both signs mean something."""
    return [name for name, score in SCORES.items() if score.signed]


def degrees_of_freedom(heatmap: InterferenceHeatmap, a: str, b: str) -> Float[Tensor, "layer head block"]:
    """Those of the standard errors of a pair: of the groups left out, or of the smaller task."""
    counts = heatmap.num_samples[[heatmap.tasks.index(task) for task in (a, b)]].amin(dim=0)
    known = heatmap.notes.get("degrees_of_freedom")
    if isinstance(known, int) and known > 0:
        return torch.full_like(counts, known)
    return (counts - 1).clamp(min=1)


def jackknife_error(replicates: Float[Tensor, group * quantity]) -> Float[Tensor, "*quantity"]:
    r"""Standard error of a quantity, with one degree of freedom less than there are groups.

    .. math:: s^2 = \frac{G - 1}{G} \sum_{g=1}^{G} (\theta_{-g} - \bar\theta)^2

    with :math:`\theta_{-g}` the quantity without the g-th group of samples (Quenouille 1949, Tukey 1958).
    """
    return (replicates.var(dim=0, correction=0) * (len(replicates) - 1)).sqrt()


def largest_clear(values: Tensor, errors: Tensor) -> float:
    """Largest size of a value beyond ``CLEAR`` standard errors; of any value if none is."""
    sizes = values[values.isfinite()].abs()
    clear = sizes[sizes >= CLEAR * errors[values.isfinite()]]
    chosen = clear if clear.numel() else sizes
    return float(chosen.max()) if chosen.numel() else 0.0


def largest_clear_of(heatmap: InterferenceHeatmap, score: str) -> float:
    """The same of a score, over all pairs of different tasks."""
    values, errors = (
        torch.stack([of(a, b, score) for a, b in heatmap.task_pairs])
        for of in (heatmap.values, heatmap.errors)
    )
    return largest_clear(values, errors)
