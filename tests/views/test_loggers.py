"""Every logger receives the heatmap, and none of them can stop the training."""

import csv
import json
import sqlite3
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from synthetic import make_heatmap, train

from qkov_lightning import InterferenceHeatmap, InterferenceMonitor, register_logger
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.views import loggers
from qkov_lightning.views.loggers import send

# Of the loggers' own clients, not of this package.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
]

PAIRS = ("code__math", "math__code")


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path),
        "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def wandb_records(data: bytes) -> Iterator[bytes]:
    """A LevelDB log after seven bytes of its own: blocks of 32 KiB, pieces of (checksum, length, type)."""
    position, whole = 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:  # complete, last
            yield whole
            whole = b""


def monitor() -> InterferenceMonitor:
    return InterferenceMonitor(every_n_steps=1)


def test_tensorboard_holds_every_figure_at_every_epoch_and_the_hottest_cells(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(monitor(), tmp_path, logger=TensorBoardLogger(tmp_path, name="tb"))
    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {f"interference_{s}/{p}" for s in SCORES for p in PAIRS}
    steps = [image.step for image in events.Images("interference_relative/math__code")]
    assert steps == [scalar.step for scalar in events.Scalars("val_loss")]
    text = events.Tensors("hottest_cells/math__code/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "(epoch 1, step 8)" in text
    assert "L0.H" in text
    assert events.Scalars("interference/math__code/max")


def test_wandb_holds_captioned_images_an_interactive_heatmap_and_the_long_table(tmp_path: Path) -> None:
    import wandb
    from wandb.proto import wandb_internal_pb2

    watch = monitor()
    trainer = train(watch, tmp_path, logger=WandbLogger(save_dir=tmp_path, offline=True, project="p"))
    directory = Path(trainer.logger.experiment.dir)
    wandb.finish()
    wandb.teardown()  # the last block of the log is written when the service ends
    (log,) = directory.parent.glob("*.wandb")
    records: list[Any] = []
    deadline = time.monotonic() + 60
    # A process of its own writes the file, and goes on after `finish` has returned.
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < deadline, "the run's file never came to its end"
        records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(log.read_bytes())]
    history: list[dict[str, Any]] = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *rest = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if rest:
                    row.setdefault(name, {})[rest[0]] = value
                else:
                    row[name] = value
            history.append(row)
    images = [row for row in history if "interference_cosine/math__code" in row]
    assert [row["interference_cosine/math__code"]["caption"] for row in images] == [
        "cosine: code pushes on math, epoch 0, step 4",
        "cosine: code pushes on math, epoch 1, step 8",
    ]
    # The steps that Lightning gives to validation metrics; the TensorBoard test compares with those.
    assert [row["trainer/global_step"] for row in images] == [3, 7]
    table = [row["interference/cells"] for row in history if "interference/cells" in row][-1]
    content = json.loads((directory / table["path"]).read_text())
    assert content["columns"][:4] == ["step", "epoch", "task_a", "task_b"]
    assert len(content["data"]) == 4 * len(SCORES) * 2 * 4  # pairs with controls, scores, heads, blocks
    plot = [row for row in history if "interference_interactive/math__code" in row][-1]
    figure = json.loads((directory / plot["interference_interactive/math__code"]["path"]).read_text())
    assert [trace["name"] for trace in figure["data"] if trace["type"] == "heatmap"] == list("QKVO")


def test_mlflow_holds_images_an_interactive_heatmap_and_the_long_table(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = MLFlowLogger("e", tracking_uri=uri, artifact_location=str(tmp_path / "artifacts"))
    watch = monitor()
    train(watch, tmp_path, logger=logger)
    client = MlflowClient(uri)
    folders = [item.path for item in client.list_artifacts(logger.run_id, "interference")]
    assert folders == ["interference/epoch_0000_step_00000004", "interference/epoch_0001_step_00000008"]
    local = Path(client.download_artifacts(logger.run_id, folders[-1], str(tmp_path)))
    names = {path.name for path in local.iterdir()}
    assert names == {
        "cells.csv",
        *(f"{pair}.html" for pair in PAIRS),
        *(f"{s}_{p}.png" for s in SCORES for p in PAIRS),
    }
    rows = list(csv.DictReader((local / "cells.csv").read_text().splitlines()))
    assert {row["step"] for row in rows} == {"8"}
    row = next(r for r in rows if (r["task_a"], r["task_b"], r["block"], r["head"], r["score"])
               == ("math", "code", "O", "1", "relative"))  # fmt: skip
    assert float(row["value"]) == watch.heatmap.values("math", "code", "relative")[0, 1, 3]
    assert "Plotly.newPlot" in (local / "math__code.html").read_text()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        keys = {key for (key,) in database.execute("select distinct key from metrics")}
    assert "interference/math__code/max" in keys


def test_comet_holds_named_images_and_the_long_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    monkeypatch.setenv("COMET_INTERNAL_SENTRY_DSN", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        comet = pytest.importorskip("comet_ml")
    experiment = comet.OfflineExperiment(
        project_name="p", offline_directory=str(tmp_path), display_summary_level=0, log_code=False,
        log_git_metadata=False, log_env_details=False,
    )  # fmt: skip

    class CometLogger:  # Lightning's own needs an account even to be made.
        def __init__(self) -> None:
            self.experiment = experiment

    heatmap = make_heatmap()
    pixels = np.zeros((4, 4, 3), dtype="uint8")
    send([CometLogger()], heatmap, {("math", "code", "cosine"): pixels}, 119, set())
    experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as saved:
        messages = saved.read("messages.json").decode()
        assert "cosine: code pushes on math, epoch 3, step 120" in messages
        assert "interference_cells_step_00000120.csv" in messages


def test_csv_logger_gets_the_scalars_and_the_files_stand_beside_it(tmp_path: Path) -> None:
    watch = monitor()
    trainer = train(watch, tmp_path, logger=CSVLogger(tmp_path, name="csv"))
    rows = list(csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()))
    written = [row["interference/math__code/max"] for row in rows if row["interference/math__code/max"]]
    assert float(written[-1]) == pytest.approx(
        float(watch.heatmap.values("math", "code").nan_to_num(0).max()), rel=1e-4
    )
    assert watch.results == Path(trainer.logger.log_dir) / "interference"
    assert {"cells.csv", "metrics.json", "latest.json"} <= {path.name for path in watch.results.iterdir()}


def test_several_loggers_at_once_each_get_theirs(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path, name="tb")
    flow = MLFlowLogger(
        "e", tracking_uri=f"sqlite:///{tmp_path / 'm.db'}", artifact_location=str(tmp_path / "a")
    )
    train(monitor(), tmp_path, logger=[CSVLogger(tmp_path, name="csv"), board, flow], max_epochs=1)
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert len(events.Tags()["images"]) == len(PAIRS) * len(SCORES)
    assert len(list((tmp_path / "a").rglob("*.png"))) == len(PAIRS) * len(SCORES)
    assert len(list((tmp_path / "csv").rglob("figures/*.png"))) == len(PAIRS) * len(SCORES)


def test_without_a_logger_the_files_are_written(tmp_path: Path) -> None:
    watch = monitor()
    train(watch, tmp_path, logger=False)
    assert InterferenceHeatmap.load(tmp_path / "interference" / "latest.json").step == 8


def test_fast_dev_run_leaves_nothing_behind_and_warns_of_nothing(tmp_path: Path) -> None:
    watch = InterferenceMonitor(every_n_steps=1)
    train(watch, tmp_path, fast_dev_run=2, logger=TensorBoardLogger(tmp_path, name="tb"))
    assert watch.heatmap is not None
    assert not list(tmp_path.rglob("*.json"))


def test_pytorch_lightning_namespace_is_served_too(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.loggers import TensorBoardLogger as OtherTensorBoardLogger

    assert not issubclass(OtherTensorBoardLogger, TensorBoardLogger)
    sent = []

    class Board(OtherTensorBoardLogger):
        @property
        def experiment(self) -> Any:
            return self

        def add_image(self, tag: str, *args: Any, **kwargs: Any) -> None:
            sent.append(tag)

        def add_text(self, tag: str, *args: Any) -> None:
            sent.append(tag)

    picture = np.zeros((2, 2, 3), dtype="uint8")
    send([Board(str(tmp_path))], make_heatmap(), {("math", "code", "cosine"): picture}, 3, set())
    assert sent[0] == "interference_cosine/math__code"
    assert pl.Trainer is not None


class RecordingLogger(Logger):
    def __init__(self) -> None:
        self.received: list[Any] = []

    name = "mine"
    version = 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class InheritingLogger(RecordingLogger):
    pass


def test_a_logger_of_the_users_own_is_served_once_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_SENDERS", dict(loggers._SENDERS))
    register_logger("RecordingLogger", lambda logger, *given: logger.received.append(given))
    mine = InheritingLogger()
    train(monitor(), tmp_path, logger=mine)
    assert [heatmap.step for heatmap, _, _ in mine.received] == [4, 8]
    heatmap, images, step = mine.received[-1]
    assert set(images) == {(a, b, s) for a, b in heatmap.task_pairs for s in heatmap.scores}
    assert step == 7  # Lightning gives validation metrics the last step, from 0


def test_a_failing_logger_warns_once_and_training_and_the_other_loggers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_SENDERS", dict(loggers._SENDERS))

    def refuse(*given: Any) -> None:
        raise ConnectionError("the server is on holiday")

    register_logger("RecordingLogger", refuse)
    register_logger("InheritingLogger", lambda logger, *given: logger.received.append(given))
    after = InheritingLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(monitor(), tmp_path, logger=[RecordingLogger(), after], max_epochs=3)
    messages = [str(w.message) for w in caught if "interference heatmap" in str(w.message)]
    assert messages == [
        "RecordingLogger did not take the interference heatmap: ConnectionError: the server is on holiday"
    ]
    assert trainer.global_step == 12
    assert len(after.received) == 3


def test_interactive_heatmap_without_plotly_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkov_lightning.views.interactive import interactive_heatmap

    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ModuleNotFoundError, match=r"plotly.*pip install 'qkov-lightning\[report\]'"):
        interactive_heatmap(make_heatmap(), "math", "code")
