"""Captured steps reach the disk on a thread of their own, so that training does not wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.store.cache import GradientCache
from qkov_lightning.store.sampling import SampledStep
from qkov_lightning.store.sums import RunningSums

MAX_PENDING = 2
"""Captured steps that may wait in memory; the next one waits for the disk."""


class CacheWriter:
    """Writes captured steps in order, on one thread that starts with the first of them.

    What is handed over must not change afterwards: the factors of a ``CapturedStep`` are copies already. On
    an accelerator they are copied to pinned memory on a stream of their own.

    Args:
        cache: Where they go.

    Attributes:
        store: Makes of a captured step what is written; it runs on the thread.
        sums: Take each captured step, too, on the thread; None without sums.
    """

    def __init__(self, cache: GradientCache) -> None:
        self._cache = cache
        self.store: Callable[[CapturedStep], CapturedStep | SampledStep] = on_host
        self.sums: RunningSums | None = None
        self._queue: queue.Queue[tuple[int, Sequence[CapturedStep], Any] | None] = queue.Queue(MAX_PENDING)
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, Any] = {}
        self._error: BaseException | None = None
        self._num_written = self._num_dropped = 0

    def submit(self, step: int, captured: Sequence[CapturedStep]) -> None:
        """Write a step soon; wait if too many are on their way.

        Raises:
            CacheError: If an earlier step could not be written.
        """
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="qkov-write", daemon=True)
            self._thread.start()
        self._queue.put((step, captured, _ready(captured)))

    def drain(self) -> tuple[int, int]:
        """Wait until everything is written.

        Returns:
            Steps written since the last time, and steps dropped because a gradient was not finite.

        Raises:
            CacheError: If a step could not be written.
        """
        self._queue.join()
        self._raise()
        counts = self._num_written, self._num_dropped
        self._num_written = self._num_dropped = 0
        return counts

    def close(self) -> None:
        """Write what is on its way and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        failed = False
        while (item := self._queue.get()) is not None:
            try:
                if not failed:  # after an error the queue is only emptied: nobody may wait for it in vain
                    self._write(*item)
            except BaseException as error:
                failed, self._error = True, error
            finally:
                del item  # or it would stay in memory while the thread waits for the next one
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, step: int, captured: Sequence[CapturedStep], ready: Mapping[torch.device, Any]) -> None:
        with ExitStack() as streams:
            for device, event in ready.items():
                # Of the device that has the step: a thread starts on the first one of the machine.
                stream = self._stream(device)
                stream.wait_event(event)
                streams.callback(stream.synchronize)
                streams.enter_context(torch.cuda.stream(stream))
            self._append(step, captured)

    def _stream(self, device: torch.device) -> Any:
        """The same one in every step: each stream keeps memory of its own."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _append(self, step: int, captured: Sequence[CapturedStep]) -> None:
        if not all(one.is_finite for one in captured):
            self._num_dropped += 1
            return
        self._cache.append(step, [self.store(one) for one in captured])
        if self.sums is not None:
            self.sums.add(step, captured)
            self.sums.fit_records(self._cache.num_bytes_of)
            self._cache.hold(self.sums.needed_steps)
        self._num_written += 1


def on_host(captured: CapturedStep) -> CapturedStep:
    """The same in the memory of the processor, copied through pinned memory on the current stream."""
    tensors = {id(t): t for f in captured.factors.values() for t in (f.activation, f.grad_output)}
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return captured
    copies = {}
    for key, tensor in tensors.items():
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies[key] = pinned.copy_(tensor, non_blocking=True)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    factors = {
        name: GradientFactors(copies[id(f.activation)], copies[id(f.grad_output)], f.offsets)
        for name, f in captured.factors.items()
    }
    return replace(captured, factors=factors)


def _ready(captured: Sequence[CapturedStep]) -> dict[torch.device, Any]:
    """What tells, for each accelerator, that the kernels of the step have run there."""
    events = {}
    for device in {f.activation.device for one in captured for f in one.factors.values()}:
        if device.type == "cuda":
            events[device] = torch.cuda.Event()
            events[device].record(torch.cuda.current_stream(device))
    return events
