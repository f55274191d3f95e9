"""Two processes give what one gives, or say why they cannot; a process that fails stops no other for long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from modules import Module, loader, trainer
from torch import Tensor
from versions import needs_sharding_on_cpu

from qkov_lightning import GradientCache, InterferenceHeatmap, InterferenceMonitor

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)

SCRIPT = Path(__file__).with_name("run_distributed.py")


@dataclass(frozen=True)
class Runs:
    """What the processes of each mode left behind."""

    root: Path
    codes: dict[str, list[Any]]

    def heatmap(self, mode: str) -> InterferenceHeatmap:
        assert set(self.codes[mode]) == {0}, self.output(mode)
        return InterferenceHeatmap.load(self.root / mode / "interference" / "latest.json")

    def parameters(self, mode: str, rank: int) -> list[Tensor]:
        assert self.codes[mode][rank] == 0, self.output(mode)
        return torch.load(self.root / mode / f"parameters-{rank}.pt")

    def warnings(self, mode: str, rank: int) -> list[str]:
        return json.loads((self.root / mode / f"warnings-{rank}.json").read_text())

    def output(self, mode: str) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted((self.root / mode).glob("output-*")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All modes in one go, forked from one process, which imports everything once."""
    root = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
    }
    command = [sys.executable, str(SCRIPT), str(root)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return Runs(root, json.loads((root / "codes.json").read_text()))


def assert_same(one: InterferenceHeatmap, two: InterferenceHeatmap) -> None:
    assert one.tasks == two.tasks
    assert torch.equal(one.num_samples, two.num_samples)
    for score, values in one.scores.items():
        # Float32 sums over samples in another order.
        torch.testing.assert_close(two.scores[score], values, rtol=1e-4, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(
            two.standard_errors[score], one.standard_errors[score], rtol=1e-3, atol=1e-6, equal_nan=True
        )
    # A pair and its mirror image hurt alike under SGD: which of them is third is a matter of rounding.
    first = [
        {frozenset((pair.sample_a, pair.sample_b, pair.name)) for pair in h.pairs[:3]} for h in (one, two)
    ]
    assert first[0] == first[1]


def test_two_processes_equal_one_though_each_sees_one_task_only(runs: Runs) -> None:
    """26 samples in batches of 4: the last batch is uneven too."""
    assert_same(runs.heatmap("one process"), runs.heatmap("ddp"))


def test_uneven_batches_give_the_same_heatmap(runs: Runs) -> None:
    """Three samples in one process, one in the other: each undoes the mean over its own batch."""
    assert_same(runs.heatmap("one process"), runs.heatmap("uneven"))


def test_accumulation_between_synchronisations_gives_the_same_heatmap(runs: Runs) -> None:
    """Seven batches in windows of four: the gradients of most are not exchanged."""
    assert_same(runs.heatmap("one process"), runs.heatmap("ddp, accumulating"))


@needs_sharding_on_cpu
@pytest.mark.parametrize("mode", ["fsdp", "fsdp, uneven"])
def test_a_fully_sharded_model_gives_the_same_heatmap(runs: Runs, mode: str) -> None:
    assert_same(runs.heatmap("one process"), runs.heatmap(mode))


def test_a_probe_gives_the_same_heatmap(runs: Runs) -> None:
    assert_same(runs.heatmap("probe, one process"), runs.heatmap("probe"))


def test_a_process_without_a_layer_to_score_gives_the_same_heatmap(runs: Runs) -> None:
    assert len(runs.heatmap("one layer").layers) == 1
    assert_same(runs.heatmap("one layer, one process"), runs.heatmap("one layer"))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=needs_sharding_on_cpu)])
@pytest.mark.parametrize("rank", [0, 1])
def test_distributed_training_is_bit_identical_with_and_without_the_monitor(
    runs: Runs, strategy: str, rank: int
) -> None:
    with_monitor, without = (
        runs.parameters(f"{strategy}, {what}", rank) for what in ("monitor", "no monitor")
    )
    assert all(torch.equal(a, b) for a, b in zip(with_monitor, without, strict=True))


