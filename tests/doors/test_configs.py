"""Each configuration file runs as it stands, and a mistake in one gives a short useful line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qkov_lightning import InterferenceHeatmap

ROOT = Path(__file__).parents[2]
# Of Lightning: advice on workers and intervals, and its command line calling what jsonargparse deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TINY = [
    "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--model.width=16",
    "--model.num_layers=1", "--model.num_heads=2", "--data.num_train=24", "--data.num_validation=12",
    "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The entry script, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["train.py", "fit", *arguments])
        train.main()

    return run


def config(name: str) -> str:
    return f"--config={ROOT / 'configs' / name}"


@pytest.mark.parametrize(
    "arguments",
    [[config("train.yaml")], [config("base.yaml"), config("interference.yaml")]],
    ids=["complete", "fragment"],
)
def test_configuration_trains_and_leaves_a_heatmap_and_a_checkpoint(
    tmp_path: Path, fit: Callable[..., None], arguments: list[str]
) -> None:
    fit(*arguments, *TINY)
    (latest,) = tmp_path.rglob("interference/latest.json")
    assert InterferenceHeatmap.load(latest).step == 2
    # The fragment leaves the checkpoint callback of the file before in place.
    assert list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("every_n_step", "10", "'every_n_step' is not"),
        ("every_n_steps", "often", "Expected a <class 'int'>. Got value: often"),
        ("loss_reduction", "median", 'Parser key "loss_reduction":'),
        ("every_n_steps", "0", "InterferenceMonitor: every_n_steps is 0, expected at least 1."),
    ],
)
def test_a_mistake_gives_a_line_that_names_it(
    tmp_path: Path,
    fit: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: str,
    line: str,
) -> None:
    path = tmp_path / "mistake.yaml"
    path.write_text(
        "trainer:\n  callbacks+:\n    - class_path: qkov_lightning.InterferenceMonitor\n"
        f"      init_args:\n        {key}: {value}\n"
    )
    with pytest.raises((SystemExit, ValueError)) as raised:
        fit(config("base.yaml"), f"--config={path}", *TINY)
    printed = capsys.readouterr().err + str(raised.value)
    assert line in " ".join(printed.split()), printed[-1200:]


def test_the_freezer_works_from_a_configuration_file(
    tmp_path: Path, fit: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "freezer.yaml"
    path.write_text(
        "trainer:\n  callbacks+:\n    - class_path: qkov_lightning.HeadFreezer\n"
        "      init_args:\n        cells: [L0.H1.O, L0.H0.K]\n        stop_epoch: 3\n"
    )
    with caplog.at_level("INFO"):
        fit(config("base.yaml"), f"--config={path}", *TINY)
    assert "weights do not train, in 2 cells: L0.H1.O, L0.H0.K." in caplog.text
