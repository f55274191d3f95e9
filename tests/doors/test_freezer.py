"""Frozen cells are bit-identical after training, and everything else trained."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
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

from qkov_lightning import ArchitectureError, HeadFreezer, InterferenceMonitor, find_projections
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


def test_the_worst_cells_of_a_heatmap_file_or_of_a_run(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(Module(), loader(24))
    heatmap = monitor.heatmap
    assert heatmap is not None
    module = Module()
    freezer = HeadFreezer(heatmap=tmp_path, score="conflict", pair="math__code", top=3)
    before = cell_values(module)
    trainer(tmp_path, freezer).fit(module, loader(12))
    assert list(freezer.cells) == [cell.name for cell in heatmap.cells("math", "code", "conflict")[::-1][:3]]
    assert_only_frozen(before, cell_values(module), freezer.cells)

    path = tmp_path / "interference" / "latest.json"
    freezer = HeadFreezer(heatmap=path, score="loss_rise", threshold=0.0)
    trainer(tmp_path, freezer).fit(Module(), loader(4))
    worst = heatmap.scores["loss_rise"][[0, 1], [1, 0]].amax(dim=0)
    expected = {f"L{i}.H{h}.{'QKVO'[b]}" for i, h, b in (worst > 0).nonzero().tolist()}
    assert set(freezer.cells) == expected
    assert 0 < len(expected) < 24

    other = Module(network=Classifier([GroupedAttention()], width=10))
    with pytest.raises(
        ValueError, match=r"The heatmap's L1\..* is in `network\.layers\.1\..*Expected a heatmap of this"
    ):
        trainer(tmp_path, HeadFreezer(heatmap=path, top=24)).fit(other, loader(4))


def test_the_first_heatmap_of_the_monitor_in_the_same_trainer_decides(tmp_path: Path) -> None:
    freezer, record = HeadFreezer(monitor="interference", top=2), Record()
    callbacks = [freezer, InterferenceMonitor(every_n_steps=1), record]
    trainer(tmp_path, *callbacks, max_epochs=3).fit(Optimised(adamw), loader(8), loader(4))
    assert len(freezer.cells) == 2
    for name in freezer.cells:
        assert record.moved(name) == [True, True, False, False, False, False]
    with pytest.raises(ValueError, match="the Trainer has no InterferenceMonitor named 'other'; it has none"):
        trainer(tmp_path, HeadFreezer(monitor="other", top=2)).fit(Module(), loader(8))


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
        ({"cells": ["L0.H0.Q"], "top": 3}, "top, threshold and pair choose from a heatmap"),
        ({"heatmap": "x"}, "expected one of top and threshold"),
        ({"heatmap": "x", "top": 1, "threshold": 0.5}, "expected one of top and threshold"),
        ({"heatmap": "x", "top": 0}, "top is 0, expected at least 1"),
        ({"heatmap": "x", "top": 1, "score": "heat"}, "score is 'heat', expected one of interference"),
        ({"cells": ["L0.H0.Q"], "start_step": 3, "stop_step": 3}, "start_step is 3 and stop_step 3"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadFreezer(**arguments)


def test_a_cell_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The model has no cell L0\.H2\.K; it has L0\.H0\.Q to L1\.H3\.O"):
        trainer(tmp_path, HeadFreezer(["L0.H2.K"])).fit(Module(), loader(4))


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=needs_sharding_on_cpu)])
def test_on_two_processes(tmp_path: Path, mode: str) -> None:
    script = Path(__file__).with_name("run_freezer.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
    }
    command = [sys.executable, str(script), str(tmp_path), mode]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = torch.load(tmp_path / "before.pt"), torch.load(tmp_path / "after.pt")
    assert_only_frozen(before, after, CELLS)
