"""Frozen cells are bit-identical after training, and everything else trained."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from models import CausalSelfAttention, Classifier, Conv1D, GroupedAttention
from modules import Module, loader, trainer
from torch import Tensor, nn
from versions import WHOLE_CHECKPOINT, needs_sharding_on_cpu

from qkov_lightning import (
    ArchitectureError,
    HeadFreezer,
    InterferenceHeatmap,
    InterferenceMonitor,
    find_projections,
)
from qkov_lightning.heads.weights import find_weight

pytestmark = pytest.mark.filterwarnings(
    # Advice of Lightning about the size of the test, not about the package.
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`.*",
)

CELLS = ["L0.H1.Q", "L0.H1.O", "L1.H0.K", "L1.H1.V", "L1.H3.O"]


class Optimised(Module):
    """Any optimiser."""

    def __init__(self, make: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.05, weight_decay=0.3)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True)


def cell_values(model: nn.Module) -> dict[str, Tensor]:
    """Everything that each cell owns, read by hand: slices of the weight, and of the bias for Q, K and V."""
    values = {}
    for projection in find_projections(model):
        module = model.get_submodule(projection.module_name)
        weight = module.weight.detach()
        weight = weight.T if isinstance(module, Conv1D) or type(module).__name__ == "Conv1D" else weight
        for head, features in enumerate(projection.head_features):
            own = weight[:, features] if projection.block == "O" else weight[features]
            if projection.block != "O" and module.bias is not None:
                own = torch.cat([own.flatten(), module.bias.detach()[features]])
            values[f"L{projection.layer}.H{head}.{projection.block}"] = own.flatten().clone()
    return values


def assert_only_frozen(before: dict[str, Tensor], after: dict[str, Tensor], cells: Any) -> None:
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == set(cells)


@pytest.mark.parametrize("make", [adamw, sgd, torch.optim.Adagrad], ids=["adamw", "sgd", "adagrad"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=["plain", "clipped", "accumulated", "bf16-mixed", "bf16-true"],
)
def test_frozen_cells_are_bit_identical_and_all_others_train(
    tmp_path: Path, make: Any, settings: dict[str, Any]
) -> None:
    module = Optimised(make)
    if settings.get("precision") == "bf16-true":
        module.to(torch.bfloat16)
    before = cell_values(module)
    trainer(tmp_path, HeadFreezer(CELLS), **settings).fit(module, loader(24))
    assert_only_frozen(before, cell_values(module), CELLS)


def test_everything_else_of_the_same_weight_trains_as_if_nothing_were_frozen(tmp_path: Path) -> None:
    """After one step, where the frozen values cannot yet act on other gradients."""
    free, held = Optimised(adamw), Optimised(adamw)
    before = cell_values(free)
    trainer(tmp_path, max_steps=1).fit(free, loader(4))
    trainer(tmp_path, HeadFreezer(CELLS), max_steps=1).fit(held, loader(4))
    for name, values in cell_values(held).items():
        assert torch.equal(values, before[name] if name in CELLS else cell_values(free)[name])
    for name, parameter in held.named_parameters():
        if "_proj" not in name or name.endswith("o_proj.bias"):
            assert torch.equal(parameter, free.get_parameter(name)), name


def test_clipping_does_not_feel_frozen_gradients(tmp_path: Path) -> None:
    """The norm that Lightning clips by is that of the weights that train."""
    norms: dict[bool, Tensor] = {}

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms[trainer.callbacks[0].__class__ is HeadFreezer] = torch.stack([
                parameter.grad.square().sum() for parameter in pl_module.parameters()
            ]).sum()

    for callbacks in ([HeadFreezer(CELLS), Norm()], [Norm()]):
        module = Module()
        trainer(tmp_path, *callbacks, max_steps=1, gradient_clip_val=1e9).fit(module, loader(4))
    frozen = torch.zeros(())
    for projection in find_projections(module):
        linear = module.get_submodule(projection.module_name)
        for head, features in enumerate(projection.head_features):
            if f"L{projection.layer}.H{head}.{projection.block}" in CELLS:
                own = (
                    linear.weight.grad[:, features]
                    if projection.block == "O"
                    else linear.weight.grad[features]
                )
                frozen += own.square().sum()
                frozen += 0 if projection.block == "O" else linear.bias.grad[features].square().sum()
    torch.testing.assert_close(norms[True], norms[False] - frozen, rtol=1e-5, atol=1e-8)
    assert frozen > 0.01 * norms[False]


@pytest.mark.parametrize("conv", [True, False], ids=["Conv1D", "Linear"])
def test_fused_projections_hold_still_head_by_head(tmp_path: Path, conv: bool) -> None:
    cells = ["L0.H0.Q", "L0.H2.K", "L1.H1.V", "L1.H2.O"]
    module = Optimised(
        adamw, network=Classifier([CausalSelfAttention(conv=conv) for _ in range(2)], width=12)
    )
    before = cell_values(module)
    trainer(tmp_path, HeadFreezer(cells)).fit(module, loader(12))
    assert_only_frozen(before, cell_values(module), cells)


class Transformer(Module):
    """A model of transformers in place of the classifier."""

    def __init__(self, family: str, **settings: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        config = AutoConfig.for_model(family, vocab_size=11, **settings)
        self.network = AutoModelForCausalLM.from_config(config)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return self.network(input_ids=batch["tokens"], labels=batch["tokens"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}),
        ("gpt_neox", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 8,
                      "bos_token_id": 0, "eos_token_id": 0}),
    ],
    ids=["gpt2", "gpt_neox"],
)  # fmt: skip
def test_layouts_of_gpt2_and_gpt_neox(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    cells = ["L0.H1.Q", "L0.H3.K", "L1.H0.V", "L1.H2.O"]
    module = Transformer(family, **settings)
    before = cell_values(module)
    trainer(tmp_path, HeadFreezer(cells)).fit(module, loader(12))
    assert_only_frozen(before, cell_values(module), cells)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_the_packed_weight_of_multihead_attention(tmp_path: Path) -> None:
    module = Optimised(adamw, network=Classifier([Packed()], width=8))
    attention = module.network.layers[0].attention
    before = attention.in_proj_weight.detach().clone(), attention.in_proj_bias.detach().clone()
    trainer(tmp_path, HeadFreezer(["L0.H1.K"])).fit(module, loader(12))
    own = torch.arange(24) // 4 == 3  # rows: Q of two heads, then K of head 0, then K of head 1
    for old, new in zip(before, (attention.in_proj_weight, attention.in_proj_bias), strict=True):
        assert torch.equal(old[own], new[own])
        assert (old[~own] != new[~own]).any(-1).all() if old.ndim > 1 else (old[~own] != new[~own])[8:].all()


def test_manual_optimisation_with_two_optimisers(tmp_path: Path) -> None:
    class Manual(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            layers = self.network.layers
            return [adamw(layers[0].parameters()), sgd(layers[1].parameters())]

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    module = Manual()
    before = cell_values(module)
    trainer(tmp_path, HeadFreezer(CELLS)).fit(module, loader(12))
    assert_only_frozen(before, cell_values(module), CELLS)


class Record(Callback):
    """Cell values at the start of every batch, and at the end."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.values.append(cell_values(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(cell_values(pl_module))

    def moved(self, name: str) -> list[bool]:
        return [not torch.equal(a[name], b[name]) for a, b in zip(self.values, self.values[1:], strict=False)]


