"""The callback end to end: right numbers, training untouched, nothing lost over a restart."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from models import Classifier, GroupedAttention
from modules import ADVICE, Module, Samples, loader, trainer
from oracles import batch_of_one_gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from versions import WHOLE_CHECKPOINT

from qkov_lightning import (
    EmpiricalFisher,
    InterferenceHeatmap,
    InterferenceMonitor,
    find_projections,
    head_interference,
    task,
)
from qkov_lightning.scores.scores import SCORES

pytestmark = pytest.mark.filterwarnings(*ADVICE)


def expected_scores(
    module: Module, size: int, steps: list[list[int]], decay: float = 0.95
) -> dict[tuple, dict[str, Tensor]]:
    """The heatmap by batch-of-one autograd in float64, for weights that never changed."""
    samples = Samples(size)
    network = module.network.double()
    scores: dict[tuple, dict[str, Tensor]] = {}
    for projection in find_projections(network):
        weight = network.get_submodule(projection.module_name).weight
        used = [index for step in steps for index in step]

        def loss(n: int, used: list[int] = used) -> Tensor:
            index = used[n]
            return functional.cross_entropy(
                network(samples.tokens[index][None]), samples.targets[index][None]
            )

        gradients = batch_of_one_gradients(network, {"w": weight}, loss, len(used))["w"]
        if projection.block == "O":
            gradients = gradients.transpose(1, 2)
        heads = gradients.unflatten(1, (projection.num_heads, -1)).flatten(2)
        names = [samples[index]["task"] for index in used]
        fisher, start = EmpiricalFisher(decay), 0
        for step in steps:
            fisher.update(heads[start : start + len(step)], names[start : start + len(step)])
            start += len(step)
        shares = fisher.shares(names, [place for place, step in enumerate(steps) for _ in step])
        result = head_interference(heads, names, fisher.pooled(), update="sgd", fisher_shares=shares)
        for pair, values in result.items():
            scores[(projection.layer, projection.block, *pair)] = values
    return scores


def assert_heatmap_is(heatmap: InterferenceHeatmap, expected: dict[tuple, dict[str, Tensor]]) -> None:
    # Float32 gradients, squared and summed: relative errors of about 1e-6 each, more after cancellation.
    for (layer, block, a, b), values in expected.items():
        heads = len(values["interference"])
        for score in SCORES:
            found = heatmap.values(a, b, score)[layer, :heads, "QKVO".index(block)]
            torch.testing.assert_close(found, values[score], rtol=1e-3, atol=2e-5)
            error = heatmap.errors(a, b, score)[layer, :heads, "QKVO".index(block)]
            torch.testing.assert_close(error, values[f"{score}_standard_error"], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_heatmap_equals_batch_of_one_autograd(tmp_path: Path, accumulate: int) -> None:
    """Six batches of four: with accumulate_grad_batches=4 the last window is a partial one."""
    module, monitor = Module(learning_rate=0.0), InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, accumulate_grad_batches=accumulate).fit(module, loader(24))
    assert monitor.heatmap is not None
    assert monitor.heatmap.samples_per_task == {"code": 12, "math": 12}
    assert_heatmap_is(
        monitor.heatmap, expected_scores(module, 24, [list(range(i, i + 4)) for i in range(0, 24, 4)])
    )


def test_only_every_nth_batch_is_captured(tmp_path: Path) -> None:
    module, monitor = Module(learning_rate=0.0), InterferenceMonitor(every_n_steps=2)
    trainer(tmp_path, monitor).fit(module, loader(24))
    assert_heatmap_is(
        monitor.heatmap, expected_scores(module, 24, [list(range(i, i + 4)) for i in (0, 8, 16)])
    )


class RandomStreams(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        self.state = torch.get_rng_state()


def test_training_is_bit_identical_with_and_without_the_monitor(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [InterferenceMonitor(every_n_steps=1)], [InterferenceMonitor(every_n_steps=2)]):
        module, streams = Module(dropout=0.3), RandomStreams()
        torch.manual_seed(11)
        shuffled = DataLoader(Samples(24), batch_size=4, shuffle=True)
        trainer(tmp_path, *callbacks, streams, max_epochs=2).fit(module, shuffled, loader(8))
        results.append([*module.parameters(), streams.state])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_validation_epochs_measure_and_the_sanity_check_does_not(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    module = Module()

    class Watch(Callback):
        def on_sanity_check_end(self, *_: Any) -> None:
            assert monitor.heatmap is None

    trainer(tmp_path, monitor, Watch(), max_epochs=2, num_sanity_val_steps=1).fit(
        module, loader(24), loader(8)
    )
    assert [path.name for path in sorted((tmp_path / "interference" / "snapshots").iterdir())] == [
        "step_00000006.json",
        "step_00000012.json",
    ]
    latest = InterferenceHeatmap.load(tmp_path / "interference" / "latest.json")
    assert latest.to_json() == monitor.heatmap.to_json()
    assert (latest.step, latest.epoch) == (12, 1)


def test_without_validation_the_training_epoch_measures(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, max_epochs=2).fit(Module(), loader(24))
    assert len(list((tmp_path / "interference" / "snapshots").iterdir())) == 2


def test_standalone_validation_measures_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    monitor = InterferenceMonitor()
    trainer(tmp_path, monitor).validate(Module(), loader(8), verbose=False)
    assert monitor.heatmap is None


def test_scalars_can_stop_training_and_choose_checkpoints(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="interference/max", mode="min")
    stopping = EarlyStopping("interference/math__code/relative_max", patience=0, mode="max", min_delta=1e9)
    fit = trainer(
        tmp_path,
        InterferenceMonitor(every_n_steps=1),
        stopping,
        checkpoint,
        max_epochs=5,
        enable_checkpointing=True,
    )
    fit.fit(Module(), loader(24), loader(8))
    assert fit.current_epoch < 5
    assert checkpoint.best_model_score is not None
    names = {name for name in fit.callback_metrics if name.startswith("interference/math__code/")}
    assert names == {
        f"interference/math__code/{name}"
        for name in (
            "rise",
            "max",
            "mean",
            "relative_max",
            "cosine_min",
            "conflict_min",
            "forgetting_max",
            "loss_rise_max",
            "exchange_max",
        )
    }


def test_the_csv_logger_gets_the_scalars(tmp_path: Path) -> None:
    fit = trainer(tmp_path, InterferenceMonitor(every_n_steps=1), logger=CSVLogger(tmp_path, name="run"))
    fit.fit(Module(), loader(24), loader(8))
    text = (Path(fit.logger.log_dir) / "metrics.csv").read_text()
    assert "interference/code__math/rise" in text
    assert "nan" not in text.lower()
    assert (Path(fit.logger.log_dir) / "interference" / "latest.json").exists()


@pytest.mark.parametrize("scores", [("relative", "cosine"), ()])
def test_the_answer_and_the_chosen_scores_are_drawn_and_all_are_kept(
    tmp_path: Path, scores: tuple[str, ...]
) -> None:
    monitor = InterferenceMonitor(every_n_steps=1, figures=scores)
    fit = trainer(tmp_path, monitor)
    fit.fit(Module(), loader(24), loader(8))
    drawn = {path.name.split("_math")[0].split("_code")[0] for path in monitor.results.glob("figures/*.png")}
    assert drawn == {"overview.png", "loss_rise", *scores}
    saved = InterferenceHeatmap.load(monitor.results / "latest.json")
    assert set(saved.scores) == set(SCORES)


def test_tensorboard_gets_figures_a_table_and_scalars(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = InterferenceMonitor(every_n_steps=1)
    fit = trainer(tmp_path, monitor, logger=TensorBoardLogger(tmp_path, name="run"), max_epochs=2)
    fit.fit(Module(), loader(24), loader(8))
    events = event_accumulator.EventAccumulator(fit.logger.log_dir, size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    pairs = [f"{a}__{b}" for a, b in monitor.heatmap.task_pairs]
    own = ["_overview", *(f"pair/loss_rise_{pair}" for pair in pairs)]
    assert set(tags["images"]) == {f"interference/{tag}" for tag in own}
    images = events.Images("interference/pair/loss_rise_math__code")
    assert [image.width > 300 and image.height > 150 for image in images] == [True, True]
    assert [image.step for image in images] == [
        e.step for e in events.Scalars("interference/math__code/rise")
    ]
    table = events.Tensors("interference/verdict/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| cell |" in table
    assert monitor.heatmap.verdict.pairs[0].cells[0].name in table


def test_sample_pairs_can_be_found_again(tmp_path: Path) -> None:
    module, monitor = Module(learning_rate=0.0), InterferenceMonitor(every_n_steps=1, num_hot_cells=2)
    trainer(tmp_path, monitor).fit(module, loader(24))
    pair = next(p for p in monitor.heatmap.pairs if (p.task_a, p.task_b) == ("math", "code"))
    worst = monitor.heatmap.verdict.pair("math", "code").cells[0]
    samples = Samples(24)
    for name, task_name in ((pair.sample_a, "math"), (pair.sample_b, "code")):
        assert samples[int(name.removeprefix("sample-"))]["task"] == task_name
    harm = [p.harm for p in monitor.heatmap.pairs if (p.task_a, p.name) == ("math", worst.name)]
    assert len(harm) == 3
    assert max(harm) > 0


def resumable(root: Path, monitor: InterferenceMonitor, epochs: int) -> Any:
    keep = ModelCheckpoint(root / "checkpoints", filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    return trainer(root, monitor, keep, max_epochs=epochs, enable_checkpointing=True)


@pytest.mark.parametrize("where", ["another folder", "the same cache folder"])
def test_a_resumed_run_gives_the_heatmap_of_one_that_never_stopped(tmp_path: Path, where: str) -> None:
    def monitor() -> InterferenceMonitor:
        cache = tmp_path / "cache" if where == "the same cache folder" else None
        return InterferenceMonitor(every_n_steps=2, max_samples_per_task=6, cache_dir=cache)

    def data() -> tuple[DataLoader, DataLoader]:
        return loader(24, ids=False), loader(8)

    straight = monitor()
    resumable(tmp_path / "straight", straight, 4).fit(Module(), *data())
    # It goes on for another epoch after the checkpoint before it stops: that part must not count twice.
    resumable(tmp_path / "stopped", monitor(), 3).fit(Module(), *data())
    last = tmp_path / "stopped" / "checkpoints" / "epoch=1.ckpt"
    second = tmp_path / ("stopped" if where == "the same cache folder" else "resumed")
    resumed = monitor()
    resumable(second, resumed, 4).fit(Module(), *data(), ckpt_path=last, **WHOLE_CHECKPOINT)
    assert resumed.heatmap.to_json() == straight.heatmap.to_json()


@pytest.mark.parametrize("how", ["deleted", "never named"])
def test_a_checkpoint_whose_cache_is_gone_starts_a_new_one_and_says_so(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a name, as after the monitor switched itself off, it is no folder that exists."""
    first = InterferenceMonitor(every_n_steps=1, cache_dir=tmp_path / "cache")
    resumable(tmp_path / "first", first, 1).fit(Module(), loader(24, ids=False), loader(8))
    state = first.state_dict()
    monkeypatch.chdir(state["cache"])
    if how == "deleted":
        shutil.move(state["cache"], tmp_path / "elsewhere")
    else:
        state["cache"] = ""
    second = InterferenceMonitor(every_n_steps=1, cache_dir=tmp_path / "cache")
    second.load_state_dict(state)
    with pytest.warns(
        UserWarning, match="cache of the checkpoint.* is gone: the next heatmap rests on new samples"
    ):
        trainer(tmp_path / "second", second).fit(Module(), loader(8, ids=False), loader(8))
    assert second.heatmap.samples_per_task == {"code": 4, "math": 4}


