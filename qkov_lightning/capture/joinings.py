"""How the parts of a loss join its samples, from what their autograd graph shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.capture.loss_terms import LossTerm

LossReduction = Literal["mean", "token_mean", "sum"]
"""How the training loss joins its samples: mean over samples, mean over target tokens, or sum."""

TOLERANCE = 4e-3
"""Relative error up to which a number of the loss is a count of the batch: that of bfloat16."""


@dataclass(frozen=True)
class Joining:
    """How a loss joins the samples of one batch.

    Attributes:
        reduction: How.
        num_target_tokens: Of each sample, for "token_mean"; weights of the targets count.
        num_terms: Terms that each sample's own loss is the mean of, 1 if it is their sum; None if unknown.
    """

    reduction: LossReduction
    num_target_tokens: tuple[float, ...] | None = None
    num_terms: tuple[float, ...] | None = None

    def __str__(self) -> str:
        how = {
            "mean": "a mean over samples",
            "token_mean": "a mean over target tokens",
            "sum": "a sum",
        }
        return how[self.reduction]

    @property
    def own_loss(self) -> str:
        """What each sample's own loss is, in words."""
        if self.num_terms is None:
            return "of how many terms each sample's own loss is the mean is not known (1 is assumed)"
        low, high = min(self.num_terms), max(self.num_terms)
        if high <= 1:
            return "each sample's own loss has one term, or is a sum"
        return (
            f"each sample's own loss is a mean of {low:.4g}"
            + (f" to {high:.4g}" if high > low else "")
            + " terms"
        )

    def terms(self, num_samples: int) -> Float[Tensor, sample]:
        """Terms that each sample's own loss is the mean of; 1 where that is unknown, or there is none."""
        known = torch.tensor(self.num_terms or (1.0,) * num_samples, dtype=torch.float64)
        return torch.where(known > 0, known, 1.0)

    def scales(self, num_samples: int) -> Float[Tensor, sample]:
        """Factor per sample that turns its share of the batch's gradient into that of its own loss."""
        if self.reduction == "sum":
            return torch.ones(num_samples, dtype=torch.float64)
        if self.reduction == "mean":
            return torch.full((num_samples,), float(num_samples), dtype=torch.float64)
        counts = torch.tensor(self.num_target_tokens or (), dtype=torch.float64)
        # A sample without targets has no loss, and so a gradient of zero whatever its factor.
        return torch.where(counts > 0, counts.sum() / counts.where(counts > 0, 1.0), 0.0)


def joinings(terms: Sequence[LossTerm], num_samples: int, token_samples: Tensor | None) -> list[Joining]:
    """How the parts of a loss join its samples: those that undo it in different ways."""
    distinct: list[Joining] = []
    for one in _shown(terms, num_samples, token_samples):
        scales = one.scales(num_samples)
        if not any(torch.allclose(scales, other.scales(num_samples), rtol=TOLERANCE) for other in distinct):
            distinct.append(one)
    return distinct


def _shown(terms: Sequence[LossTerm], num_samples: int, token_samples: Tensor | None) -> Iterable[Joining]:
    """What each part of a loss shows; nothing of parts that are not made of samples."""
    parts = [term for term in terms if term.is_part]
    if len(parts) == num_samples > 1:  # a loop over the samples
        divided = all(_divided_by(term, num_samples) for term in parts)
        sizes = {
            _num_terms(part.levels[-1], (_whole_divisor(part),), lambda own: (float(own.sum()),))
            for part in parts
        }
        # Which part is which sample is not known: their terms are, if all have as many.
        alike = (sizes.pop() or (1.0,)) * num_samples if len(sizes) == 1 else None
        yield Joining("mean" if divided else "sum", num_terms=alike)
    # The first says how many terms there are: the log-likelihood, rather than what smoothes it.
    for term in sorted(terms, key=lambda term: term.joined != "weighted_mean"):
        found = None if term.is_part else _joining_of(term, num_samples, token_samples)
        if found is not None:
            yield found


