"""Training does not wait for the disk; nothing is lost, nothing hangs, and no thread stays."""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from modules import Module, loader, trainer

from qkov_lightning import CacheError, GradientCache, InterferenceMonitor
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.samples import Samples
from qkov_lightning.store.writer import MAX_PENDING, CacheWriter

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "qkov-write"]


def captured(number: int, value: float = 1.0) -> CapturedStep:
    generator = torch.Generator().manual_seed(number)
    activation = value * torch.randn(6, 4, generator=generator)
    factors = {"q": GradientFactors(activation, torch.ones(6, 4), torch.tensor([0, 3, 6]))}
    ones = torch.ones(2).double()
    return CapturedStep(Samples(("math", "code"), (f"{number}a", f"{number}b")), ones, ones, factors)


def contents(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.glob("*.safetensors")}


class SlowCache(GradientCache):
    """Each write waits until it is let through."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Semaphore(0)

    def append(self, step: int, captured: Any) -> None:
        self.gate.acquire()
        super().append(step, captured)


def test_the_cache_is_the_one_that_waiting_for_each_write_gives(tmp_path: Path) -> None:
    direct, cache = GradientCache(tmp_path / "direct"), GradientCache(tmp_path / "thread")
    writer = CacheWriter(cache)
    for number in range(5):
        direct.append(number, [captured(number)])
        writer.submit(number, [captured(number)])
    assert writer.drain() == (5, 0)
    assert contents(tmp_path / "thread") == contents(tmp_path / "direct")
    writer.close()
    assert not writing_threads()


def test_a_step_that_is_not_finite_is_dropped_and_counted(tmp_path: Path) -> None:
    writer = CacheWriter(GradientCache(tmp_path))
    writer.submit(0, [captured(0)])
    writer.submit(1, [captured(1, torch.inf)])
    assert writer.drain() == (1, 1)
    writer.close()
    assert len(contents(tmp_path)) == 1


def test_what_is_written_is_let_go(tmp_path: Path) -> None:
    """The thread kept the last step in memory while it waited for the next one."""
    writer = CacheWriter(GradientCache(tmp_path))
    step = captured(0)
    alive = weakref.ref(step.factors["q"].activation)
    writer.submit(0, [step])
    del step
    writer.drain()
    assert alive() is None
    writer.close()


def test_a_full_queue_holds_training_back_and_drops_nothing(tmp_path: Path) -> None:
    cache = SlowCache(tmp_path)
    writer = CacheWriter(cache)
    done: list[int] = []

    def train() -> None:
        for number in range(MAX_PENDING + 3):
            writer.submit(number, [captured(number)])
            done.append(number)

    training = threading.Thread(target=train)
    training.start()
    training.join(timeout=0.5)
    # One step is being written, MAX_PENDING wait, and the next one may not be handed over.
    assert training.is_alive()
    assert len(done) == MAX_PENDING + 1
    for _ in range(MAX_PENDING + 3):
        cache.gate.release()
    training.join()
    assert writer.drain() == (MAX_PENDING + 3, 0)
    writer.close()
    assert len(contents(tmp_path)) == MAX_PENDING + 3


def test_an_error_surfaces_at_the_next_call_and_nobody_waits_in_vain(tmp_path: Path) -> None:
    cache = GradientCache(tmp_path, max_bytes=100)
    writer = CacheWriter(cache)
    writer.submit(0, [captured(0)])
    with pytest.raises(CacheError, match="Raise max_cache_gb"):
        writer.drain()
    for number in range(2 * MAX_PENDING + 2):  # more than the queue holds
        writer.submit(number, [captured(number)])
    writer.close()
    assert not writing_threads()


class Failing(GradientCache):
    def append(self, step: int, captured: Any) -> None:
        raise CacheError("the disk is gone")


def test_an_error_switches_only_the_monitor_off_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkov_lightning.store.run.GradientCache", Failing)
    module, plain = Module(), Module()
    with pytest.warns(UserWarning, match=r"switched itself off; training goes on.*disk is gone") as caught:
        trainer(tmp_path / "a", InterferenceMonitor(every_n_steps=1)).fit(module, loader(24))
    assert sum("switched itself off" in str(warning.message) for warning in caught) == 1
    trainer(tmp_path / "b").fit(plain, loader(24))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert not writing_threads()


def test_an_error_of_the_last_step_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing measures or checkpoints after it: only the end of the run can tell."""

    class LateFailure(GradientCache):
        def append(self, step: int, captured: Any) -> None:
            time.sleep(0.2)
            raise CacheError("the disk is gone")

    monkeypatch.setattr("qkov_lightning.store.run.GradientCache", LateFailure)
    monitor = InterferenceMonitor(every_n_steps=1)

    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    with (
        pytest.warns(UserWarning, match="switched itself off.*disk is gone"),
        pytest.raises(RuntimeError, match="stop"),
    ):
        trainer(tmp_path, monitor, Stop()).fit(Module(), loader(24))
    assert not writing_threads()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_no_thread_survives_and_what_was_captured_is_on_disk(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            if arguments[-1] == 3 and error is not None:
                raise error

    fit = trainer(
        tmp_path,
        InterferenceMonitor(every_n_steps=1, cache_dir=tmp_path / "cache", keep_cache=True),
        Interrupt(),
    )
    try:
        fit.fit(Module(), loader(24))
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        assert error is not None
    assert not writing_threads()
    (run,) = (tmp_path / "cache").iterdir()
    assert len(contents(run)) == (6 if error is None else 4)


class OnSecondCard(torch.Tensor):
    """A tensor of the processor that says it is on the second of two graphics cards."""

    is_cuda = True
    device = torch.device("cuda", 1)


class Streams:
    """Stands in for ``torch.cuda``, and notes what is asked of which device."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 - the name of PyTorch
        self.calls.append(("made", device))
        return SimpleNamespace(
            device=device,
            wait_event=lambda event: self.calls.append(("waits", device)),
            synchronize=lambda: self.calls.append(("ends", device)),
        )

    def Event(self) -> Any:  # noqa: N802
        return SimpleNamespace(record=lambda stream: self.calls.append(("recorded", stream.device)))

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(device=device)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append(("enters", stream.device))
        yield
        self.calls.append(("leaves", stream.device))


def test_a_step_is_copied_on_a_stream_of_the_card_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread starts on the first card: a stream made there would not wait for copies on the second."""
    streams = Streams()
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    writer = CacheWriter(GradientCache(tmp_path))
    writer.store = lambda step: captured(0)  # a processor cannot pin memory
    for number in range(2):
        step = captured(number)
        away = {
            name: GradientFactors(
                f.activation.as_subclass(OnSecondCard), f.grad_output.as_subclass(OnSecondCard), f.offsets
            )
            for name, f in step.factors.items()
        }
        writer.submit(number, [replace(step, factors=away)])
        writer.drain()
    writer.close()
    each = ["recorded", "made", "waits", "enters", "leaves", "ends"]
    assert [what for what, _ in streams.calls] == [*each, *(what for what in each if what != "made")]
    assert {device for _, device in streams.calls} == {OnSecondCard.device}