def test_no_hook_survives_a_fit_an_exception_or_ctrl_c(tmp_path: Path) -> None:
    class Interrupt(Callback):
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def on_before_zero_grad(self, *_: Any) -> None:
            raise self.error

    module = Module()
    trainer(tmp_path / "a", InterferenceMonitor(every_n_steps=1)).fit(module, loader(8))
    assert not any(part._forward_hooks for part in module.modules())
    with pytest.raises(RuntimeError):
        trainer(tmp_path / "b", InterferenceMonitor(every_n_steps=1), Interrupt(RuntimeError)).fit(
            module, loader(8)
        )
    assert not any(part._forward_hooks for part in module.modules())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path / "c", InterferenceMonitor(every_n_steps=1), Interrupt(KeyboardInterrupt)).fit(
            module, loader(8)
        )
    assert not any(part._forward_hooks for part in module.modules())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_batch_without_a_task_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class Nameless(Samples):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            del item["task"]
            return item

    with pytest.raises(
        ValueError, match=r"expected `batch\['task'\]`, found \['sample_id', 'target', 'tokens'\]"
    ):
        trainer(tmp_path, InterferenceMonitor()).fit(Module(), DataLoader(Nameless(8), batch_size=4))


def test_the_task_can_come_from_a_function_or_a_context(tmp_path: Path) -> None:
    by_key = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path / "key", by_key).fit(Module(), loader(24))
    by_function = InterferenceMonitor(
        every_n_steps=1, task_of=lambda batch: [name.upper() for name in batch["task"]]
    )
    trainer(tmp_path / "function", by_function).fit(Module(), loader(24))
    assert by_function.heatmap.tasks == ("CODE", "MATH")

    class InContext(Module):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            with task(batch.pop("task"), sample_ids=batch["sample_id"]):
                return self.loss(batch)

    by_context = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path / "context", by_context).fit(InContext(), loader(24))
    assert by_context.heatmap.to_json() == by_key.heatmap.to_json()


