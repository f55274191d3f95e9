"""Every example runs."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_demo_leaves_a_heatmap_of_its_three_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import demo

    whole = demo.Trainer

    def short(**options: object) -> object:
        return whole(**{**options, "max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1})

    monkeypatch.setattr(demo, "Trainer", short)
    monkeypatch.setattr(demo, "InterferenceMonitor", lambda: _monitor())
    demo.main()
    (latest,) = tmp_path.rglob("latest.json")
    assert json.loads(latest.read_text())["tasks"] == ["code", "math", "prose"]
    assert "tensorboard --logdir" in capsys.readouterr().out


def _monitor() -> object:
    from qkov_lightning import InterferenceMonitor

    return InterferenceMonitor(every_n_steps=1)


def test_plain_loop_scores_every_pair_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    import plain_loop

    plain_loop.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("nan" not in line for line in lines)