@pytest.mark.parametrize(
    ("arguments", "moved"),
    [
        ({"start_step": 2, "stop_step": 5}, [True, True, False, False, False, True]),
        ({"start_epoch": 1}, [True, True, True, False, False, False]),
        ({"stop_epoch": 1, "start_step": 1}, [True, False, False, True, True, True]),
    ],
)
def test_a_range_of_steps_or_epochs(tmp_path: Path, arguments: dict[str, int], moved: list[bool]) -> None:
    record = Record()
    trainer(tmp_path, HeadFreezer(CELLS, **arguments), record, max_epochs=2).fit(Optimised(adamw), loader(12))
    assert all(record.moved(name) == moved for name in CELLS)
    assert all(record.moved("L0.H0.Q"))


def test_thaw_lets_everything_train_from_the_next_step_on(tmp_path: Path) -> None:
    freezer = HeadFreezer(CELLS)

    class Thaw(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                freezer.thaw()

    record = Record()
    trainer(tmp_path, freezer, Thaw(), record).fit(Optimised(adamw), loader(16))
    assert record.moved(CELLS[0]) == [False, False, True, True]


def sure(heatmap: InterferenceHeatmap, cells: dict[str, float]) -> InterferenceHeatmap:
    """The heatmap with a rise of math's loss in these cells when code trains, 20 errors from 0."""
    rise = {"loss_rise": torch.where(heatmap.scores["loss_rise"].isnan(), torch.nan, 0.0)}
    error = {"loss_rise": rise["loss_rise"] + 0.05}
    math, code = heatmap.tasks.index("math"), heatmap.tasks.index("code")
    for name, value in cells.items():
        layer, head, block = name[1:].replace(".H", ".").split(".")
        rise["loss_rise"][math, code, int(layer), int(head), "QKVO".index(block)] = value
    return replace(
        heatmap, scores={**heatmap.scores, **rise}, standard_errors={**heatmap.standard_errors, **error}
    )


HARM = {"L1.H1.V": 2.0, "L0.H1.Q": 1.5, "L1.H0.O": 1.0}


def test_the_cells_of_a_heatmap_that_surely_hurt_the_worst_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(Module(), loader(24))
    heatmap = monitor.heatmap
    assert heatmap is not None
    path = tmp_path / "sure.json"
    sure(heatmap, HARM).save(path)
    for arguments, expected in (
        ({}, list(HARM)),
        ({"top": 2}, list(HARM)[:2]),
        ({"pair": "math__code"}, list(HARM)),
    ):
        module, freezer = Module(), HeadFreezer(heatmap=path, **arguments)
        before = cell_values(module)
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            trainer(tmp_path, freezer).fit(module, loader(12))
        assert list(freezer.cells) == expected
        assert_only_frozen(before, cell_values(module), expected)
    assert (
        "training 'code' is predicted to raise the loss of 'math' by 4.5 in 3 of these cells "
        "(standard error at most 0.2), and by 4.5 in all 24." in caplog.text
    )
    by_exchange = sorted(HARM, key=lambda name: -float(heatmap_value(heatmap, "exchange", name)))
    freezer = HeadFreezer(heatmap=path, score="exchange")
    trainer(tmp_path, freezer).fit(Module(), loader(4))
    assert list(freezer.cells) == by_exchange

    other = Module(network=Classifier([GroupedAttention()], width=10))
    with pytest.raises(
        ValueError, match=r"The heatmap's L.\..* is in `network\.layers\..*Expected a heatmap of this"
    ):
        trainer(tmp_path, HeadFreezer(heatmap=path)).fit(other, loader(4))


def heatmap_value(heatmap: InterferenceHeatmap, score: str, name: str) -> Tensor:
    layer, head, block = name[1:].replace(".H", ".").split(".")
    return heatmap.values("math", "code", score)[int(layer), int(head), "QKVO".index(block)]


def test_a_heatmap_in_which_nothing_surely_hurts_freezes_nothing(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(Module(), loader(24))
    path = tmp_path / "open.json"
    sure(monitor.heatmap, {}).save(path)
    for pair in (None, "math__code"):
        with pytest.raises(
            ValueError,
            match=r"no cell of '.*open.json' surely hurts a task: in none of (48|24) .*Nothing is frozen",
        ):
            trainer(tmp_path, HeadFreezer(heatmap=path, pair=pair)).fit(Module(), loader(4))


class Sure(Callback):
    """Makes the monitor's heatmaps sure of some cells, from the second one on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        monitor = next(one for one in trainer.callbacks if isinstance(one, InterferenceMonitor))
        if monitor.heatmap is not None:
            monitor.heatmap = sure(monitor.heatmap, HARM if trainer.current_epoch > 1 else {})


def test_the_first_heatmap_of_the_monitor_in_the_same_trainer_that_is_sure_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    freezer, record = HeadFreezer(monitor="interference", top=2), Record()
    callbacks = [Sure(), freezer, InterferenceMonitor(every_n_steps=1), record]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, *callbacks, max_epochs=4).fit(Optimised(adamw), loader(8), loader(4))
    assert list(freezer.cells) == list(HARM)[:2]
    assert "HeadFreezer: no cell of 'interference' surely hurts a task" in caplog.text
    for name in freezer.cells:
        assert record.moved(name) == [True] * 4 + [False] * 4
    with pytest.raises(ValueError, match="the Trainer has no InterferenceMonitor named 'other'; it has none"):
        trainer(tmp_path, HeadFreezer(monitor="other", top=2)).fit(Module(), loader(8))


class Perturbed(Module):
    """Moves the weights outside of a step, as sharpness-aware minimisation does, by hand or in a closure."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.automatic_optimization = how == "lbfgs"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.how == "lbfgs":
            return loss
        self.manual_backward(loss)
        moves = [(p, 0.05 * p.grad.sign()) for p in self.parameters() if p.grad is not None]
        with torch.no_grad():
            for parameter, move in moves:
                parameter.add_(move)
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        with torch.no_grad():
            for parameter, move in moves:
                parameter.sub_(move)
        if self.how == "inner optimiser":  # whose step no hook of the outer one sees
            self.inner.step()
        else:
            self.optimizers().step()
        self.zero_grad()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.how == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)
        self.inner = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        return self.inner if self.how == "same optimiser" else torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.parametrize("how", ["same optimiser", "inner optimiser", "lbfgs"])
def test_what_moves_outside_of_a_step_is_put_back(tmp_path: Path, how: str) -> None:
    module, record = Perturbed(how), Record()
    before = cell_values(module)
    trainer(tmp_path, HeadFreezer(CELLS), record).fit(module, loader(12))
    assert_only_frozen(before, cell_values(module), CELLS)
    assert not any(record.moved(CELLS[0]))


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    def freezer() -> HeadFreezer:
        return HeadFreezer(monitor="interference", top=3, stop_step=8)

    def callbacks() -> list[Callback]:
        return [InterferenceMonitor(every_n_steps=1), freezer()]

    straight = Optimised(adamw)
    trainer(tmp_path / "a", *callbacks(), max_epochs=5).fit(straight, loader(8))
    first = trainer(
        tmp_path / "b", *callbacks(), ModelCheckpoint(tmp_path / "b"), max_epochs=3, enable_checkpointing=True
    )
    first.fit(Optimised(adamw), loader(8))
    resumed, again = Optimised(adamw), callbacks()
    trainer(tmp_path / "b", *again, max_epochs=5).fit(
        resumed, loader(8), ckpt_path=first.checkpoint_callback.best_model_path, **WHOLE_CHECKPOINT
    )
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_the_report_says_how_many_weights_and_who_else_is_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, freezer = Module(), HeadFreezer(["L0.H1.K", "L1.H2.O"])
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, freezer, max_steps=1).fit(module, loader(4))
    assert freezer.num_frozen == (10 * 3 + 3) + 5 * 10  # rows and bias of K, columns of O
    total = sum(parameter.numel() for parameter in module.parameters())
    assert (
        f"HeadFreezer: 83 of {total:,} weights do not train, in 2 cells: L0.H1.K, L1.H2.O. L0.H1.K serves the query "
        "heads 2, 3."
    ) in caplog.text