def test_a_cache_directory_that_is_not_shared_is_refused_by_all_processes(runs: Runs) -> None:
    assert runs.codes["not shared"] == [1, 1]
    for rank in range(2):
        text = (runs.root / "not shared" / f"output-{rank}.txt").read_text()
        assert "Not every process sees the cache directory" in text


def test_tensor_parallelism_is_refused_by_all_processes(runs: Runs) -> None:
    assert runs.codes["tensor parallel"] == [1, 1]
    assert "cannot see whole heads under ModelParallelStrategy with tensor_parallel_size=2" in runs.output(
        "tensor parallel"
    )


def test_a_probe_under_full_sharding_is_refused_by_all_processes(runs: Runs) -> None:
    assert runs.codes["fsdp, probe"] == [1, 1]
    assert "cannot run its probe under ModelParallelStrategy" in runs.output("fsdp, probe")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_without_a_proof_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """They need an accelerator: only their names are here."""
    strategy = type(name, (SingleDeviceStrategy,), {})("cpu")
    with pytest.raises(ValueError, match=f"is not tested under {name}"):
        trainer(tmp_path, InterferenceMonitor(), accelerator="auto", strategy=strategy).fit(
            Module(), loader(8)
        )


@pytest.mark.parametrize("mode", ["no directory", "full while training", "full while measuring"])
def test_a_process_that_cannot_write_switches_all_off_and_training_goes_on(runs: Runs, mode: str) -> None:
    for rank in range(2):
        plain, trained = runs.parameters("ddp, no monitor", rank), runs.parameters(mode, rank)
        assert all(torch.equal(a, b) for a, b in zip(plain, trained, strict=True))
        assert len(runs.warnings(mode, rank)) == 1, "each process says once that it is off"
    texts = [runs.warnings(mode, rank)[0] for rank in range(2)]
    failing = 0 if mode == "no directory" else 1
    assert "cannot be written" in texts[failing]
    assert "Another process" in texts[1 - failing]
    assert not (runs.root / mode / "interference" / "latest.json").exists()


def test_a_process_that_is_killed_does_not_leave_the_other_waiting(runs: Runs) -> None:
    assert runs.codes["dies"] == [1, -signal.SIGKILL], runs.output("dies")


def test_a_process_that_stops_in_the_middle_of_a_measurement_holds_the_other_until_the_timeout(
    runs: Runs,
) -> None:
    """It neither dies nor answers: only the timeout of the process group can end the wait."""
    assert runs.codes["stops"] == [1, "stopped"], runs.output("stops")
    assert "imed out" in runs.output("stops")


def test_two_processes_join_their_sums(runs: Runs) -> None:
    """Each sees one task. Only the weights that are drawn, from the first batch, may be others."""
    one, two = runs.heatmap("summed, one process"), runs.heatmap("summed")
    assert two.notes["storage"] == "summed"
    for score in ("interference", "relative", "cosine", "conflict"):
        for pair in one.task_pairs:
            found, expected = two.values(*pair, score), one.values(*pair, score)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(one.num_samples, two.num_samples)


def test_two_processes_keep_the_same_sampled_weights(runs: Runs) -> None:
    """Each sees one task, so that each alone would draw others; process 0 draws for both."""
    heatmap = runs.heatmap("sampled")
    assert heatmap.notes["storage"] == "sampled"
    (cache,) = (runs.root / "sampled" / "interference" / "cache").iterdir()
    records = [record for record, _ in GradientCache(cache, rank=999).records()]
    assert {record.rank for record in records} == {0, 1}
    assert {record.fingerprint for record in records} == {heatmap.notes["sampling"]["fingerprint"]}
    assert not heatmap.values("math", "code")[0, :, 0].isnan().all()
