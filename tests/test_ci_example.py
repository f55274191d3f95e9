"""The workflow of ``examples/ci``, its commands run as written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "ci"


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
    data["scores"]["relative"][a][b][0][1][3] = 0.01  # layer 0, head 1, O
    data["standard_errors"]["relative"][a][b][0][1][3] = 0.001
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
