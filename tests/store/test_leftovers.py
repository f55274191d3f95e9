"""The cache is gone after training, unless something needs it, and `qkov clean` removes what stayed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Module, loader

from qkov_lightning import InterferenceMonitor, cli
from qkov_lightning.store.leftovers import MARKER, SIGNATURE, find_leftovers, owner_note

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
]


def fit(root: Path, monitor: InterferenceMonitor, *callbacks: Any, **options: Any) -> Trainer:
    trainer = Trainer(
        default_root_dir=root, accelerator="cpu", max_epochs=1, logger=False, callbacks=[monitor, *callbacks],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        enable_checkpointing=bool(callbacks), **options,
    )  # fmt: skip
    trainer.fit(Module(), loader(8))
    return trainer


def caches(root: Path) -> list[Path]:
    return [path.parent for path in root.rglob(MARKER)]


def test_nothing_of_the_cache_is_left_after_training(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    fit(tmp_path, monitor)
    assert not caches(tmp_path)
    assert not (tmp_path / "interference" / "cache").exists()
    assert monitor.heatmap is not None
    assert (tmp_path / "interference" / "latest.json").exists()


def test_it_stays_where_it_is_to_be_kept(tmp_path: Path) -> None:
    fit(tmp_path, InterferenceMonitor(every_n_steps=1, keep_cache=True))
    assert len(caches(tmp_path)) == 1


def test_it_stays_for_a_checkpoint_that_can_go_on_and_not_for_one_of_weights_alone(tmp_path: Path) -> None:
    fit(
        tmp_path / "weights",
        InterferenceMonitor(every_n_steps=1),
        ModelCheckpoint(tmp_path / "w", save_weights_only=True),
    )
    assert not caches(tmp_path)
    fit(tmp_path / "whole", InterferenceMonitor(every_n_steps=1), ModelCheckpoint(tmp_path / "c"))
    assert len(caches(tmp_path)) == 1


def test_another_fit_of_the_same_trainer_starts_anew(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer = fit(tmp_path, monitor)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Module(), loader(8))
    assert monitor.heatmap.epoch == 1
    assert not caches(tmp_path)


def qkov(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["qkov", *map(str, arguments)])
    cli.main()
    return capsys.readouterr().out


def test_clean_removes_the_caches_of_trainings_that_ended_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "kept", InterferenceMonitor(every_n_steps=1, keep_cache=True))
    fit(tmp_path / "other", InterferenceMonitor(every_n_steps=1, keep_cache=True))
    (running,) = caches(tmp_path / "other")
    (ended,) = caches(tmp_path / "kept")
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    (ended / MARKER).write_text(f"{SIGNATURE} {socket.gethostname()} {child.stdout.strip()}")
    (running / MARKER).write_text(owner_note())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / MARKER).write_text("a file of the user's own")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file() and ended not in path.parents)
    text = qkov(monkeypatch, capsys, "clean", tmp_path, "--dry_run")
    assert "would go" in text
    assert ended.exists()
    text = qkov(monkeypatch, capsys, "clean", tmp_path)
    assert text.splitlines()[0].startswith("removed") or text.splitlines()[1].startswith("removed")
    assert "in use" in text
    assert not ended.parent.exists()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_missing_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        qkov(monkeypatch, capsys, "clean", tmp_path / "nowhere")
    assert "No folder" in capsys.readouterr().err
    assert find_leftovers(tmp_path) == []


def test_a_process_of_another_machine_is_taken_for_ended(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(f"{SIGNATURE} elsewhere {os.getpid()}")
    assert [leftover.in_use for leftover in find_leftovers(tmp_path)] == [False]
