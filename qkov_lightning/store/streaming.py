"""Per-sample gradients of heads, streamed from the cache in bounded memory.

Apart from the model, a measurement needs ``HELD_BYTES`` for gradients, the Fisher of one projection, and the
factors that one module has in two captured steps, whatever the number of samples. A head whose gradients are
larger is taken in pieces, some of its features at a time, which are made again for every pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qkov_lightning.capture.factors import GradientFactors
from qkov_lightning.capture.gradients import (
    DenseGradients,
    num_other_features,
    owned_gradients,
    owned_part,
)
from qkov_lightning.capture.reading import summing_device
from qkov_lightning.heads.projections import Projection
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.records import CacheRecord

HELD_BYTES = 256 * 2**20
"""Gradients that are in memory at once."""

SUMMED_BYTES = 4 * 2**20
"""Weights of the heads that are scored together: each task has several sums of this size."""

Part = GradientFactors | DenseGradients
T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made on a thread while the one before it is in use."""
    end = object()
    iterator = iter(items)
    with ThreadPoolExecutor(1, "qkov-read") as thread:
        future = thread.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]


class CacheReader:
    """Reads the records for one measurement: each checksum is verified once, what is damaged is left out.

    Args:
        records: What to read, oldest first.
        device: Where the gradients go, if it can sum in float64; the processor otherwise.
    """

    def __init__(self, records: Sequence[CacheRecord], device: torch.device | str = "cpu") -> None:
        self._records = records
        self.device = summing_device(device)
        self._verified: set[tuple[Path, str]] = set()
        self._readable: dict[str, list[CacheRecord]] = {}

    def readable(self, module_name: str) -> list[CacheRecord]:
        """Records that hold the module: all of them before the first pass, the undamaged ones after it."""
        known = self._readable.get(module_name)
        return [r for r in self._records if module_name in r.modules] if known is None else known

    def parts(
        self, projection: Projection, records: Sequence[CacheRecord] | None = None
    ) -> Iterator[tuple[CacheRecord, Part]]:
        """What the heads of the projection own in each record, read ahead.

        Raises:
            CacheError: If a record was readable in an earlier pass and is no more.

        Warns:
            UserWarning: If a record is damaged; it is left out from then on.
        """
        name = projection.module_name
        first_pass = name not in self._readable
        records = self.readable(name) if records is None else records
        readable = []
        for record, part in ahead(self._load(projection, records)):
            if isinstance(part, CacheError):
                if not first_pass:
                    raise part
                warnings.warn(f"{part} Its samples are left out.", stacklevel=5)
                continue
            readable.append(record)
            yield record, part
        if first_pass:
            self._readable[name] = readable

    def _load(
        self, projection: Projection, records: Sequence[CacheRecord]
    ) -> Iterator[tuple[CacheRecord, Part | CacheError]]:
        for record in records:
            try:
                source = record.read(projection.module_name, self._verified)
            except CacheError as error:
                yield record, error
            else:
                yield record, owned_part(source, projection, record.scales, self.device)

    def slice_bytes(self, projection: Projection) -> int:
        """Bytes that the gradient of one sample at one head takes; 0 if there is no record."""
        for _, part in self._load(projection, self.readable(projection.module_name)):
            if not isinstance(part, CacheError):  # of which `parts` will speak
                return projection.head_dim * num_other_features(part) * _tensor(part).element_size()
        return 0


