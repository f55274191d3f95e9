"""Where sums are while training captures, and what they take: a device, host memory, or a mapped file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qkov_lightning.store.files import CacheError
from qkov_lightning.store.generations import KINDS

CHUNK = 16 * 2**20
"""Bytes that are written to a file at once."""

SETS_ON_DISK = 6
"""Sums of a task on disk at once, at most: two for each of two checkpoints, and two of the present."""

Sums = Mapping[str, Float[Tensor, "3 head weight"]]
"""Sums of one task, by name of the stored projection."""


def sums_bytes(num_weights: int, num_tasks: int, itemsize: int = 4) -> int:
    """What the sums of some tasks take in memory."""
    return len(KINDS) * itemsize * num_weights * num_tasks


def sums_disk_bytes(num_weights: int, num_tasks: int, max_memory_bytes: int, itemsize: int = 4) -> int:
    """What the sums of some tasks may take on disk: those beyond the memory are there, too."""
    whole = sums_bytes(num_weights, num_tasks, itemsize)
    return whole * (SETS_ON_DISK if whole <= max_memory_bytes else SETS_ON_DISK + 1)


class SumMemory:
    """Gives out memory for the sums of one task after the other.

    Args:
        path: A file to map; it has no name any more while it is mapped.
        sizes: Heads of each projection, and weights of a head.
        max_bytes: What may be in memory; the rest is mapped from files.
    """

    def __init__(self, path: Path, sizes: Mapping[str, tuple[int, int]], max_bytes: int) -> None:
        self._path, self._sizes, self._max_bytes = path, sizes, max_bytes
        self._num_bytes = 0

    def allocate(self, dtype: torch.dtype, device: torch.device) -> Sums:
        """Zeros for the sums of one more task.

        Raises:
            CacheError: If a file would be needed, and the disk refuses.
        """
        size = len(KINDS) * sum(heads * weights for heads, weights in self._sizes.values())
        num_bytes = size * dtype.itemsize
        if self._num_bytes + num_bytes <= self._max_bytes:
            self._num_bytes += num_bytes
            has_room = free_bytes(device) >= 2 * num_bytes
            flat = torch.zeros(size, dtype=dtype, device=device if has_room else "cpu")
        else:
            flat = self._mapped(size, dtype)
        views, start = {}, 0
        for name, (heads, weights) in self._sizes.items():
            stop = start + len(KINDS) * heads * weights
            views[name] = flat[start:stop].view(len(KINDS), heads, weights)
            start = stop
        return views

    def release(self) -> None:
        """Everything that was given out is given back."""
        self._num_bytes = 0

    def _mapped(self, size: int, dtype: torch.dtype) -> Tensor:
        """From a file without holes: on a full disk, writing to a mapped one would end the process.

        Raises:
            CacheError: If the disk refuses.
        """
        num_bytes = size * dtype.itemsize
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("wb") as file:
                for start in range(0, num_bytes, CHUNK):
                    file.write(bytes(min(CHUNK, num_bytes - start)))
            flat = torch.from_file(str(self._path), shared=True, size=size, dtype=dtype)
        except OSError as error:
            raise CacheError(f"{self._path} cannot be written: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        return flat


def free_bytes(device: torch.device) -> int:
    """Memory of an accelerator that nobody uses; 0 where it does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
