"""Summed storage: exact where sums can tell, of the samples that the cache has, over restarts and faults."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from models import Classifier, GroupedAttention
from modules import ADVICE, loader, trainer
from test_sampling import LongSamples, Wide, resumable
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from versions import WHOLE_CHECKPOINT

from qkov_lightning import GradientCache, InterferenceHeatmap, InterferenceMonitor, find_projections
from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import head_gradients
from qkov_lightning.capture.samples import Samples
from qkov_lightning.heads.projections import BLOCKS, Projection
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.generations import read_manifest
from qkov_lightning.store.sampling import Coordinates
from qkov_lightning.store.sum_memory import SETS_ON_DISK, sums_disk_bytes
from qkov_lightning.store.sums import RunningSums
from qkov_lightning.store.window import Window

pytestmark = pytest.mark.filterwarnings(*ADVICE)

DAMPING, STEP = 1e-3, 0.01
EXACT = ("interference", "relative", "cosine", "conflict")
"""Scores of two tasks that sums tell wholly."""


def monitor(storage: Any = "summed", **kwargs: Any) -> InterferenceMonitor:
    options = {"every_n_steps": 1, "num_hot_cells": 1, "update_direction": "adam", **kwargs}
    return InterferenceMonitor(storage=storage, **options)


# The oracle: whole gradients in float64, and the formulas of the README written out


def of_exact_cache(directory: Path, projection: Projection) -> tuple[Tensor, list[str], list[int]]:
    """Gradients, tasks and steps of all samples that another monitor has kept whole."""
    records = [record for record, _ in GradientCache(directory, max_samples_per_task=10**6).records()]
    gradients = torch.cat([
        head_gradients(record.read(projection.module_name), projection, record.scales) for record in records
    ]).double()
    tasks = [task for record in records for task in record.samples.tasks]
    return gradients, tasks, [record.step for record in records for _ in record.samples.tasks]


def oracle(gradients: dict[str, Tensor], head: int) -> dict[str, Tensor]:
    """Scores ``[task_a, task_b]`` of one head, for tasks in alphabetical order."""
    own = [gradients[task][:, head] for task in sorted(gradients)]
    fisher = torch.stack([one.square().mean(dim=0) for one in own]).mean(dim=0)
    damped = fisher + DAMPING * fisher.mean()
    result = {name: torch.zeros(len(own), len(own)).double() for name in (*EXACT, "slope")}
    for a, of_a in enumerate(own):
        for b, of_b in enumerate(own):
            mean_a, mean_b = of_a.mean(dim=0), of_b.mean(dim=0)
            square = of_b.square().mean(dim=0)
            value = (of_a.square().mean(dim=0) / damped * of_b.abs().mean(dim=0)).sum()
            result["interference"][a, b] = value
            result["relative"][a, b] = value / of_b.abs().mean(dim=0).sum()
            result["cosine"][a, b] = mean_a @ mean_b / mean_a.norm() / mean_b.norm()
            white_a, white_b = mean_a / damped.sqrt(), mean_b / damped.sqrt()
            result["conflict"][a, b] = white_a @ white_b / white_a.norm() / white_b.norm()
            direction = mean_b / (square + DAMPING * square.mean()).sqrt()
            result["slope"][a, b] = -STEP * (mean_a @ direction)
    return result


def window_of(tasks: Sequence[str], steps: Sequence[int], max_samples: int) -> list[bool]:
    """Which samples are in the last two generations of their task, by the rule in words.

    A generation takes whole steps, up to half of the samples.
    """
    keep = [False] * len(tasks)
    for task in set(tasks):
        generations: list[list[int]] = [[]]
        for step in sorted({s for t, s in zip(tasks, steps, strict=True) if t == task}):
            own = [i for i, (t, s) in enumerate(zip(tasks, steps, strict=True)) if (t, s) == (task, step)]
            if generations[-1] and len(generations[-1]) + len(own) > max_samples // 2:
                generations.append([])
            generations[-1] += own
        for index in (i for generation in generations[-2:] for i in generation):
            keep[index] = True
    return keep


def check_against_oracle(heatmap: InterferenceHeatmap, exact: Path, model: Any, max_samples: int) -> int:
    """Every cell of two tasks, and the counts of all; returns the number of samples left out."""
    left_out = 0
    for projection in find_projections(model):
        gradients, tasks, steps = of_exact_cache(exact, projection)
        keep = window_of(tasks, steps, max_samples)
        left_out += keep.count(False)
        rows = {
            task: [i for i, (t, kept) in enumerate(zip(tasks, keep, strict=True)) if t == task and kept]
            for task in sorted(set(tasks))
        }
        for head in range(projection.num_heads):
            expected = oracle({task: gradients[own] for task, own in rows.items()}, head)
            cell = (..., projection.layer, head, BLOCKS.index(projection.block))
            for score in EXACT:
                found = heatmap.scores[score][cell]
                for a, b in ((0, 1), (1, 0)):  # sums in float32, and cancellation
                    torch.testing.assert_close(found[a, b], expected[score][a, b], rtol=1e-4, atol=1e-5)
            assert heatmap.num_samples[cell].tolist() == [len(own) for own in rows.values()]
    return left_out


@pytest.mark.parametrize("max_samples", [128, 12])
def test_the_scores_of_two_tasks_are_exact_over_the_samples_of_the_window(
    tmp_path: Path, max_samples: int
) -> None:
    """Heads of 1,024 weights, of which 512 are kept of each sample."""
    summed = monitor(max_samples_per_task=max_samples)
    exact = monitor("factors", name="exact", max_samples_per_task=1000, keep_cache=True)
    module = Wide()
    trainer(tmp_path, summed, exact).fit(module, loader(48), loader(4))
    assert summed.heatmap.notes["storage"] == "summed"
    assert summed.heatmap.notes["fisher"] == "mean over the heatmap's samples"  # the gate asks for it
    cache = Path(exact.state_dict()["cache"])
    left_out = check_against_oracle(summed.heatmap, cache, module, max_samples)
    assert (left_out > 0) == (max_samples == 12)


@pytest.mark.parametrize("max_samples", [128, 12])
def test_a_sample_that_comes_again_counts_once(tmp_path: Path, max_samples: int) -> None:
    """At weights that stay, three epochs show what one does, own tasks included."""
    once, thrice = monitor(), monitor(max_samples_per_task=max_samples)
    trainer(tmp_path / "once", once).fit(Wide(), loader(12), loader(4))
    trainer(tmp_path / "thrice", thrice, max_epochs=3).fit(Wide(), loader(12), loader(4))
    assert torch.equal(thrice.heatmap.num_samples, once.heatmap.num_samples)
    for score in SCORES:
        for values in ("scores", "standard_errors"):
            found, expected = (getattr(one.heatmap, values)[score] for one in (thrice, once))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True, msg=score)
    pairs = [
        (pair.sample_a, pair.sample_b, pair.layer, pair.head, pair.block) for pair in thrice.heatmap.pairs
    ]
    assert len(pairs) == len(set(pairs))


class WithAdam(Wide):
    """Second moments to take a direction from, and weights that stay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.0)


