"""The workflow of ``examples/ci``, its commands run as written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkov_lightning import InterferenceHeatmap

EXAMPLE = Path(__file__).parents[2] / "examples" / "ci"


def commands() -> dict[str, str]:
    """Commands of the workflow's steps, by name."""
    text = (EXAMPLE / "interference.yml").read_text()
    return dict(re.findall(r"- name: (\w+)\n\s+run: (.+)", text))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example after its training and measuring steps."""
    directory = tmp_path_factory.mktemp("work") / "ci"
    shutil.copytree(EXAMPLE, directory)
    for step in ("Train", "Measure"):
        done = run(commands()[step], directory)
        assert done.returncode == 0, done.stderr
    return directory


def run(command: str, directory: Path) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GITHUB_STEP_SUMMARY": str(directory / "summary.md")}
    return subprocess.run(
        command, shell=True, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_the_gate_passes_against_the_baseline_of_the_example(workplace: Path) -> None:
    done = run(commands()["Gate"], workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No interference drift" in done.stdout
    assert (workplace / "gate.xml").is_file()


def test_the_gate_fails_where_the_accepted_interference_was_lower_until_it_is_accepted(
    workplace: Path,
) -> None:
    file = workplace / "baseline.json"
    before = file.read_bytes()
    data = json.loads(before)
    a, b = data["tasks"].index("last"), data["tasks"].index("mean")
    for values in (data["scores"]["relative"], *data["replicates"]["relative"]):
        values[a][b][0][1][3] *= 0.1  # layer 0, head 1, O
    file.write_text(json.dumps(data))
    try:
        done = run(commands()["Gate"], workplace)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stdout.startswith("::error title=Interference drift%3A L0.H1.O::")
        assert "L0.H1.O" in (workplace / "summary.md").read_text()
        command = next(line.strip() for line in done.stdout.splitlines() if "qkov baseline update" in line)
        assert run(command, workplace).returncode == 0
        assert run(commands()["Gate"], workplace).returncode == 0
    finally:
        file.write_bytes(before)


def test_a_rise_of_a_quarter_is_found_since_the_samples_are_the_same(workplace: Path) -> None:
    """The baseline that was shipped had no values without each group: the rise passed."""
    data = json.loads((workplace / "baseline.json").read_text())
    assert len(data["replicates"]["relative"]) == 16
    a, b = data["tasks"].index("last"), data["tasks"].index("mean")
    for values in (data["scores"]["relative"], *data["replicates"]["relative"]):
        values[a][b][0][1][3] /= 1.25
    risen = workplace / "lower.json"
    risen.write_text(json.dumps(data))
    done = run(f"qkov gate current.json --baseline {risen.name}", workplace)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "(the same samples)" in done.stdout
    data["replicates"] = {}
    risen.write_text(json.dumps(data))
    done = run(f"qkov gate current.json --baseline {risen.name}", workplace)
    assert "(the same samples)" not in done.stdout


def test_a_baseline_of_an_older_version_is_refused_by_name(workplace: Path) -> None:
    data = json.loads((workplace / "baseline.json").read_text()) | {"schema": 1}
    (workplace / "old.json").write_text(json.dumps(data))
    done = run("qkov gate current.json --baseline old.json", workplace)
    assert done.returncode == 3
    assert "heatmap schema 1, expected 2: another version measured it" in done.stdout


def test_a_probe_takes_a_loss_samples_and_arguments_by_name(workplace: Path) -> None:
    (workplace / "own.py").write_text(
        "from torch.utils.data import DataLoader\n"
        "from toy import Tasks, Toy\n"
        "class Own(Tasks):\n"
        "    def __init__(self, count: int) -> None:\n"
        "        super().__init__()\n"
        "        self.count = count\n"
        "    def fixed(self):\n"
        "        return DataLoader(self.samples(self.count, seed=1), batch_size=16)\n"
        "def doubled(model, batch):  # a function need not say what it returns\n"
        "    return 2 * model.training_step(batch, 0)\n"
    )
    data = "--data own.Own --data.count 64 --hook fixed"
    command = f"qkov probe model.ckpt --model toy.Toy {data} --loss own.doubled --output doubled.json"
    done = run(command, workplace)
    assert done.returncode == 0, done.stderr
    single, doubled = (
        InterferenceHeatmap.load(workplace / name) for name in ("current.json", "doubled.json")
    )
    assert doubled.notes["samples"] == single.notes["samples"]
    for score, factor in {"interference": 2, "relative": 1}.items():
        torch.testing.assert_close(doubled.scores[score], factor * single.scores[score], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model.ckpt --model toy.Toy", "Say what to load"),
        ("absent.ckpt --model toy.Toy --data toy.Tasks", "absent.ckpt"),
        ("model.ckpt --model toy.Toy --data toy.Tasks --hook samples_of", "No method `samples_of` in Tasks, Toy"),
        ("model.ckpt --model toy.Absent --data toy.Tasks", "toy.Absent"),
        ("toy.py --model toy.Toy --data toy.Tasks", "toy.py cannot be loaded into Toy"),
    ],
)  # fmt: skip
def test_a_probe_that_cannot_be_is_wrong_usage(workplace: Path, arguments: str, message: str) -> None:
    done = run(f"qkov probe {arguments} --output none.json", workplace)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace / "none.json").exists()