def test_a_weight_that_two_layers_share_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Module()
    first, second = (layer.q_proj for layer in module.network.layers)
    second.weight = first.weight
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, HeadFreezer(["L0.H1.Q"]), max_steps=1).fit(module, loader(4))
    assert (
        "`network.layers.0.q_proj.weight` is the same weight as `network.layers.1.q_proj.weight`"
        in caplog.text
    )


def test_optimisers_are_left_as_found_even_after_an_exception(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            if batch_idx:
                raise RuntimeError("crash")
            return self.loss(batch)

    fit = trainer(tmp_path, HeadFreezer(CELLS))
    with pytest.raises(RuntimeError, match="crash"):
        fit.fit(Fails(), loader(12))
    (optimizer,) = fit.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_is_refused_because_its_effective_weight_cannot_be_held_still(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    module = Module()
    module.network = get_peft_model(module.network, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer(tmp_path, HeadFreezer(["L0.H1.O"]), max_steps=1).fit(module, loader(4))  # no adapter there
    with pytest.raises(ArchitectureError, match=r"block Q: the weight of .*q_proj.* computed from .*lora_A"):
        trainer(tmp_path, HeadFreezer(["L0.H1.Q"])).fit(module, loader(4))


def test_a_weight_norm_and_a_flattened_weight_are_refused() -> None:
    model = Classifier([GroupedAttention()], width=10)
    (query, *_) = find_projections(model)
    nn.utils.parametrizations.weight_norm(model.layers[0].q_proj)
    with pytest.raises(ArchitectureError, match=r"computed from bias, parametrizations\.weight\.original0"):
        find_weight(model, query)
    model = Classifier([GroupedAttention()], width=10)
    model.layers[0].q_proj.weight = nn.Parameter(model.layers[0].q_proj.weight.flatten())
    with pytest.raises(
        ArchitectureError, match=r"has shape \(120,\), expected \(12, 10\). Quantised and flattened"
    ):
        find_weight(model, query)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of cells, heatmap and monitor"),
        ({"cells": ["L0.H0.Q"], "monitor": "interference"}, "exactly one of cells, heatmap and monitor"),
        ({"cells": ["L0.H0.X"]}, "'L0.H0.X' is no cell, expected a name such as 'L15.H8.O'"),
        ({"cells": ["L0.H0.Q"], "top": 3}, "top and pair choose from a heatmap"),
        ({"heatmap": "x", "top": 0}, "top is 0, expected at least 1"),
        ({"heatmap": "x", "top": 1, "score": "heat"}, "score is 'heat', expected one of loss_rise"),
        ({"cells": ["L0.H0.Q"], "start_step": 3, "stop_step": 3}, "start_step is 3 and stop_step 3"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadFreezer(**arguments)


def test_a_cell_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The model has no cell L0\.H2\.K; it has L0\.H0\.Q to L1\.H3\.O"):
        trainer(tmp_path, HeadFreezer(["L0.H2.K"])).fit(Module(), loader(4))


def on_two_processes(script: str, tmp_path: Path, mode: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a script beside this one leaves behind of the weights, before and after its training."""
    path = Path(__file__).with_name(script)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(path.parent), *sys.path]),
    }
    command = [sys.executable, str(path), str(tmp_path), mode]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(tmp_path / "before.pt"), torch.load(tmp_path / "after.pt")


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=needs_sharding_on_cpu)])
def test_on_two_processes(tmp_path: Path, mode: str) -> None:
    before, after = on_two_processes("run_freezer.py", tmp_path, mode)
    assert_only_frozen(before, after, CELLS)