def test_a_task_with_one_sample_has_no_data_and_says_how_many(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    data = DataLoader(Samples(8, tasks=("math",) * 7 + ("code",)), batch_size=4)
    fit = trainer(tmp_path, monitor)
    fit.fit(Module(), data)
    assert monitor.heatmap.samples_per_task == {"code": 1, "math": 7}
    assert monitor.heatmap.values("math", "code").isnan().all()
    assert not monitor.heatmap.values("math", "math")[:, :4, 0].isnan().any()
    assert not any(math.isnan(value) for value in fit.callback_metrics.values())
    assert {info.status for layer in monitor.heatmap.layers for info in layer.blocks.values()} == {"measured"}


def test_a_frozen_block_is_shown_as_frozen(tmp_path: Path) -> None:
    module, monitor = Module(), InterferenceMonitor(every_n_steps=1)
    module.network.layers[0].k_proj.requires_grad_(False)
    trainer(tmp_path, monitor).fit(module, loader(24))
    assert monitor.heatmap.layers[0].blocks["K"].status == "frozen"
    assert monitor.heatmap.layers[1].blocks["K"].status == "measured"
    assert monitor.heatmap.values("math", "code")[0, :, 1].isnan().all()


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(20, 5))
    with pytest.raises(ValueError, match="No attention layer was found in Module"):
        trainer(tmp_path, InterferenceMonitor()).fit(Module(network=network), loader(8))


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    attention = GroupedAttention()
    attention.num_heads = 5
    with pytest.raises(ValueError, match="the 12 features of `q_proj` do not divide into 5 equal parts"):
        trainer(tmp_path, InterferenceMonitor()).fit(Module(network=Classifier([attention], 10)), loader(8))


