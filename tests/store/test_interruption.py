"""Killed at any moment, a run goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from qkov_lightning import InterferenceHeatmap

SCRIPT = Path(__file__).with_name("run_until_killed.py")


def run(root: Path, kills: int) -> str:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
    }
    command = [sys.executable, str(SCRIPT), str(root), str(kills)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_fifty_kills_change_no_number(tmp_path: Path) -> None:
    """Every restart resumes, the cache holds whole records only, and the last heatmap is the same."""
    run(tmp_path / "straight", 0)
    assert "killed 50" in run(tmp_path / "killed", 50)
    straight = InterferenceHeatmap.load(tmp_path / "straight" / "interference" / "latest.json")
    finished = sorted((tmp_path / "killed").glob("*/interference/latest.json"))
    final = [InterferenceHeatmap.load(path) for path in finished]
    assert sum(heatmap.to_json() == straight.to_json() for heatmap in final) >= 1
    assert all(
        heatmap.to_json() == straight.to_json() for heatmap in final if heatmap.epoch == straight.epoch
    )