def _joining_of(term: LossTerm, num_samples: int, token_samples: Tensor | None) -> Joining | None:
    def per_sample(weights: Tensor) -> tuple[float, ...] | None:
        return _per_sample(weights, num_samples, token_samples)

    def num_terms(divisors: Sequence[float]) -> tuple[float, ...] | None:
        weights: Tensor | None = term.levels[-1]
        if term.selected is not None and term.levels[-1].numel() != term.selected.numel():
            weights = _spread(term.selected, term.levels[-1])
        return None if weights is None else _num_terms(weights, divisors, per_sample)

    if term.selected is not None:
        counts = per_sample(term.selected)
        if counts is not None and term.joined == "weighted_mean":
            spread = _spread(term.selected, term.levels[0])
            counts = None if spread is None else per_sample(spread)
        return _of_counts(term, counts, num_samples, num_terms)
    if term.joined == "weighted_mean":
        counts = per_sample(term.levels[0])
        return None if counts is None else _by_tokens(counts, num_terms(counts))
    if term.joined == "mean":
        counts = per_sample(term.levels[0])
        # Packed samples weigh as much as they have tokens.
        if counts is None or token_samples is None:
            return None if counts is None else Joining("mean", num_terms=num_terms(counts))
        return _by_tokens(counts, num_terms(counts))
    whole = per_sample(term.levels[0])
    for weights in term.levels:
        for counts in (per_sample(weights.abs()), per_sample((weights != 0).double())):
            if counts is not None and _divided_by(term, sum(counts)):
                return _by_tokens(counts, num_terms(counts))
    if whole is None:
        return None
    # By the samples, or by what each of them has the same number of, padding and all.
    sizes = {
        num_samples * math.prod(weights.shape[1:i])
        for weights in term.levels
        for i in range(weights.ndim + 1)
    }
    sizes |= {math.prod(weights.shape[:i]) for weights in term.levels for i in range(1, weights.ndim + 1)}
    alike = {num_samples, *(weights.numel() for weights in term.levels), *sizes}
    number = next((number for number in sorted(alike) if _divided_by(term, number)), None)
    if number is None:
        return Joining("sum", num_terms=num_terms((1.0,) * num_samples))
    return Joining("mean", num_terms=num_terms((number / num_samples,) * num_samples))


def _by_tokens(counts: tuple[float, ...], num_terms: tuple[float, ...] | None) -> Joining:
    """A mean over target tokens, which is one over samples where all have as many."""
    alike = max(counts) - min(counts) <= TOLERANCE * max(counts)
    return Joining("mean", None, num_terms) if alike else Joining("token_mean", counts, num_terms)


def _num_terms(
    weights: Tensor,
    divisors: Sequence[float],
    per_sample: Callable[[Tensor], tuple[float, ...] | None],
) -> tuple[float, ...] | None:
    r"""Terms that each sample's own loss is the mean of.

    Of a loss :math:`\sum_e w_e \ell_e`, :math:`\sum_e w_e / \sum_e w_e^2`: T for a mean over T elements, 1
    for a sum. See :func:`~qkov_lightning.scores.scores.forgetting` for what it is needed for.

    Args:
        weights: Those of the elements, up to what each sample's are divided by.
        divisors: What that is.
        per_sample: Sums of the elements of each sample.
    """
    sums, squares = per_sample(weights.abs()), per_sample(weights.square())
    if sums is None or squares is None or len(sums) != len(divisors):
        return None
    parts = zip(divisors, sums, squares, strict=True)
    return tuple(divisor * own / square if square else 1.0 for divisor, own, square in parts)


def _of_counts(
    term: LossTerm,
    counts: tuple[float, ...] | None,
    num_samples: int,
    num_terms: Callable[[Sequence[float]], tuple[float, ...] | None],
) -> Joining | None:
    """A reduction of selected elements."""
    if counts is None:
        return None
    if term.joined != "sum" or _divided_by(term, sum(counts)):
        return _by_tokens(counts, num_terms(counts))
    return Joining("mean" if _divided_by(term, num_samples) else "sum", None, num_terms((1.0,) * num_samples))


def _spread(selected: Tensor, weights: Tensor) -> Tensor | None:
    """Weights of selected elements, at their places in the whole."""
    if weights.numel() != int((selected != 0).sum()):
        return None
    return torch.zeros_like(selected).masked_scatter_(selected != 0, weights.flatten().to(selected))


def _whole_divisor(part: LossTerm) -> float:
    """What the elements of a part that is one sample are divided by."""
    total = float(part.levels[0].sum())
    return 1.0 if part.joined == "sum" and not _divided_by(part, total) else total


def _divided_by(term: LossTerm, number: float | int) -> bool:
    return any(
        _equal(divisor, float(number)) for divisor in (*term.divisors, math.prod(term.divisors, start=1.0))
    )


def _per_sample(weights: Tensor, num_samples: int, token_samples: Tensor | None) -> tuple[float, ...] | None:
    """Sum of the weights of each sample's elements; None if the elements are no multiple of the samples."""
    if token_samples is None:
        if weights.numel() % num_samples:
            return None
        return tuple(weights.reshape(num_samples, -1).sum(dim=1).tolist())
    whole = token_samples.cpu()
    for sample in (whole, whole[..., 1:]):  # targets of a causal language model are shifted by one
        if weights.numel() == sample.numel():
            own = sample.flatten()
            sums = torch.zeros(num_samples, dtype=torch.float64)
            return tuple(sums.index_add_(0, own.clamp(min=0), weights.flatten() * (own >= 0)).tolist())
    return None


def _equal(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * abs(other)
