"""How a loss joins its samples, and what takes them apart again."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.capture.samples import Samples

LossReduction = Literal["mean", "token_mean", "sum"]
"""How the training loss joins its samples: mean over samples, mean over target tokens, or sum."""


def sample_scales(samples: Samples, loss_reduction: LossReduction) -> Float[Tensor, sample]:
    """Factor per sample that turns its share of the batch's gradient into the gradient of its own loss.

    Raises:
        ValueError: If token counts are needed and unknown.
    """
    if loss_reduction == "sum":
        return torch.ones(len(samples), dtype=torch.float64)
    if loss_reduction == "mean":
        return torch.full((len(samples),), float(len(samples)), dtype=torch.float64)
    if samples.num_target_tokens is None:
        raise ValueError(
            'loss_reduction="token_mean" needs the number of target tokens of each sample: put it into '
            '`batch["num_target_tokens"]`, for example `(labels[:, 1:] != -100).sum(dim=1)` for a causal '
            "language model, or pass `num_target_tokens_of=<key or function of the batch>`."
        )
    counts = torch.tensor(samples.num_target_tokens, dtype=torch.float64)
    # A sample without targets has no loss, and so a gradient of zero whatever its factor.
    return torch.where(counts > 0, counts.sum() / counts.clamp(min=1), 0.0)
