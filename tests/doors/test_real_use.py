"""What people do with a Trainer around the monitor.

Tasks in turn, early ends, callbacks that wait, tuning, odd paths.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner
from modules import Module, Samples, loader, trainer
from test_freezer import sure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qkov_lightning import HeadFreezer, InterferenceMonitor
from qkov_lightning.measure.recording import is_captured

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)


# Which batches


@pytest.mark.parametrize("num_tasks", [2, 4, 5])
def test_tasks_that_take_turns_are_all_captured(tmp_path: Path, num_tasks: int) -> None:
    """Every tenth batch of two, five or ten tasks in turn is of one and the same task."""
    names = tuple(f"task {n}" for n in range(num_tasks))
    samples = Samples(400, tasks=names)
    order = [n * num_tasks + task for n in range(400 // num_tasks) for task in range(num_tasks)]
    in_turn = [
        [index for index in order if index % num_tasks == batch % num_tasks][4 * (batch // num_tasks):][:4]
        for batch in range(100)
    ]  # fmt: skip
    monitor = InterferenceMonitor(every_n_steps=10)
    trainer(tmp_path, monitor).fit(Module(), DataLoader(samples, batch_sampler=in_turn))
    assert monitor.heatmap is not None
    assert len(monitor.heatmap.tasks) > 1
    assert monitor.heatmap.notes["captured_steps"] == 10


def test_one_batch_of_every_window_is_captured() -> None:
    places = [batch % 10 for batch in range(10_000) if is_captured(batch, 10)]
    assert len(places) == 1000
    assert places[0] == 0
    assert all(60 < places.count(place) < 140 for place in range(10))
    assert all(is_captured(batch, 1) for batch in range(20))


def test_a_task_that_was_seen_but_not_captured_is_told(tmp_path: Path) -> None:
    class Rare(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index) | {"task": "rare" if index // 4 == 1 else f"t{index % 2}"}

    monitor = InterferenceMonitor(every_n_steps=100)
    with pytest.warns(
        UserWarning, match="'rare': in the training batches, but not in the heatmap.*every_n_steps"
    ):
        trainer(tmp_path, monitor).fit(Module(), DataLoader(Rare(24), batch_size=4))


def test_the_fisher_does_not_depend_on_how_often_one_validates(tmp_path: Path) -> None:
    """Steps that left the budget before a measurement never reached it."""
    results = []
    for every in (1, 30):
        module = Module(learning_rate=0.0)
        monitor = InterferenceMonitor(every_n_steps=1, max_samples_per_task=4, fisher_decay=0.9)
        fit = trainer(tmp_path / str(every), monitor, max_epochs=1, val_check_interval=every)
        fit.fit(module, loader(120), loader(8))
        results.append(monitor.heatmap)
    often, once = results
    assert once.samples_per_task == {"code": 4, "math": 4}
    torch.testing.assert_close(
        often.scores["interference"], once.scores["interference"], equal_nan=True, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        often.scores["relative"], once.scores["relative"], equal_nan=True, rtol=1e-4, atol=1e-6
    )


# When it ends


@pytest.mark.parametrize("settings", [
    {"max_steps": 4, "max_epochs": -1}, {"check_val_every_n_epoch": 5, "max_epochs": 2}, {"max_steps": 3, "val_check_interval": 6},
])  # fmt: skip
def test_a_run_that_ends_between_validations_has_a_heatmap(tmp_path: Path, settings: dict[str, Any]) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    logger = CSVLogger(tmp_path, name="run", version=0)
    trainer(tmp_path, monitor, logger=logger, **settings).fit(Module(), loader(24), loader(8))
    assert monitor.heatmap is not None
    assert sum(monitor.heatmap.samples_per_task.values()) >= 12
    assert (tmp_path / "run" / "version_0" / "interference" / "latest.json").exists()
    assert "interference/max" in (tmp_path / "run" / "version_0" / "metrics.csv").read_text()


def test_ctrl_c_leaves_a_heatmap(tmp_path: Path) -> None:
    class Interrupted(Module):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            if batch_idx == 4:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    monitor = InterferenceMonitor(every_n_steps=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, monitor).fit(Interrupted(), loader(24), loader(8))
    assert monitor.heatmap is not None
    assert sum(monitor.heatmap.samples_per_task.values()) == 16
    assert (tmp_path / "interference" / "latest.json").exists()


def test_a_run_without_any_finite_gradient_says_so(tmp_path: Path) -> None:
    class Broken(Module):
        def loss(self, batch: dict[str, Any]) -> Tensor:
            return super().loss(batch) * torch.nan

        def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
            arguments[-1]()

    monitor = InterferenceMonitor(every_n_steps=1)
    with pytest.warns(
        UserWarning, match=r"no interference heatmap .* not finite in any of the 6 captured steps"
    ):
        trainer(tmp_path, monitor).fit(Broken(), loader(24))
    assert monitor.heatmap is None


# Those who wait for a scalar


class Reducing(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "interference/max"},
        }


def test_callbacks_that_watch_a_scalar_survive_validations_without_one(tmp_path: Path) -> None:
    """Only one task is there in the first epoch: no pair, no scalar."""

    class Late(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index) | {
                "task": "math" if index < 24 else super().__getitem__(index)["task"]
            }

    stopping = EarlyStopping("interference/code__math/relative_max", patience=3, mode="max")
    best = ModelCheckpoint(tmp_path / "best", monitor="interference/max", save_top_k=1)
    monitor = InterferenceMonitor(every_n_steps=1)
    fit = trainer(
        tmp_path, stopping, monitor, best, val_check_interval=6, max_epochs=1, enable_checkpointing=True
    )
    fit.fit(Reducing(), DataLoader(Late(48), batch_size=4), loader(8))
    assert monitor.heatmap is not None
    assert float(stopping.best_score) == pytest.approx(float(fit.callback_metrics[stopping.monitor]))
    assert best.best_model_score is not None
    assert float(best.best_model_score) < 1e30


def test_a_name_that_no_heatmap_has_is_still_an_error(tmp_path: Path) -> None:
    stopping = EarlyStopping("interference/mxa")
    with pytest.raises(RuntimeError, match="which is not available"):
        trainer(tmp_path, stopping, InterferenceMonitor(every_n_steps=1)).fit(Module(), loader(24), loader(8))


# Tuning, and one monitor for several trainings


def test_tuning_leaves_no_trace(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    fit = trainer(tmp_path, monitor)
    module = Module()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cache of the checkpoint is gone.*")
        Tuner(fit).lr_find(module, loader(24), loader(8), num_training=5, update_attr=False)
        fit.fit(module, loader(24), loader(8))
    assert monitor.heatmap is not None
    assert monitor.heatmap.notes["batches"] == monitor.heatmap.notes["captured_steps"] == 6


def test_a_finder_inside_of_fit_leaves_no_trace(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cache of the checkpoint is gone.*")
        trainer(tmp_path, monitor, finder).fit(Module(), loader(24), loader(8))
    assert monitor.heatmap is not None
    assert monitor.heatmap.notes["batches"] == 6


def test_a_second_training_begins_clean(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    freezer = HeadFreezer(monitor="interference", top=1)
    seen = []

    class Watching(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append((monitor.heatmap is None, freezer.cells))

    class Surer(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if monitor.heatmap is not None:
                monitor.heatmap = sure(monitor.heatmap, {"L1.H1.V": 2.0})

    for fold in range(2):
        fit = trainer(tmp_path / str(fold), Surer(), monitor, freezer, max_epochs=2)
        fit.fit(Watching(), loader(24), loader(8))
        assert monitor.heatmap.notes["batches"] == 12
        assert freezer.cells == ("L1.H1.V",)
    first, second = seen[:12], seen[12:]
    assert first[0] == second[0] == (True, ())


# Stochastic weight averaging


class Normalised(Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return nn.functional.cross_entropy(self.norm(self.network(batch["tokens"])), batch["target"])


@pytest.mark.filterwarnings("ignore:.*SWA.*")
def test_averaging_weights_with_batch_norm_is_bit_identical_and_quiet(tmp_path: Path) -> None:
    states = []
    start = Normalised()
    for watched in (False, True):
        module = copy.deepcopy(start)
        monitors = [InterferenceMonitor(every_n_steps=1)] if watched else []
        averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*Projection.*")
            trainer(tmp_path / str(watched), averaging, *monitors, max_epochs=3).fit(
                module, loader(24), loader(8)
            )
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# Places


def test_results_go_where_fsspec_leads_and_the_cache_stays_local(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1, cache_dir=tmp_path / "cache")
    trainer("memory://runs", monitor).fit(Module(), loader(24))
    system, root = fsspec.core.url_to_fs("memory://runs/interference")
    assert json.loads(system.cat(f"{root}/latest.json"))["tasks"] == ["code", "math"]
    assert any(name.endswith(".png") for name in system.find(root))
    assert monitor.results == "memory://runs/interference"
    assert not list(Path.cwd().glob("memory:*"))


def test_a_remote_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_dir is 's3://bucket/cache', expected a local folder"):
        InterferenceMonitor(cache_dir="s3://bucket/cache")
    with pytest.raises(ValueError, match=r"The results go to memory://.*cache_dir=<a local folder>"):
        trainer("memory://runs", InterferenceMonitor(every_n_steps=1)).fit(Module(), loader(24))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monitor = InterferenceMonitor(every_n_steps=1, cache_dir="~/cache", keep_cache=True)
    trainer(tmp_path / "runs", monitor).fit(Module(), loader(24))
    assert list((tmp_path / "cache").iterdir())


class Unversioned(CSVLogger):
    @property
    def version(self) -> None:
        return None


def test_a_logger_without_a_version_adds_no_folder(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    fit = trainer(tmp_path, monitor)
    fit.loggers = [Unversioned(tmp_path, name="run")]
    fit.fit(Module(), loader(24))
    assert monitor.results == tmp_path / "run" / "interference"
