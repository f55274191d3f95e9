"""What a batch says about its samples without being asked: how many they are, and what each of them is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that is no target, by convention of torch and transformers."""


def entries(batch: object) -> Iterator[Tensor | np.ndarray | list[object] | tuple[object, ...]]:
    """The tensors, arrays and lists of plain values that a batch holds, at any depth."""
    if isinstance(batch, (Tensor, np.ndarray)):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from entries(value)
    elif isinstance(batch, (list, tuple)):
        if batch and all(isinstance(value, (str, bytes, int, float)) for value in batch):
            yield batch
        else:
            for value in batch:
                yield from entries(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for one in fields(batch):
            yield from entries(getattr(batch, one.name))


def batch_size(batch: object) -> int | None:
    """First dimension of all tensors of a batch; None if they differ."""
    sizes = {len(entry) for entry in entries(batch) if isinstance(entry, (Tensor, np.ndarray)) and entry.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def target_counts(batch: object) -> tuple[int, ...] | None:
    """Tokens of each sample that a language model would be trained on: labels, or else unmasked tokens."""
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
        return tuple((labels != IGNORED).flatten(1).sum(dim=1).tolist())
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return tuple((mask != 0).sum(dim=1).tolist())
    return None


def fingerprints(
    batch: object, num_samples: int, token_samples: Tensor | None = None
) -> tuple[str, ...] | None:
    """An identifier of each sample, made of what the batch holds of it: the same in every epoch.

    Args:
        batch: The batch.
        num_samples: How many samples it has.
        token_samples: Sample of every token, where samples are packed.

    Returns:
        Hashes; of samples that are equal in one batch, the later ones have a number behind. None if nothing
        in the
        batch has one entry per sample.
    """
    digests = [hashlib.blake2b(digest_size=6) for _ in range(num_samples)]
    found = False
    for entry in entries(batch):
        for digest, own in zip(digests, _rows(entry, num_samples, token_samples), strict=False):
            digest.update(own)
            found = True
    if not found:
        return None
    seen: Counter[str] = Counter()
    names = []
    for digest in digests:
        name = f"#{digest.hexdigest()}"
        names.append(name if not seen[name] else f"{name}.{seen[name]}")
        seen[name] += 1
    return tuple(names)


def _rows(
    entry: Tensor | np.ndarray | list[object] | tuple[object, ...],
    num_samples: int,
    token_samples: Tensor | None,
) -> Iterator[bytes]:
    """What an entry holds of each sample; nothing if that cannot be told."""
    if isinstance(entry, (list, tuple)):
        yield from (repr(value).encode() for value in entry if len(entry) == num_samples)
        return
    values = torch.as_tensor(entry).detach().cpu()
    if values.ndim and len(values) == num_samples:
        groups = list(values.contiguous())
    elif token_samples is not None and values.shape == token_samples.shape:
        groups = [values[token_samples.cpu() == sample] for sample in range(num_samples)]
    else:
        return
    yield from (group.contiguous().flatten().view(torch.uint8).numpy().tobytes() for group in groups)
