"""Whatever breaks, training goes on, one warning says what happened, and the numbers stay honest."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from modules import Module, Samples, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from qkov_lightning import HeadInterference, InterferenceHeatmap, InterferenceMonitor
from qkov_lightning.store.leftovers import MARKER

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)


class Meddler(Callback):
    """Does something to the cache after the third batch."""

    def __init__(self, meddle: Callable[[Path], object], root: Path) -> None:
        self.meddle, self.root = meddle, root

    def on_train_batch_end(self, *arguments: Any) -> None:
        if arguments[-1] == 2:
            for callback in arguments[0].callbacks:
                callback.state_dict()  # waits for what is being written
            (cache,) = (self.root / "interference" / "cache").iterdir()
            self.meddle(cache)


def plain_parameters(tmp_path: Path) -> list[Tensor]:
    module = Module()
    trainer(tmp_path / "plain").fit(module, loader(24))
    return list(module.parameters())


def assert_untouched(module: Module, tmp_path: Path) -> None:
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), plain_parameters(tmp_path), strict=True)
    )


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """As a full disk: the system refuses to let a file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("file_size_limit")
def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    module = Module()
    with pytest.warns(UserWarning, match=r"switched itself off; training goes on") as caught:
        trainer(tmp_path, InterferenceMonitor(every_n_steps=1)).fit(module, loader(24))
    assert sum("switched itself off" in str(warning.message) for warning in caught) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    assert_untouched(module, tmp_path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = Module()
    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "replace" else os, call, full)
        with pytest.warns(
            UserWarning, match=r"switched itself off; training goes on.*No space left on device"
        ):
            trainer(tmp_path, InterferenceMonitor(every_n_steps=1)).fit(module, loader(24))
    assert not list(tmp_path.rglob("*.tmp"))
    assert_untouched(module, tmp_path)


def mount(folder: Path, options: str) -> None:
    """A small file system of its own.

    Raises:
        Skipped: Where this process may not mount one.
    """
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes the rights of root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte with 40 kilobytes left."""
    folder = tmp_path / "small"
    mount(folder, "size=1m")
    (folder / "ballast").write_bytes(bytes(2**20 - 40 * 1024))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_disk_that_fills_while_training(tmp_path: Path, small_disk: Path) -> None:
    module, monitor = Module(), InterferenceMonitor(every_n_steps=1, cache_dir=small_disk / "cache")
    with pytest.warns(UserWarning, match="switched itself off; training goes on") as caught:
        trainer(tmp_path, monitor).fit(module, loader(24))
    messages = [str(warning.message) for warning in caught if "switched itself off" in str(warning.message)]
    assert len(messages) == 1
    assert "No space left on device" in messages[0]
    assert list(small_disk.rglob("*.safetensors")), "it filled up on the way, not at once"
    assert not list(tmp_path.rglob("*.tmp"))
    assert_untouched(module, tmp_path)


def test_a_real_disk_too_full_for_results(tmp_path: Path, small_disk: Path) -> None:
    """The cache has space elsewhere: the heatmap is there, its files are not."""
    module, monitor = Module(), InterferenceMonitor(every_n_steps=1, cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match=r"heatmap could not be written: .*No space left on device"):
        trainer(small_disk, monitor).fit(module, loader(24))
    assert monitor.heatmap is not None
    assert not list(small_disk.rglob("*.tmp"))
    for path in small_disk.rglob("*.json"):
        InterferenceHeatmap.load(path)  # what exists is whole
    assert_untouched(module, tmp_path)


def make_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


@pytest.mark.parametrize("when", ["from the start", "while training"])
def test_a_read_only_directory_switches_the_monitor_off(tmp_path: Path, when: str) -> None:
    disk = tmp_path / "disk"
    mount(disk, "size=8m")
    (disk / "interference" / "cache").mkdir(parents=True)
    if when == "from the start":
        make_read_only(disk)
    meddlers = [] if when == "from the start" else [Meddler(lambda _: make_read_only(disk), disk)]
    module = Module()
    try:
        with pytest.warns(UserWarning, match="switched itself off; training goes on.*Read-only file system"):
            trainer(disk, InterferenceMonitor(every_n_steps=1), *meddlers).fit(module, loader(24))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert_untouched(module, tmp_path)


def test_a_directory_of_someone_else_switches_the_monitor_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the run exists already, and may be read but not written."""
    write_text = Path.write_text

    def refuse(path: Path, *arguments: Any, **keywords: Any) -> int:
        if path.name == MARKER:
            raise PermissionError(errno.EACCES, "Permission denied")
        return write_text(path, *arguments, **keywords)

    module = Module()
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.warns(UserWarning, match="switched itself off; training goes on.*Permission denied"):
        trainer(tmp_path, InterferenceMonitor(every_n_steps=1)).fit(module, loader(24))
    assert_untouched(module, tmp_path)


