"""Deliveries of some features of a map, put in their place among all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from qkov_lightning.capture.factors import Delivery
from qkov_lightning.heads.maps import LinearMap, widened


def side_by_side(one: LinearMap, by_part: Mapping[str, list[Delivery]]) -> list[Delivery]:
    """The deliveries of a map; those of its parts side by side, added up where they have the same input."""
    deliveries: list[Delivery] = []
    for part in one.parts:
        own = by_part.get(part.name, [])
        if len(one.parts) > 1:
            features = one.starts[part.name] + torch.arange(part.num_outputs)
            own = [replace(d, grad_output=widened(d.grad_output, features, one.num_outputs)) for d in own]
        deliveries += own
    return _added_up(deliveries) if len(one.parts) > 1 else deliveries


def _added_up(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Gradients of disjoint features at the same input, in one."""
    by_input: dict[tuple[object, ...], Delivery] = {}
    for delivery in deliveries:
        t = delivery.activation
        key = (t.data_ptr(), t.shape, t.stride(), delivery.scale, delivery.adds_up)
        known = by_input.get(key)
        both = (
            delivery
            if known is None
            else replace(known, grad_output=known.grad_output + delivery.grad_output)
        )
        by_input[key] = both
    return list(by_input.values())