@pytest.mark.parametrize("direction", ["adam", "sgd", "state"])
def test_the_slope_is_that_of_exact_storage_along_every_direction(tmp_path: Path, direction: str) -> None:
    monitors = {
        storage: monitor(storage, name=storage, update_direction=direction)
        for storage in ("summed", "factors")
    }
    trainer(tmp_path, *monitors.values()).fit(WithAdam(), loader(24), loader(4))
    slopes = [
        one.heatmap.values(*pair, "loss_rise") - STEP**2 / 2 * one.heatmap.values(*pair, "forgetting")
        for one in monitors.values() for pair in (("math", "code"), ("code", "math"))
    ]  # fmt: skip
    for summed, exact in zip(slopes[:2], slopes[2:], strict=True):
        torch.testing.assert_close(summed, exact, rtol=1e-3, atol=1e-7, equal_nan=True)


def test_no_standard_error_is_zero_where_a_score_is_known_exactly(tmp_path: Path) -> None:
    summed = monitor()
    trainer(tmp_path, summed).fit(Wide(), loader(24), loader(4))
    for score in (*EXACT, "loss_rise"):
        errors = summed.heatmap.errors("math", "code", score)
        assert (errors[~errors.isnan()] > 0).all(), score


def test_a_model_whose_heads_are_kept_whole_gives_the_numbers_of_its_samples(tmp_path: Path) -> None:
    """Nothing is left to calibrate where all weights of each sample are known."""
    from modules import Module

    summed, sampled = monitor(), monitor("sampled", fisher_decay=0.0)
    for storage, one in (("summed", summed), ("sampled", sampled)):
        # One captured step: the moving average of the other is then the plain mean, too.
        fit = trainer(tmp_path / storage, one, limit_train_batches=1)
        fit.fit(Module(learning_rate=0.0), DataLoader(list(loader(24).dataset), 24), loader(4))
    for score, values in sampled.heatmap.scores.items():
        torch.testing.assert_close(
            summed.heatmap.scores[score], values, rtol=1e-4, atol=1e-6, equal_nan=True, msg=score
        )


