"""How a loss joins its samples, and what takes them apart again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.capture.loss_terms import LossTerm
from qkov_lightning.capture.samples import Labels, Samples

LossReduction = Literal["mean", "token_mean", "sum"]
"""How the training loss joins its samples: mean over samples, mean over target tokens, or sum."""

ReductionChoice = Literal["auto", "mean", "token_mean", "sum"]
"""A reduction, or "auto" to read it from the loss."""

TOLERANCE = 4e-3
"""Relative error up to which a number of the loss is a count of the batch: that of bfloat16."""


@dataclass(frozen=True)
class Joining:
    """How a loss joins the samples of one batch.

    Attributes:
        reduction: How.
        num_target_tokens: Of each sample, for "token_mean"; weights of the targets count.
    """

    reduction: LossReduction
    num_target_tokens: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return {
            "mean": "a mean over samples",
            "token_mean": "a mean over target tokens",
            "sum": "a sum",
        }[self.reduction]

    def scales(self, num_samples: int) -> Float[Tensor, sample]:
        """Factor per sample that turns its share of the batch's gradient into that of its own loss."""
        if self.reduction == "sum":
            return torch.ones(num_samples, dtype=torch.float64)
        if self.reduction == "mean":
            return torch.full((num_samples,), float(num_samples), dtype=torch.float64)
        counts = torch.tensor(self.num_target_tokens or (), dtype=torch.float64)
        # A sample without targets has no loss, and so a gradient of zero whatever its factor.
        return torch.where(counts > 0, counts.sum() / counts.where(counts > 0, 1.0), 0.0)


def joining(
    samples: Samples,
    choice: ReductionChoice,
    terms: Sequence[LossTerm] = (),
    token_samples: Tensor | None = None,
    likely_counts: Callable[[], tuple[int, ...] | None] = lambda: None,
) -> Joining:
    """How the loss of a batch joins its samples: as the user says, or as the loss itself shows.

    Args:
        samples: Those of the batch.
        choice: What the user says.
        terms: Reductions that the loss consists of, for "auto".
        token_samples: Sample of every token of a packed batch.
        likely_counts: Gives the target tokens of each sample by the look of the batch. If they differ, a loss
            that does not show how it joins the samples is refused.

    Returns:
        The reduction, with the target tokens of each sample where it needs them.

    Raises:
        ValueError: If token counts are needed and unknown, or the loss does not show what to undo.
    """
    given = samples.num_target_tokens
    counts = None if given is None else tuple(map(float, given))
    if choice == "token_mean" and counts is not None:
        return Joining("token_mean", counts)
    if choice in {"mean", "sum"}:
        return Joining(choice)
    shown = _distinct(_shown(terms, len(samples), token_samples), len(samples))
    if choice == "token_mean":
        counted = [one for one in shown if one.num_target_tokens is not None]
        if len(counted) == 1:
            return Joining("token_mean", counted[0].num_target_tokens)
        raise ValueError(
            'loss_reduction="token_mean" needs the number of target tokens of each sample: put it into '
            '`batch["num_target_tokens"]`, for example `(labels[:, 1:] != -100).sum(dim=1)` for a causal '
            "language model, or pass `num_target_tokens_of=<key or function of the batch>`."
        )
    if len(shown) == 1:
        return shown[0]
    if len(shown) > 1:
        raise ValueError(
            f"The loss has parts that join the samples in different ways: {' and '.join(map(str, shown))}. "
            'No factor per sample undoes both. Pass the one of the main part, for example loss_reduction="token_mean".'
        )
    if counts is None:
        likely = likely_counts()
        counts = None if likely is None or len(likely) != len(samples) else tuple(map(float, likely))
    if counts is not None and len(set(counts)) > 1:
        raise ValueError(
            f"The samples have {min(counts):g} to {max(counts):g} target tokens, and the loss does not show whether it is a "
            'mean over samples or over tokens. Pass loss_reduction="token_mean" if it is one mean over all target '
            'tokens of the batch (as the losses of transformers are), "mean" if every sample has the same weight, or '
            '"sum".'
        )
    return Joining("mean")


