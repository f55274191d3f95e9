"""Killed at any moment, a run goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Module, loader, trainer
from versions import WHOLE_CHECKPOINT

from qkov_lightning import InterferenceHeatmap, InterferenceMonitor

SCRIPT = Path(__file__).with_name("run_until_killed.py")


def run(root: Path, kills: int, storage: str) -> str:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
    }
    command = [sys.executable, str(SCRIPT), str(root), str(kills), storage]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(("storage", "kills"), [("auto", 50), ("summed", 20)])
def test_many_kills_change_no_number(tmp_path: Path, storage: str, kills: int) -> None:
    """Every restart resumes, the cache holds whole records only, and the last heatmap is the same."""
    run(tmp_path / "straight", 0, storage)
    assert f"killed {kills}" in run(tmp_path / "killed", kills, storage)
    straight = InterferenceHeatmap.load(tmp_path / "straight" / "interference" / "latest.json")
    finished = sorted((tmp_path / "killed").glob("*/interference/latest.json"))
    final = [InterferenceHeatmap.load(path) for path in finished]
    assert sum(heatmap.to_json() == straight.to_json() for heatmap in final) >= 1
    assert all(
        heatmap.to_json() == straight.to_json() for heatmap in final if heatmap.epoch == straight.epoch
    )


class InOrder:
    """Batches in order, which knows where it is: Lightning keeps that in a checkpoint."""

    def __init__(self) -> None:
        self.batches, self.place = list(loader(24)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.place %= len(self.batches)
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Stopping(Module):
    stop_at: int | None = None
    seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.seen == self.stop_at:
            raise RuntimeError("stopped")
        self.seen += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.skipif(not WHOLE_CHECKPOINT, reason="Lightning before 2.6 does not keep the place of a loader")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("storage", "stop_at"), [("auto", 3), ("auto", 8), ("auto", 13), ("summed", 8)])
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*resumable.*", "ignore:.*exists and is not empty.*"
)
def test_a_run_that_resumes_within_an_epoch_changes_no_number(
    tmp_path: Path, storage: Any, stop_at: int, accumulate: int
) -> None:
    """With a loader that knows its place. Without one Lightning begins the data of the epoch again."""

    def fit(folder: str, stop: int | None = None, checkpoint: Path | None = None) -> InterferenceMonitor:
        module = Stopping()
        module.stop_at = stop
        monitor = InterferenceMonitor(every_n_steps=1, max_samples_per_task=8, storage=storage)
        keep = ModelCheckpoint(
            tmp_path / folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )
        run = trainer(
            tmp_path / folder,
            monitor,
            keep,
            max_epochs=3,
            enable_checkpointing=True,
            accumulate_grad_batches=accumulate,
        )
        run.fit(module, InOrder(), loader(8), ckpt_path=checkpoint, **WHOLE_CHECKPOINT)
        return monitor

    with pytest.raises(RuntimeError, match="stopped"):
        fit("stopped", stop_at)
    checkpoints = (tmp_path / "stopped" / "checkpoints").glob("*.ckpt")
    last = max(checkpoints, key=lambda path: int(path.stem.removeprefix("step=")))
    resumed, whole = fit("stopped", checkpoint=last), fit("whole")
    assert resumed.heatmap.notes["captured_steps"] == whole.heatmap.notes["captured_steps"] == 18
    for score, values in whole.heatmap.scores.items():
        torch.testing.assert_close(resumed.heatmap.scores[score], values, rtol=0, atol=0, equal_nan=True)
