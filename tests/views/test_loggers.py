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
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from synthetic import make_heatmap, train

from qkov_lightning import InterferenceHeatmap, InterferenceMonitor, register_logger
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.views import loggers
from qkov_lightning.views.loggers import send
from qkov_lightning.views.publication import Publication, charts, scalars

# Of the loggers' own clients, not of this package.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
]

PAIRS = ("code__math", "math__code")
IMAGES = ("_overview", *(f"pair/loss_rise_{pair}" for pair in PAIRS))


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
    # It shows tags in the order of the alphabet: the overview first.
    assert sorted(events.Tags()["images"]) == [f"interference/{tag}" for tag in IMAGES]
    assert [image.step for image in events.Images("interference/_overview")] == [4, 8]
    assert [scalar.step for scalar in events.Scalars("interference/rise")] == [4, 8]
    text = events.Tensors("interference/verdict/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "- No cell does sure harm" in text or "surely hurt" in text
    assert "L0.H" in text
    own = {tag for tag in events.Tags()["scalars"] if tag.startswith("interference/")}
    assert own == {
        f"interference/{key}" for key in ("rise", "harmful_cells", "max", *(f"{p}/rise" for p in PAIRS))
    }


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
    key = "interference/pair/loss_rise_math__code"
    images = [row for row in history if key in row]
    assert [row[key]["caption"] for row in images] == ["epoch 0, step 4", "epoch 1, step 8"]
    assert [row["trainer/global_step"] for row in images] == [4, 8]
    table = [row["interference/cells"] for row in history if "interference/cells" in row][-1]
    content = json.loads((directory / table["path"]).read_text())
    assert content["columns"][:4] == ["step", "epoch", "task_a", "task_b"]
    assert len(content["data"]) == 4 * len(SCORES) * 2 * 4  # pairs with controls, scores, heads, blocks
    key = "interference/interactive/math__code"
    plot = [row for row in history if key in row][-1]
    figure = json.loads((directory / plot[key]["path"]).read_text())
    assert [trace["name"] for trace in figure["data"] if trace["type"] == "heatmap"] == list("QKVO")


def test_mlflow_holds_images_an_interactive_heatmap_and_the_long_table(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = MLFlowLogger("e", tracking_uri=uri, artifact_location=str(tmp_path / "artifacts"))
    watch = monitor()
    train(watch, tmp_path, logger=logger)
    client = MlflowClient(uri)
    folders = [item.path for item in client.list_artifacts(logger.run_id, "interference")]
    assert folders == ["interference/epoch_0_step_4", "interference/epoch_1_step_8"]
    local = Path(client.download_artifacts(logger.run_id, folders[-1], str(tmp_path)))
    names = {path.name for path in local.iterdir()}
    assert names == {
        "cells.csv",
        *(f"{pair}.html" for pair in PAIRS),
        "overview.png",
        *(f"loss_rise_{p}.png" for p in PAIRS),
    }
    rows = list(csv.DictReader((local / "cells.csv").read_text().splitlines()))
    assert {row["step"] for row in rows} == {"8"}
    row = next(r for r in rows if (r["task_a"], r["task_b"], r["block"], r["head"], r["score"])
               == ("math", "code", "O", "1", "relative"))  # fmt: skip
    assert float(row["value"]) == watch.heatmap.values("math", "code", "relative")[0, 1, 3]
    assert "Plotly.newPlot" in (local / "math__code.html").read_text()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        keys = {key for (key,) in database.execute("select distinct key from metrics")}
    assert "interference/math__code/rise" in keys


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
    publication = Publication("interference", 120, "epoch 3, step 120", {"_overview": pixels}, heatmap)
    send([CometLogger()], publication, set())
    experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as saved:
        messages = saved.read("messages.json").decode()
        assert "interference/_overview, epoch 3, step 120" in messages
        assert "interference_cells_step_00000120.csv" in messages


def test_csv_logger_gets_the_scalars_and_the_files_stand_beside_it(tmp_path: Path) -> None:
    watch = monitor()
    trainer = train(watch, tmp_path, logger=CSVLogger(tmp_path, name="csv"))
    rows = list(csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()))
    written = [row["interference/math__code/rise"] for row in rows if row["interference/math__code/rise"]]
    assert float(written[-1]) == pytest.approx(watch.heatmap["math", "code"].rise, rel=1e-4)
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
    assert len(events.Tags()["images"]) == len(IMAGES)
    assert len(list((tmp_path / "a").rglob("*.png"))) == len(IMAGES)
    assert len(list((tmp_path / "csv").rglob("figures/*.png"))) == len(IMAGES)


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
    send(
        [Board(str(tmp_path))],
        Publication("interference", 3, "", {"_overview": picture}, make_heatmap()),
        set(),
    )
    assert sent == ["interference/_overview", "interference/verdict"]
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
    register_logger("RecordingLogger", lambda logger, publication: logger.received.append(publication))
    mine = InheritingLogger()
    train(monitor(), tmp_path, logger=mine)
    assert [publication.step for publication in mine.received] == [4, 8]
    last = mine.received[-1]
    assert [tag for tag, _ in last.tagged()] == [f"interference/{tag}" for tag in last.images]
    assert set(last.images) == set(IMAGES)
    assert last.heatmap.step == 8
    assert last.caption == "epoch 1, step 8"


@pytest.mark.parametrize(
    ("tasks", "figures", "num_images"),
    [
        (3, (), 1 + 5),
        (8, (), 1 + 5),
        (3, ("cosine",), 1 + 5 + 6),
        (8, ("loss_rise", "relative"), 1 + 12 + 12),
    ],
)
def test_few_pictures_are_drawn_unless_more_are_asked_for(
    tasks: int, figures: tuple[str, ...], num_images: int
) -> None:
    heatmap = make_heatmap(tasks=tuple(f"task{index}" for index in range(tasks)))
    assert len(Publication.of(heatmap, figures).images) == num_images
    drawn = charts(heatmap)
    assert len(drawn) <= 10
    assert set(drawn) <= set(scalars(heatmap))


def test_a_scalar_that_a_callback_watches_is_sent_and_the_others_are_known_to_callbacks(
    tmp_path: Path,
) -> None:
    stop = EarlyStopping("interference/math__code/cosine_min", mode="max", patience=5)
    trainer = train(monitor(), tmp_path, logger=CSVLogger(tmp_path, name="csv"), callbacks=[stop])
    rows = list(csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()))
    own = {key for key in rows[0] if key.startswith("interference/")}
    assert own == {
        f"interference/{key}"
        for key in ("rise", "harmful_cells", "max", *(f"{p}/rise" for p in PAIRS), "math__code/cosine_min")
    }
    assert "interference/code__math/relative_max" in trainer.callback_metrics


def test_a_failing_logger_warns_once_and_training_and_the_other_loggers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_SENDERS", dict(loggers._SENDERS))

    def refuse(*given: Any) -> None:
        raise ConnectionError("the server is on holiday")

    register_logger("RecordingLogger", refuse)
    register_logger("InheritingLogger", lambda logger, publication: logger.received.append(publication))
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
    with pytest.raises(ModuleNotFoundError, match=r"plotly.*pip install 'plotly>=6'"):
        interactive_heatmap(make_heatmap(), "math", "code")
