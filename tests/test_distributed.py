"""Two processes give what one gives, or say why they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from qkov_lightning import GradientCache, InterferenceHeatmap

SCRIPT = Path(__file__).with_name("run_distributed.py")


def run(root: Path, mode: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
    }
    command = [sys.executable, str(SCRIPT), str(root), mode]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_processes_equal_one_though_each_sees_one_task_only(tmp_path: Path) -> None:
    """26 samples in batches of 4: the last batch is uneven too."""
    for mode in ("one process", "two processes"):
        result = run(tmp_path / mode, mode)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (
        InterferenceHeatmap.load(tmp_path / mode / "interference" / "latest.json")
        for mode in ("one process", "two processes")
    )
    assert one.tasks == two.tasks
    assert torch.equal(one.num_samples, two.num_samples)
    for score, values in one.scores.items():
        # Float32 sums over samples in another order.
        torch.testing.assert_close(two.scores[score], values, rtol=1e-4, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(
            two.standard_errors[score], one.standard_errors[score], rtol=1e-3, atol=1e-6, equal_nan=True
        )
    assert {str(pair) for pair in one.pairs[:3]} == {str(pair) for pair in two.pairs[:3]}


def test_two_processes_keep_the_same_sampled_weights(tmp_path: Path) -> None:
    """Each sees one task, so that each alone would draw others; process 0 draws for both."""
    result = run(tmp_path, "sampled")
    assert result.returncode == 0, result.stderr[-3000:]
    heatmap = InterferenceHeatmap.load(tmp_path / "interference" / "latest.json")
    assert heatmap.notes["storage"] == "sampled"
    (cache,) = (tmp_path / "interference" / "cache").iterdir()
    records = [record for record, _ in GradientCache(cache, rank=999).records()]
    assert {record.rank for record in records} == {0, 1}
    assert {record.fingerprint for record in records} == {heatmap.notes["sampling"]["fingerprint"]}
    assert not heatmap.values("math", "code")[0, :, 0].isnan().all()


def test_a_cache_directory_that_is_not_shared_is_refused_by_all_processes(tmp_path: Path) -> None:
    result = run(tmp_path, "not shared")
    assert result.returncode != 0
    assert "Not every process sees the cache directory" in result.stderr