def test_a_cache_directory_that_cannot_be_written_switches_only_the_monitor_off(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module, monitor = Module(), InterferenceMonitor(every_n_steps=1, cache_dir=tmp_path / "file" / "cache")
    with pytest.warns(
        UserWarning, match=r"switched itself off; training goes on.*cannot be written"
    ) as caught:
        trainer(tmp_path, monitor, max_epochs=2).fit(module, loader(24), loader(8))
    assert sum("switched itself off" in str(warning.message) for warning in caught) == 1
    plain = Module()
    trainer(tmp_path, max_epochs=2).fit(plain, loader(24), loader(8))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert monitor.heatmap is None


def test_a_full_cache_switches_only_the_monitor_off(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1, max_cache_gb=1e-6)
    with pytest.warns(UserWarning, match=r"switched itself off.*Raise max_cache_gb"):
        trainer(tmp_path, monitor).fit(Module(), loader(24))


def test_a_step_with_a_gradient_that_is_not_finite_is_dropped_and_counted(tmp_path: Path) -> None:
    class Overflow(Module):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return self.loss(batch) * (torch.inf if batch_idx == 2 else 1.0)

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(Overflow(), loader(24))
    assert monitor.heatmap.notes["non_finite_steps"] == 1
    assert monitor.heatmap.notes["captured_steps"] == 5
    assert sum(monitor.heatmap.samples_per_task.values()) == 20


def test_a_fast_dev_run_leaves_nothing_behind(tmp_path: Path) -> None:
    monitor = InterferenceMonitor()
    trainer(tmp_path, monitor, fast_dev_run=True).fit(Module(), loader(24), loader(8))
    assert not list(tmp_path.iterdir())


def test_two_monitors_work_side_by_side(tmp_path: Path) -> None:
    parity = InterferenceMonitor(
        every_n_steps=1, task_of=lambda batch: [int(t) % 2 for t in batch["target"]], name="parity"
    )
    topics = InterferenceMonitor(every_n_steps=1)
    alone = InterferenceMonitor(every_n_steps=1)
    fit = trainer(tmp_path / "both", topics, parity)
    fit.fit(Module(), loader(24))
    trainer(tmp_path / "alone", alone).fit(Module(), loader(24))
    assert topics.heatmap.to_json() == alone.heatmap.to_json()
    assert parity.heatmap.tasks == ("0", "1")
    assert {"interference/max", "parity/max"} <= set(fit.callback_metrics)


def test_fitting_again_goes_on_with_a_cache_that_is_kept(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1, keep_cache=True)
    fit = trainer(tmp_path, monitor)
    module = Module(learning_rate=0.0)
    fit.fit(module, loader(24, ids=False))
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader(24, ids=False))
    assert monitor.heatmap.notes["captured_steps"] == 12
    assert monitor.heatmap.samples_per_task == {"code": 12, "math": 12}  # the same samples as before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0, expected at least 1"),
        ({"max_samples_per_task": 1}, "max_samples_per_task is 1, expected at least 2"),
        ({"max_cache_gb": 0.0}, "max_cache_gb is 0.0, expected a positive number"),
        ({"fisher_decay": 1.0}, "fisher_decay is 1.0, expected at least 0 and less than 1"),
        ({"damping": 0.0}, "damping is 0.0, expected a positive number"),
        ({"num_hot_cells": -1}, "num_hot_cells is -1, expected at least 0"),
        (
            {"figures": ["relativ"]},
            r"figures is \['relativ'\], expected a list of some of loss_rise, relative, cosine",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterferenceMonitor(**setting)


def test_the_state_in_a_checkpoint_is_plain(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(Module(), loader(8))
    assert json.loads(json.dumps(monitor.state_dict())) == monitor.state_dict()
