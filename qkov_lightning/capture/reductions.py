"""How a loss joins its samples: as the user says, or as the loss shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from qkov_lightning.capture.joinings import Joining, joinings
from qkov_lightning.capture.loss_terms import LossTerm
from qkov_lightning.capture.samples import Labels, Samples

ReductionChoice = Literal["auto", "mean", "token_mean", "sum"]
"""A reduction, or "auto" to read it from the loss."""


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
        return Joining("token_mean", counts, counts)
    shown = joinings(terms, len(samples), token_samples)

    def likely() -> tuple[float, ...] | None:
        found = likely_counts()
        return None if found is None or len(found) != len(samples) else tuple(map(float, found))

    if choice == "sum":
        return Joining("sum", num_terms=(1.0,) * len(samples))
    if choice == "mean":
        known = next((one.num_terms for one in shown if one.reduction == "mean"), None)
        return Joining("mean", num_terms=counts or known or likely())
    if choice == "token_mean":
        counted = [one for one in shown if one.num_target_tokens is not None]
        if len(counted) == 1:
            return counted[0]
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
    counts = counts or likely()
    if counts is not None and len(set(counts)) > 1:
        raise ValueError(
            f"The samples have {min(counts):g} to {max(counts):g} target tokens, and the loss does not show whether it is a "
            'mean over samples or over tokens. Pass loss_reduction="token_mean" if it is one mean over all target '
            'tokens of the batch (as the losses of transformers are), "mean" if every sample has the same weight, or '
            '"sum".'
        )
    return Joining("mean", num_terms=counts)


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