class HeadGradients:
    """Per-sample gradients of some heads of one projection, readable many times.

    Attributes:
        heads: Which heads.
        records: Whose samples they are, in order.
    """

    def __init__(
        self,
        reader: CacheReader,
        projection: Projection,
        heads: slice,
        slice_bytes: int,
        held: Float[Tensor, "sample head weight"] | None = None,
    ) -> None:
        self.heads = heads
        self._reader = reader
        self._projection = restricted(projection, heads)
        self._slice_bytes = slice_bytes
        self._held = held
        if held is None and projection.module_name not in reader._readable:
            for _ in reader.parts(self._projection):  # finds what is damaged
                pass
        self.records = reader.readable(projection.module_name)

    def __iter__(self) -> Iterator[Float[Tensor, "sample head _"]]:
        """Gradients of all samples, oldest first: whole, or block after block of weights."""
        if self._held is not None:
            yield self._held
            return
        num_samples = sum(len(record.samples) for record in self.records)
        num_features = self._projection.head_dim
        # Two at once: whoever reads still has a piece while the next one is made.
        size = max(1, HELD_BYTES * num_features // (2 * num_samples * self._slice_bytes))
        for features in torch.arange(num_features).split(size):
            yield _held(self._reader, restricted(self._projection, slice(None), features), num_samples)

    @property
    def tasks(self) -> list[str]:
        """Task of every sample."""
        return [name for record in self.records for name in record.samples.tasks]

    @property
    def ids(self) -> list[str]:
        """Identifier of every sample."""
        return [name for record in self.records for name in record.samples.ids]

    @property
    def groups(self) -> list[str | None]:
        """Group of every sample; None where none was given."""
        return [
            group
            for record in self.records
            for group in record.samples.groups or (None,) * len(record.samples)
        ]

    @property
    def num_terms(self) -> Float[Tensor, sample]:
        """Terms that the own loss of every sample is the mean of."""
        return torch.cat([record.num_terms for record in self.records])

    @property
    def steps(self) -> list[int]:
        """Captured step of every sample."""
        return [record.step for record in self.records for _ in record.samples.tasks]

    def release(self) -> None:
        """Let go of what is held; a further pass would read the cache again."""
        self._held = None


def head_gradients_of(reader: CacheReader, projection: Projection) -> Iterator[HeadGradients]:
    """All heads of a projection, some at a time.

    As many heads as fit are read from the cache together and held; where not even one fits, its gradients are
    made again for every pass.
    """
    slice_bytes = reader.slice_bytes(projection)
    if not slice_bytes:
        return
    num_samples = sum(len(record.samples) for record in reader.readable(projection.module_name))
    held_heads = HELD_BYTES // (num_samples * slice_bytes)
    together = max(1, SUMMED_BYTES // slice_bytes) if held_heads else 1
    for heads in _ranges(slice(0, projection.num_heads), max(1, held_heads)):
        held = _held(reader, restricted(projection, heads), num_samples) if held_heads else None
        for some in _ranges(heads, together):
            own = None if held is None else held[:, some.start - heads.start : some.stop - heads.start]
            gradients = HeadGradients(reader, projection, some, slice_bytes, own)
            if gradients.records:
                yield gradients
            # Whoever still has it keeps no memory: the next heads are made in the place of these.
            gradients.release()
        del held, own


def _held(
    reader: CacheReader, projection: Projection, num_samples: int
) -> Float[Tensor, "sample head weight"]:
    """Gradients of all readable samples, made in place."""
    held: Tensor | None = None
    start = 0
    for record, part in reader.parts(projection):
        if held is None:
            own = projection.head_features.numel()
            held = _tensor(part).new_empty(num_samples, own, num_other_features(part))
        rows = held[start : start + len(record.samples)]
        if _tensor(part).dtype == held.dtype:
            owned_gradients(part, out=rows)
        else:  # a run that went on in another precision
            rows.copy_(owned_gradients(part))
        start += len(record.samples)
    if held is None:
        return torch.empty(0, projection.num_heads, 1)
    return held[:start].view(start, projection.num_heads, -1)


def _tensor(part: Part) -> Tensor:
    return part.gradient if isinstance(part, DenseGradients) else part.grad_output


def restricted(
    projection: Projection, heads: slice, features: Int[Tensor, feature] | None = None
) -> Projection:
    """Some heads of a projection, or some features of them."""
    head_features = projection.head_features[heads]
    return replace(
        projection, head_features=head_features if features is None else head_features[:, features]
    )


def _ranges(whole: slice, size: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, size):
        yield slice(start, min(start + size, whole.stop))