class Late(Wide):
    """A second attention layer that only some batches pass, and no sample of one task."""

    def __init__(self, passes: Callable[[int, dict[str, Any]], bool]) -> None:
        super().__init__()
        self.passes = passes
        torch.manual_seed(6)
        attention = GroupedAttention(width=64, heads=2, kv_heads=1, size=16, value_size=16)
        self.second = Classifier([attention], width=64)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.network(batch["tokens"]), batch["target"])
        if self.passes(batch_idx, batch):
            loss = loss + functional.cross_entropy(self.second(batch["tokens"]), batch["target"])
        return loss


def test_a_layer_whose_samples_have_left_the_window_has_no_data(tmp_path: Path) -> None:
    one = monitor(max_samples_per_task=8)
    module = Late(lambda batch_idx, _: batch_idx < 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that modules deliver nothing
        trainer(tmp_path, one).fit(module, loader(48), loader(4))
    seen = one.heatmap.num_samples.sum(dim=(0, 2, 3))
    assert seen[0] > 0
    assert seen[1] == 0
    assert one.heatmap.scores["cosine"][:, :, 1].isnan().all()


def test_a_task_without_samples_at_a_layer_takes_no_score_from_the_others(tmp_path: Path) -> None:
    def data() -> DataLoader:
        samples = [
            dict(one, task="late" if i // 4 % 3 == 2 else one["task"])
            for i, one in enumerate(loader(48).dataset)
        ]
        return DataLoader(samples, 4)

    monitors = [monitor(name="summed"), monitor("factors", name="exact")]
    module = Late(lambda _, batch: batch["task"][0] != "late")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, *monitors).fit(module, data(), loader(4))
    found, expected = (one.heatmap.values("math", "code", "cosine") for one in monitors)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert not expected[1].isnan().all()
    assert monitors[0].heatmap.values("math", "late", "cosine")[1].isnan().all()


# Restarts


def test_a_resumed_run_gives_the_heatmap_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    def data() -> tuple[Any, Any]:
        return loader(24, ids=False), loader(4)

    options = {"max_samples_per_task": 12}
    straight, resumed = monitor(**options), monitor("auto", **options)
    resumable(tmp_path / "straight", straight, 3).fit(Wide(), *data())
    resumable(tmp_path / "stopped", monitor(**options), 2).fit(Wide(), *data())
    last = tmp_path / "stopped" / "checkpoints" / "epoch=0.ckpt"
    resumable(tmp_path / "resumed", resumed, 3).fit(Wide(), *data(), ckpt_path=last, **WHOLE_CHECKPOINT)
    assert resumed.heatmap.notes["storage"] == "summed"
    assert resumed.heatmap.to_json() == straight.heatmap.to_json()


def test_a_resumed_run_without_its_sums_says_so_and_begins_anew(tmp_path: Path) -> None:
    stopped = monitor(cache_dir=tmp_path / "cache")
    resumable(tmp_path / "stopped", stopped, 1).fit(Wide(), loader(24, ids=False), loader(4))
    shutil.rmtree(Path(stopped.state_dict()["cache"]) / "sums")
    last = tmp_path / "stopped" / "checkpoints" / "epoch=0.ckpt"
    resumed = monitor(cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="sums of the checkpoint are gone .* rests on new samples only"):
        resumable(tmp_path / "resumed", resumed, 2).fit(
            Wide(), loader(24, ids=False), loader(4), ckpt_path=last, **WHOLE_CHECKPOINT
        )
    assert int(resumed.heatmap.num_samples[:, 0, 0, 0].sum()) == 24


def test_nothing_but_what_checkpoints_and_the_window_need_stays_on_disk(tmp_path: Path) -> None:
    one = monitor(max_samples_per_task=8, cache_dir=tmp_path / "cache", keep_cache=True)
    resumable(tmp_path, one, 6).fit(Wide(), loader(24, ids=False), loader(4))
    directory = Path(one.state_dict()["cache"]) / "sums"
    manifests = sorted(directory.glob("*.json"))
    assert len(manifests) == 2  # of the last two checkpoints
    named = {generation.folder for path in manifests for some in read_manifest(path) for generation in some}
    assert {path.name for path in directory.iterdir() if path.is_dir()} == named
    # For each of two tasks: two generations of each checkpoint.
    assert len(named) <= 2 * SETS_ON_DISK


# Faults


def test_damaged_sums_leave_the_scores_to_the_sampled_weights(tmp_path: Path) -> None:
    whole, damaged = monitor(), monitor(max_samples_per_task=12)
    trainer(tmp_path / "a", whole).fit(Wide(), loader(24), loader(4))
    hit = None

    class Vandal(type(damaged)):  # type: ignore[misc]
        def on_validation_epoch_end(self, *arguments: Any) -> None:
            nonlocal hit
            folder = Path(self.state_dict()["cache"]) / "sums"
            for path in folder.glob("*/*.safetensors"):
                content = bytearray(path.read_bytes())
                content[-5] ^= 255
                path.write_bytes(bytes(content))
                hit = path
            super().on_validation_epoch_end(*arguments)

    one = Vandal(every_n_steps=1, storage="summed", max_samples_per_task=12)
    with pytest.warns(
        UserWarning, match="do not match their checksum. Scores of its cells come from sampled"
    ):
        trainer(tmp_path / "b", one).fit(Wide(), loader(24), loader(4))
    assert hit is not None
    values = one.heatmap.values("math", "code", "relative")
    assert values[~values.isnan()].numel() > 0


def test_a_lost_sample_leaves_the_scores_to_the_sampled_weights(tmp_path: Path) -> None:
    """The sums still hold it: they are of other samples than those that can be read."""

    class Vandal(InterferenceMonitor):
        def on_validation_epoch_end(self, *arguments: Any) -> None:
            folder = Path(self.state_dict()["cache"])
            sorted(folder.glob("*.safetensors"))[0].unlink()
            super().on_validation_epoch_end(*arguments)

    lost = Vandal(every_n_steps=1, storage="summed", num_hot_cells=0)
    whole = monitor()
    trainer(tmp_path / "whole", whole).fit(Wide(), loader(24), loader(4))
    with pytest.warns(UserWarning, match="files of the cache .* are gone"):
        trainer(tmp_path / "lost", lost).fit(Wide(), loader(24), loader(4))
    assert int(lost.heatmap.num_samples[:, 0, 0, 0].sum()) == 20
    # No exact score has an error of sampling; these do again.
    score = "cosine"
    assert not torch.equal(
        lost.heatmap.values("math", "code", score), whole.heatmap.values("math", "code", score)
    )


def test_without_room_for_the_sums_of_another_task_it_goes_on_without_sums(tmp_path: Path) -> None:
    step, projections = captured(("a",), seed=0)
    sums = running(tmp_path, [step], projections, tasks_that_fit=2)
    sums.add(0, [step])
    sums.add(1, [captured(("b",), seed=1)[0]])
    assert not sums.is_given_up
    with pytest.warns(UserWarning, match=r"goes on without its sums.*those of 3 tasks need .* GiB of disk"):
        sums.add(2, [captured(("c",), seed=2)[0]])
    assert sums.is_given_up
    sums.add(3, [captured(("a",), seed=3)[0]])
    assert [one.count for one in sums.generations] == [2, 1, 1]  # it still knows who they are
    window = Window(sums.generations, sums.directory, sums.in_memory)
    assert window.means("layer 0 Q", ["a"], [2]) is None


# The choice


def test_auto_takes_the_first_of_three_that_fits_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sample takes 25 kB exactly (6,144 weights) and 12 kB sampled; sums of two tasks 147 kB."""
    said = []
    for budget, expected in ((1.0, "factors"), (2.1e-3, "summed"), (3e-4, "sampled")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            auto = monitor("auto", max_cache_gb=budget, max_samples_per_task=24)
            trainer(tmp_path / expected, auto).fit(Wide(), DataLoader(LongSamples(48), batch_size=4))
        assert auto.heatmap.notes["storage"] == expected
        said += [one.message for one in caplog.records if " storage; " in one.message]
    assert len(said) == 3
    assert "InterferenceMonitor: exact storage; exact gradients take" in said[0]
    assert "summed storage; exact gradients take 0.0011 GiB for 24 samples of 2 tasks" in said[1]
    assert "sampled storage; " in said[2]
    assert "Scores other than interference and relative are rough" in said[2]


def test_summed_storage_that_cannot_fit_goes_on_without_sums(tmp_path: Path) -> None:
    one = monitor(max_cache_gb=3e-4, max_samples_per_task=4)
    with pytest.warns(UserWarning, match="summed storage goes on without its sums"):
        trainer(tmp_path, one).fit(Wide(), loader(24), loader(4))
    values = one.heatmap.values("math", "code", "relative")
    assert values[~values.isnan()].numel() > 0


def test_sums_beyond_the_memory_are_mapped_from_a_file_with_the_same_numbers(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    inside, mapped = monitor(name="inside"), monitor(name="mapped", max_memory_gb=1e-5)
    trainer(tmp_path, inside, mapped, max_epochs=2).fit(Wide(), loader(24, ids=False), loader(4))
    for score, values in inside.heatmap.scores.items():
        assert torch.equal(values.nan_to_num(), mapped.heatmap.scores[score].nan_to_num()), score


def test_a_disk_without_room_for_a_mapped_file_is_an_error_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    step, projections = captured(("a",), seed=0)
    sums = running(tmp_path, [step], projections, max_memory_bytes=0)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CacheError, match=r"mapped-00000 cannot be written: .*No space left"):
        sums.add(0, [step])


# The sums themselves


def captured(tasks: tuple[str, ...], seed: int, tokens: int = 3) -> tuple[CapturedStep, list[Projection]]:
    """A step of one layer with Q heads of 4 x 200 weights."""
    generator = torch.Generator().manual_seed(seed)
    count = len(tasks) * tokens
    factors = GradientFactors(
        torch.randn(count, 200, generator=generator), torch.randn(count, 8, generator=generator),
        torch.arange(0, count + 1, tokens),
    )  # fmt: skip
    projection = Projection("q", 0, "layer", "Q", torch.arange(8).view(2, 4))
    samples = Samples(tasks, tuple(f"{seed}.{i}" for i in range(len(tasks))))
    scales = torch.arange(1.0, len(tasks) + 1).double()
    return CapturedStep(samples, scales, torch.ones_like(scales), {"q": factors}), [projection]


def running(
    directory: Path,
    first: list[CapturedStep],
    projections: list[Projection],
    max_samples: int = 8,
    rank: int = 0,
    world_size: int = 1,
    tasks_that_fit: int = 10,
    record_bytes: int = 1,
    max_memory_bytes: int = 2**30,
) -> RunningSums:
    coordinates = Coordinates.draw(first, projections)
    disk = sums_disk_bytes(1600, tasks_that_fit, 2**30)
    return RunningSums(
        directory,
        rank,
        world_size,
        projections,
        coordinates,
        max_samples,
        max_memory_bytes,
        disk + record_bytes,
    )


def expected_means(steps: Sequence[CapturedStep], projection: Projection, task: str) -> Tensor:
    gradients = torch.cat([
        head_gradients(step.factors["q"], projection, step.scales)[[t == task for t in step.samples.tasks]]
        for step in steps
    ]).double()
    return torch.stack([gradients.mean(dim=0), gradients.abs().mean(dim=0), gradients.square().mean(dim=0)])


def test_sums_of_several_processes_join_at_a_measurement(tmp_path: Path) -> None:
    """Task ``b`` is seen by one of the two processes alone."""
    steps = {(step, rank): captured(("a", "a", "b") if rank else ("a", "a"), seed=10 * step + rank)
             for step in range(5) for rank in range(2)}  # fmt: skip
    projection = steps[0, 0][1][0]
    written = []
    for rank in range(2):
        sums = running(tmp_path, [steps[0, 0][0]], [projection], max_samples=8, rank=rank, world_size=2)
        for step in range(5):
            sums.add(step, [steps[step, rank][0]])
        written += sums.snapshot(5, ())
    window = Window(written, tmp_path, lambda task, name: None)
    # Two steps of two samples are a generation: the fifth step is the current one.
    means = window.means("layer 0 Q", ["a", "b"], [12, 5])
    assert means is not None
    of_a = [steps[step, rank][0] for step in (2, 3, 4) for rank in range(2)]
    torch.testing.assert_close(
        means[:, 0].double(), expected_means(of_a, projection, "a"), rtol=1e-5, atol=1e-6
    )
    of_b = [steps[step, 1][0] for step in range(5)]
    torch.testing.assert_close(
        means[:, 1].double(), expected_means(of_b, projection, "b"), rtol=1e-5, atol=1e-6
    )
    assert window.means("layer 0 Q", ["a", "b"], [12, 4]) is None  # of other samples


def test_one_process_goes_on_where_two_stopped(tmp_path: Path) -> None:
    steps = {
        (step, rank): captured(("a", "b"), seed=10 * step + rank)[0] for step in range(3) for rank in range(2)
    }
    projection = captured(("a",), 0)[1][0]
    for rank in range(2):
        sums = running(tmp_path / "two", [steps[0, 0]], [projection], max_samples=4, rank=rank, world_size=2)
        for step in range(3):
            sums.add(step, [steps[step, rank]])
        sums.snapshot(3, ())
    one = running(tmp_path / "one", [steps[0, 0]], [projection], max_samples=8)
    one.resume(3, tmp_path / "two")
    means = Window(one.generations, one.directory, one.in_memory).means("layer 0 Q", ["a"], [6])
    assert means is not None
    torch.testing.assert_close(
        means[:, 0].double(), expected_means(list(steps.values()), projection, "a"), rtol=1e-5, atol=1e-6
    )
    assert one.needed_steps == {0, 1, 2}
    # Killed before the next checkpoint, it starts there once more.
    again = running(tmp_path / "one", [steps[0, 0]], [projection], max_samples=8)
    again.resume(3, tmp_path / "one")
    extra = captured(("a", "b"), seed=99)[0]
    again.add(3, [extra])
    means = Window(again.generations, again.directory, again.in_memory).means("layer 0 Q", ["a"], [7])
    assert means is not None
    torch.testing.assert_close(
        means[:, 0].double(), expected_means([*steps.values(), extra], projection, "a"), rtol=1e-5, atol=1e-6
    )


def test_a_batch_beyond_half_of_the_samples_is_a_generation_of_its_own(tmp_path: Path) -> None:
    step, projections = captured(("a",) * 6, seed=0)
    sums = running(tmp_path, [step], projections, max_samples=8)
    for number in range(3):
        sums.add(number, [captured(("a",) * 6, seed=number)[0]])
    assert [sorted(one.members) for one in sums.generations] == [[(1, 0)], [(2, 0)]]


def test_sums_are_in_float64_where_training_is(tmp_path: Path) -> None:
    step, projections = captured(("a", "a"), seed=0)
    factors = {name: GradientFactors(f.activation.double(), f.grad_output.double(), f.offsets)
               for name, f in step.factors.items()}  # fmt: skip
    double = CapturedStep(step.samples, step.scales, step.num_terms, factors)
    sums = running(tmp_path, [double], projections)
    sums.add(0, [double])
    window = Window(sums.generations, sums.directory, sums.in_memory)
    means = window.means("layer 0 Q", ["a"], [2])
    assert means is not None
    torch.testing.assert_close(
        means[:, 0], expected_means([double], projections[0], "a"), rtol=1e-12, atol=1e-14
    )


def test_two_processes_go_on_where_one_stopped(tmp_path: Path) -> None:
    step, (projection,) = captured(("a",), seed=0)
    one = running(tmp_path, [step], [projection])
    one.add(0, [step])
    one.snapshot(1, ())
    counts = []
    for rank in range(2):
        sums = running(tmp_path, [step], [projection], rank=rank, world_size=2)
        sums.resume(1, tmp_path)
        counts.append([one.count for one in sums.generations])
    assert counts == [[1], []]


def test_sums_that_another_training_left_in_the_directory_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    """The same steps, samples and task, of other gradients."""
    (left, projections), (new, _) = captured(("a",), seed=0), captured(("a",), seed=1)
    for step in (left, replace(new, samples=left.samples)):
        sums = running(tmp_path, [left], projections)
        sums.begin()
        sums.add(0, [step])
        written = sums.snapshot(1, ())
    means = Window(written, tmp_path, lambda *_: None).means("layer 0 Q", ["a"], [1])
    assert means is not None
    torch.testing.assert_close(
        means[:, 0].double(), expected_means([new], projections[0], "a"), rtol=1e-5, atol=1e-6
    )


def test_processes_of_which_one_gave_up_have_no_sums(tmp_path: Path) -> None:
    step, projections = captured(("a",), seed=0)
    whole, without = (
        running(tmp_path, [step], projections, rank=rank, world_size=2, tasks_that_fit=1 - rank)
        for rank in range(2)
    )
    whole.add(0, [step])
    with pytest.warns(UserWarning, match="goes on without its sums"):
        without.add(0, [captured(("a",), seed=1)[0]])
    written = [*whole.snapshot(1, ()), *without.snapshot(1, ())]
    assert Window(written, tmp_path, lambda *_: None).means("layer 0 Q", ["a"], [2]) is None
    joined = running(tmp_path, [step], projections)
    joined.resume(1, tmp_path)
    assert joined.is_given_up
    assert Window(joined.generations, tmp_path, joined.in_memory).means("layer 0 Q", ["a"], [2]) is None


def test_giving_up_leaves_checkpoints_what_they_need(tmp_path: Path) -> None:
    step, projections = captured(("a",), seed=0)
    sums = running(tmp_path, [step], projections, tasks_that_fit=1)
    sums.add(0, [step])
    sums.snapshot(1, ())
    with pytest.warns(UserWarning, match="goes on without its sums"):
        sums.add(1, [captured(("b",), seed=1)[0]])
    sums.snapshot(2, [1])
    again = running(tmp_path, [step], projections, tasks_that_fit=2)
    again.resume(1, tmp_path)
    again.add(1, [captured(("b",), seed=1)[0]])
    assert not again.is_given_up
    assert Window(again.generations, tmp_path, again.in_memory).means("layer 0 Q", ["a"], [1]) is not None


def test_generations_that_share_a_sample_are_not_joined(tmp_path: Path) -> None:
    """Two processes have seen one sample at different steps: the larger generation counts."""
    first, projections = captured(("a", "a"), seed=0)
    second = captured(("a", "a", "a"), seed=1)[0]
    shared = replace(second, samples=Samples(("a",) * 3, (first.samples.ids[0], "x", "y")))
    written = []
    for rank, step in enumerate((first, shared)):
        sums = running(tmp_path, [first], projections, rank=rank, world_size=2)
        sums.add(rank, [step])
        written += sums.snapshot(9, ())
    window = Window(written, tmp_path, lambda *_: None)
    assert window.means("layer 0 Q", ["a"], [3]) is not None
    assert window.means("layer 0 Q", ["a"], [5]) is None


def test_a_rare_task_does_not_hold_more_records_than_the_disk_has_room_for(tmp_path: Path) -> None:
    """Each of its steps holds the samples of the other task, too."""
    step, projections = captured(("a", "b"), seed=0)
    sums = running(
        tmp_path, [step], projections, max_samples=100, tasks_that_fit=2, record_bytes=2 * 10 * 1000
    )
    for number in range(30):
        sums.add(number, [captured(("a", "b") if number % 5 == 0 else ("b", "b"), seed=number)[0]])
        sums.fit_records(lambda steps: 1000 * len(steps))
        assert len(sums.needed_steps) <= 10
    assert all(one.count for one in sums.current.values())
    window = Window(sums.generations, tmp_path, sums.in_memory)
    counts = [sum(one.count for one in sums.generations if one.task == task) for task in ("a", "b")]
    assert window.means("layer 0 Q", ["a", "b"], counts) is not None


def test_memory_is_given_back_between_trainings_and_nothing_is_lost(tmp_path: Path) -> None:
    step, projections = captured(("a",), seed=0)
    sums = running(tmp_path, [step], projections)
    sums.add(0, [step])
    sums.close(keep=True)
    assert sums.in_memory("a", "layer 0 Q") is None
    more = captured(("a",), seed=1)[0]
    sums.add(1, [more])
    means = Window(sums.generations, tmp_path, sums.in_memory).means("layer 0 Q", ["a"], [2])
    assert means is not None
    torch.testing.assert_close(
        means[:, 0].double(), expected_means([step, more], projections[0], "a"), rtol=1e-5, atol=1e-6
    )
    sums.close(keep=False)
    assert not any(one.members for one in sums.generations)


def test_a_directory_that_refuses_is_an_error_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, projections = captured(("a",), seed=0)
    sums = running(tmp_path, [step], projections)
    sums.add(0, [step])
    sums.snapshot(1, ())

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CacheError, match="cannot be tidied up: not allowed"):
        sums.snapshot(2, ())


def test_garbage_among_the_sums_is_left_alone(tmp_path: Path) -> None:
    step, projections = captured(("a",), seed=0)
    sums = running(tmp_path, [step], projections)
    sums.add(0, [step])
    for name in ("notes.json", "1-2.json", "0000000001-00000"):
        (tmp_path / name).write_text("{")
    (tmp_path / "folder").mkdir()
    sums.snapshot(1, ())
    assert {path.name for path in tmp_path.iterdir()} >= {
        "notes.json",
        "1-2.json",
        "0000000001-00000",
        "folder",
    }
    (tmp_path / "0000000009-00000.json").write_text("{")
    with pytest.raises(CacheError, match=r"0000000009-00000\.json cannot be read"):
        running(tmp_path, [step], projections).resume(9, tmp_path)
