"""Tensors of an accelerator, read by the processor without waiting for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the memory of the processor, after one wait for each accelerator and type.

    >>> read_together([torch.ones(2), torch.zeros(1)])
    [tensor([1., 1.]), tensor([0.])]
    """
    read = list(tensors)
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            together.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in together.values():
        sizes = [tensors[place].numel() for place in places]
        whole = torch.cat([tensors[place].flatten() for place in places]).cpu()
        for place, part in zip(places, whole.split(sizes), strict=True):
            read[place] = part.view(tensors[place].shape)
    return read


def finest(device: torch.device) -> torch.dtype:
    """The most exact type of numbers that a device knows: Apple's has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