def check_rows(num_rows: int, labels: Labels, terms: Sequence[LossTerm]) -> None:
    """Refuse inputs whose rows are not the samples of the batch.

    Args:
        num_rows: First dimension of the inputs of the projections.
        labels: Those of the samples.
        terms: Reductions that the loss consists of.

    Raises:
        ValueError: If there are more or fewer rows than samples.
    """
    remedy = (
        "Rows that are windows, frames, views or tokens of a sample would be counted as samples. Say which sample each "
        "token belongs to: `token_samples`, an integer tensor with one entry per token of the model's input."
    )
    given = labels.num_samples
    if given is not None and given != num_rows:
        source = (
            f"{given} tasks (or sample ids) were given"
            if not isinstance(labels.tasks, str) or labels.ids is not None
            else f"The batch has {given} samples (the first dimension of its tensors)"
        )
        raise ValueError(
            f"{source}, but the inputs of the projections have {num_rows} rows: expected one row per sample, and samples along "
            f"the first dimension. {remedy}"
        )
    whole = [t.levels[-1] if t.selected is None else t.selected for t in terms if not t.is_part]
    if given is None and whole and all(weights.numel() % num_rows for weights in whole):
        raise ValueError(
            f"The inputs of the projections have {num_rows} rows, but the loss is made of {whole[0].numel()} elements: "
            f"expected a multiple of the rows. {remedy}"
        )


def _distinct(shown: Iterable[Joining], num_samples: int) -> list[Joining]:
    """Those that undo the loss in different ways."""
    distinct: list[Joining] = []
    for one in shown:
        scales = one.scales(num_samples)
        if not any(torch.allclose(scales, other.scales(num_samples), rtol=TOLERANCE) for other in distinct):
            distinct.append(one)
    return distinct


def _shown(terms: Sequence[LossTerm], num_samples: int, token_samples: Tensor | None) -> Iterable[Joining]:
    """What each part of a loss shows; nothing of parts that are not made of samples."""
    if num_samples == 1:
        return
    parts = [term for term in terms if term.is_part]
    if len(parts) == num_samples:  # a loop over the samples
        divided = all(_divided_by(term, num_samples) for term in parts)
        yield Joining("mean" if divided else "sum")
    for term in terms:
        found = None if term.is_part else _joining_of(term, num_samples, token_samples)
        if found is not None:
            yield found


def _joining_of(term: LossTerm, num_samples: int, token_samples: Tensor | None) -> Joining | None:
    def per_sample(weights: Tensor) -> tuple[float, ...] | None:
        return _per_sample(weights, num_samples, token_samples)

    if term.selected is not None:
        counts = per_sample(term.selected)
        weights = term.levels[0]
        if counts is not None and term.joined == "weighted_mean":
            spread = torch.zeros_like(term.selected).masked_scatter_(term.selected != 0, weights.flatten())
            counts = per_sample(spread)
        return _of_counts(term, counts, num_samples)
    if term.joined == "weighted_mean":
        counts = per_sample(term.levels[0])
        return None if counts is None else _by_tokens(counts)
    if term.joined == "mean":
        counts = per_sample(term.levels[0])
        # Packed samples weigh as much as they have tokens.
        if counts is None or token_samples is None:
            return None if counts is None else Joining("mean")
        return _by_tokens(counts)
    whole = per_sample(term.levels[0])
    for weights in term.levels:
        for counts in (per_sample(weights.abs()), per_sample((weights != 0).double())):
            if counts is not None and _divided_by(term, sum(counts)):
                return _by_tokens(counts)
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
    return Joining("mean" if any(_divided_by(term, number) for number in alike) else "sum")


def _by_tokens(counts: tuple[float, ...]) -> Joining:
    """A mean over target tokens, which is one over samples where all have as many."""
    alike = max(counts) - min(counts) <= TOLERANCE * max(counts)
    return Joining("mean") if alike else Joining("token_mean", counts)


def _of_counts(term: LossTerm, counts: tuple[float, ...] | None, num_samples: int) -> Joining | None:
    """A reduction of selected elements."""
    if counts is None:
        return None
    if term.joined != "sum" or _divided_by(term, sum(counts)):
        return _by_tokens(counts)
    return Joining("mean" if _divided_by(term, num_samples) else "sum")


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