def empty(cache: Path) -> None:
    for path in cache.glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize("meddle", [shutil.rmtree, empty], ids=["folder", "files"])
def test_a_cache_that_is_deleted_while_training(tmp_path: Path, meddle: Callable[[Path], None]) -> None:
    module, monitor = Module(), InterferenceMonitor(every_n_steps=1)
    if meddle is shutil.rmtree:
        with pytest.warns(UserWarning, match="switched itself off; training goes on"):
            trainer(tmp_path, monitor, Meddler(meddle, tmp_path)).fit(module, loader(24))
    else:
        with pytest.warns(UserWarning, match="files of the cache .* are gone.* Their samples are left out"):
            trainer(tmp_path, monitor, Meddler(meddle, tmp_path)).fit(module, loader(24))
        assert sum(monitor.heatmap.samples_per_task.values()) == 12, "what was captured since"
    assert_untouched(module, tmp_path)


@pytest.mark.parametrize("meddle", [shutil.rmtree, empty], ids=["folder", "files"])
@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_cache_that_is_deleted_at_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meddle: Callable[[Path], None], moment: str
) -> None:
    module, monitor = Module(), InterferenceMonitor(every_n_steps=1)
    update, calls = HeadInterference.update, Counter()

    def delete() -> None:
        (cache,) = (tmp_path / "interference" / "cache").iterdir()
        monitor._recording.drain()  # the writer would go on writing into it
        meddle(cache)

    def deleting_update(metric: HeadInterference, *arguments: Any, **keywords: Any) -> None:
        calls["update"] += 1
        if calls["update"] == 2:
            delete()
        update(metric, *arguments, **keywords)

    class AtTheEnd(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            if moment == "before":
                delete()

    if moment == "while":
        monkeypatch.setattr(HeadInterference, "update", deleting_update)
    with pytest.warns(UserWarning, match="switched itself off; training goes on|Its samples are left out"):
        trainer(tmp_path, AtTheEnd(), monitor).fit(module, loader(24))
    if monitor.heatmap is not None:
        counts = monitor.heatmap.num_samples[:, :, :2]
        assert counts.max() == 12
        assert counts.min() == 0, "cells that lost their samples say so"
    assert_untouched(module, tmp_path)


def flip_a_bit(cache: Path) -> None:
    path = sorted(cache.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def truncate(cache: Path) -> None:
    path = sorted(cache.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_file_costs_its_samples_and_the_result_says_so(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    module, monitor = Module(), InterferenceMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="Its samples are left out"):
        trainer(tmp_path, monitor, Meddler(damage, tmp_path)).fit(module, loader(24))
    counts = monitor.heatmap.num_samples[:, :, :2]
    assert counts.max() <= 12
    assert counts.min() == 10, "the first step held two samples of each task"
    assert_untouched(module, tmp_path)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path / "a", straight).fit(Module(), loader(24))
    jumping = InterferenceMonitor(every_n_steps=1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1e6 * torch.rand(()).item())
    trainer(tmp_path / "b", jumping).fit(Module(), loader(24))
    assert jumping.heatmap.to_json() == straight.heatmap.to_json()


class Breaking(Module):
    """Fails at a given moment, as user code or Ctrl-C may."""

    def __init__(self, moment: str, error: type[BaseException]) -> None:
        super().__init__()
        self.moment, self.error = moment, error

    def fail(self, moment: str) -> None:
        if self.moment == moment:
            raise self.error

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.fail("training step")
        loss.register_hook(lambda _: self.fail("backward pass"))
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        self.fail("batch start")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.fail("optimiser")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.fail("validation")


def everything_that_hangs_on(module: Module) -> dict[str, object]:
    return {
        "hooks": [
            (name, len(part._forward_hooks), len(part._forward_pre_hooks))
            for name, part in module.named_modules()
            if part._forward_hooks or part._forward_pre_hooks
        ],
        "threads": {thread.ident for thread in threading.enumerate()},
        "function mode": torch.overrides._get_current_function_mode(),
        "compiler": torch._dynamo.eval_frame._stance.stance,
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "moment",
    [
        "batch start",
        "training step",
        "backward pass",
        "optimiser",
        "validation",
        "measurement",
        "fast_dev_run",
        "probe",
    ],
)
def test_an_error_or_ctrl_c_leaves_no_hook_no_thread_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: type[BaseException]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    module = Breaking("training step" if moment in {"fast_dev_run", "probe"} else moment, error)
    before = everything_that_hangs_on(module)
    settings: dict[str, Any] = {"fast_dev_run": True} if moment == "fast_dev_run" else {}
    probe = None
    if moment == "probe":  # which runs the training step in the middle of the validation
        module.moment, probe = "nowhere", loader(8)

    class Late(Callback):
        def on_validation_start(self, *_: Any) -> None:
            module.moment = "training step" if moment == "probe" else moment

    if moment == "measurement":
        monkeypatch.setattr(HeadInterference, "update", lambda *_, **__: module.fail("measurement"))
    fit = trainer(tmp_path / "run", InterferenceMonitor(every_n_steps=1, probe=probe), Late(), **settings)
    with pytest.raises((error, SystemExit)):
        fit.fit(module, loader(8), loader(4))
    assert everything_that_hangs_on(module) == before
    assert list(temporary.iterdir()) == []
    assert not list(tmp_path.rglob("*.tmp"))


class Poisoned(Module):
    """One sample has an activation of a given value."""

    value = torch.nan

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if batch_idx == 1:
            scores = self.network(batch["tokens"])
            return scores.square().mean() + 0 * scores.sum() * self.value
        return self.loss(batch)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        arguments[-1]()  # computes gradients, changes nothing


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_with_nan_or_infinity_is_dropped_and_counted(tmp_path: Path, value: float) -> None:
    monitor, module = InterferenceMonitor(every_n_steps=1), Poisoned()
    module.value = value
    trainer(tmp_path, monitor).fit(module, loader(24))
    assert monitor.heatmap.notes["non_finite_steps"] == 1
    assert sum(monitor.heatmap.samples_per_task.values()) == 20
    assert not monitor.heatmap.values("math", "code")[:, :4, 0].isnan().any()


def test_one_sample_with_a_huge_gradient_shows_in_the_standard_error(tmp_path: Path) -> None:
    class Huge(Module):
        def loss(self, batch: dict[str, Any]) -> Tensor:
            weights = torch.tensor([1e6 if name == "sample-5" else 1.0 for name in batch["sample_id"]])
            scores = self.network(batch["tokens"])
            return (
                weights * torch.nn.functional.cross_entropy(scores, batch["target"], reduction="none")
            ).mean()

    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(Huge(learning_rate=0.0), loader(24))
    value = monitor.heatmap.values("math", "code")[0, 0, 0]
    assert value.isfinite()
    assert monitor.heatmap.errors("math", "code")[0, 0, 0] > 0.3 * value
    pairs = [pair for pair in monitor.heatmap.pairs if pair.task_b == "code"]
    assert pairs[0].sample_b == "sample-5"


HOSTILE = ("../../escape", "a\x1b[31m\r\nb", "💡 emoji", "", "[bold]markup[/]", "x" * 300)


def test_hostile_task_names_and_sample_ids_stay_in_their_place(tmp_path: Path) -> None:
    class Hostile(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            return item | {"task": HOSTILE[index % len(HOSTILE)], "sample_id": f"../{index}\x00"}

    root = tmp_path / "inside"
    monitor = InterferenceMonitor(every_n_steps=1, num_hot_cells=1)
    trainer(root, monitor).fit(Module(), DataLoader(Hostile(24), batch_size=6))
    assert set(monitor.heatmap.tasks) == set(HOSTILE)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    read = InterferenceHeatmap.load(root / "interference" / "latest.json")
    assert read.tasks == monitor.heatmap.tasks
    assert {pair.sample_a for pair in read.pairs} <= {f"../{index}\x00" for index in range(24)}


def test_ten_thousand_tasks_are_refused_by_name_and_training_goes_on(tmp_path: Path) -> None:
    module = Module()
    monitor = InterferenceMonitor(
        every_n_steps=1, task_of=lambda batch: [f"{i}-{batch['sample_id'][0]}" for i in range(5000)]
    )

    class Many(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index % 24)

        def __len__(self) -> int:
            return 10_000

    with pytest.warns(
        UserWarning, match=r"10000 tasks .* make .* cells.*Is `task_of` the identifier of a sample\?"
    ):
        trainer(tmp_path, monitor).fit(module, DataLoader(Many(24), batch_size=5000))
    assert monitor.heatmap is None
