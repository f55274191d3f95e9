"""Numbers of an accelerator: read by the processor all at once, and summed as exactly as on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


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
    """The most exact type of numbers that a device knows."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def summing_device(device: torch.device | str) -> torch.device:
    """Where sums in float64 run: on the device, or on the processor if the device has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its ``summing_device``."""
    return tensor.to(summing_device(tensor.device)).double()
