"""Which features move something, from derivatives, whatever a normalisation carries to the others.

A normalisation over all features adds to the derivative of every feature i a multiple of its value, and a
constant: -c y_i - d, with one c and d for each token. Features that have nothing but that do not move it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NUM_TRIES = 48
"""Pairs of features from which c and d are guessed."""

MAX_ROWS = 12
"""Tokens that must agree, at most: those with the largest derivatives."""

LEAST_GROUP = 4
"""Two features always agree, and a third may by chance."""


def acting(
    gradient: Float[Tensor, "token feature"], value: Float[Tensor, "token feature"], normalised: bool
) -> Bool[Tensor, feature]:
    """The features that move what the gradient is of.

    Args:
        gradient: Its derivative with respect to the features.
        value: The features.
        normalised: Whether to see through a normalisation over all features.
    """
    inside = (gradient != 0).any(dim=0)
    if not normalised or not bool(inside.any()):
        return inside
    rows = gradient.abs().sum(dim=1).topk(min(MAX_ROWS, len(gradient))).indices
    rows = rows[gradient[rows].abs().sum(dim=1) > 0]
    g, y = gradient[rows].double(), value[rows].double()
    while True:
        carried = _carried_along(g, y, inside, torch.finfo(gradient.dtype).eps ** 0.5)
        if int(carried.sum()) < LEAST_GROUP:
            return inside
        inside = inside & ~carried


def _carried_along(
    g: Float[Tensor, "row feature"],
    y: Float[Tensor, "row feature"],
    among: Bool[Tensor, feature],
    limit: float,
) -> Bool[Tensor, feature]:
    """The largest group of features whose derivatives have one c and d in each row."""
    places = among.nonzero().flatten()
    if len(places) < LEAST_GROUP:
        return torch.zeros_like(among)
    generator = torch.Generator().manual_seed(len(places))
    shuffled = torch.rand(NUM_TRIES, len(places), generator=generator).argsort(dim=1)
    pairs = places[shuffled[:, :2].to(places.device)]
    (g_r, g_s), (y_r, y_s) = (t[:, pairs].permute(2, 1, 0) for t in (g, y))  # [pair's place][try, row]
    slope = (g_r - g_s) / torch.where(y_r == y_s, torch.inf, y_r - y_s)
    constant = g_r - slope * y_r
    predicted = slope[:, :, None] * y + constant[:, :, None]
    size = g.abs() + (slope[:, :, None] * y).abs() + constant.abs()[:, :, None]
    agrees = ((g - predicted).abs() <= limit * size).all(dim=1) & among
    return agrees[agrees.sum(dim=1).argmax()]
