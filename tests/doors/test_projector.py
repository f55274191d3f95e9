"""Steps lose their part in what a task uses; nothing else of them changes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from models import CausalSelfAttention, Classifier, GroupedAttention
from modules import Module, loader, trainer
from synthetic import TinyAttention
from test_freezer import HARM, Optimised, Packed, Perturbed, Transformer, adamw, on_two_processes, sure
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from versions import WHOLE_CHECKPOINT, needs_sharding_on_cpu

from qkov_lightning import (
    ArchitectureError,
    HeadProjector,
    InterferenceMonitor,
    ProtectedSubspace,
    SubspaceError,
    cli,
    find_projections,
    measure_subspace,
)
from qkov_lightning.views import loggers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*"),
]

ROUNDING = 1e-6
"""Of float32 weights of size 1, that are written back after every step."""


def probe(size: int = 8) -> list[dict[str, Any]]:
    return list(loader(size))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def steps_of(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def inside(subspace: ProtectedSubspace, projection: Any, step: Tensor) -> Tensor:
    """What is left of a step along the protected directions, head by head, by hand."""
    basis = subspace.bases[projection.module_name].double()
    parts = []
    for head, features in enumerate(projection.head_features):
        if projection.block == "O":
            parts.append((step.double()[:, features] @ basis[head]).abs().max())
        else:
            parts.append((step.double()[features] @ basis[0]).abs().max())
    return torch.stack(parts)


@pytest.mark.parametrize("make", [adamw, torch.optim.Adagrad], ids=["adamw", "adagrad"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}],
    ids=["plain", "clipped", "accumulated", "bf16-mixed"],
)
def test_steps_have_no_part_in_the_subspace_and_a_part_outside(
    tmp_path: Path, make: Any, settings: dict[str, Any]
) -> None:
    module, projector = Optimised(make), HeadProjector(probe(), rank=3)
    before = weights_of(module)
    trainer(tmp_path, projector, **settings).fit(module, loader(24))
    steps = steps_of(module, before)
    for projection in find_projections(module):
        step = steps[f"{projection.module_name}.weight"]
        assert (inside(projector.subspace, projection, step) < 10 * ROUNDING).all()
        assert step.abs().max() > 1e-3
        if projection.block != "O":
            assert not steps[f"{projection.module_name}.bias"].any()


def test_the_outputs_for_protected_inputs_stay(tmp_path: Path) -> None:
    """With as many directions as the inputs span, whatever the optimiser does."""
    module = Optimised(adamw, network=Classifier([GroupedAttention()], width=10))
    seen: list[Tensor] = []
    batches = probe(4)[:1]
    handle = module.network.layers[0].q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    module.network(batches[0]["tokens"])
    handle.remove()
    before = module.network.layers[0].q_proj(seen[0]).detach()
    projector = HeadProjector(batches, rank=1.0)
    trainer(tmp_path, projector).fit(module, loader(24))
    after = module.network.layers[0].q_proj(seen[0]).detach()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_what_is_not_protected_trains_as_if_nothing_were(tmp_path: Path) -> None:
    """After one step, where what is protected cannot yet act on other gradients: bit by bit."""
    free, held = Optimised(adamw), Optimised(adamw)
    trainer(tmp_path, max_steps=1).fit(free, loader(4))
    cells = ["L0.H1.Q", "L1.H2.O"]
    projector = HeadProjector(probe(), rank=2, cells=cells)
    trainer(tmp_path, projector, max_steps=1).fit(held, loader(4))
    for projection in find_projections(held):
        own, other = (one.get_submodule(projection.module_name).weight for one in (held, free))
        for head, features in enumerate(projection.head_features):
            at = (slice(None), features) if projection.block == "O" else features
            named = f"L{projection.layer}.H{head}.{projection.block}" in cells
            assert torch.equal(own[at], other[at]) != named
    for name, parameter in held.named_parameters():
        if "_proj" not in name:
            assert torch.equal(parameter, free.get_parameter(name)), name


def test_a_bias_is_held_where_protected_heads_own_it(tmp_path: Path) -> None:
    module = Optimised(adamw)
    before = weights_of(module)
    trainer(tmp_path, HeadProjector(probe(), rank=2, cells=["L0.H1.Q", "L0.H0.O"])).fit(module, loader(8))
    query = next(p for p in find_projections(module) if p.block == "Q" and p.layer == 0)
    steps = steps_of(module, before)
    own = torch.zeros(len(steps[f"{query.module_name}.bias"]), dtype=torch.bool)
    own[query.head_features[1]] = True
    assert torch.equal(steps[f"{query.module_name}.bias"] == 0, own)
    output = next(p for p in find_projections(module) if p.block == "O" and p.layer == 0)
    assert steps[f"{output.module_name}.bias"].any()  # of all heads together


def test_the_rest_of_the_model(tmp_path: Path) -> None:
    """Linear modules by their inputs, embeddings by their rows, everything else as a whole."""
    module = Optimised(adamw)
    batches = probe(4)
    for batch in batches:
        batch["tokens"] = batch["tokens"] % 4  # four words of the vocabulary
    projector = HeadProjector(batches, rank=0.5, rest="tensors")
    before = weights_of(module)
    trainer(tmp_path, projector).fit(module, loader(24))
    steps = steps_of(module, before)
    linear = {name for name, one in module.named_modules() if isinstance(one, nn.Linear)}
    embeddings = {name for name, one in module.named_modules() if isinstance(one, nn.Embedding)}
    heads = {projection.module_name for projection in find_projections(module)}
    assert linear - heads
    assert embeddings
    for name, step in steps.items():
        owner, _, kind = name.rpartition(".")
        if owner in embeddings:
            moved = step.abs().sum(dim=1) > 0
            assert not moved[:4].any()
            assert moved[4:].any()
        elif owner in linear - heads and kind == "weight":
            basis = projector.subspace.bases[owner][0].double()
            assert (step.double() @ basis).abs().max() < 10 * ROUNDING
            assert step.abs().max() > 1e-3
        elif owner not in heads:
            assert not step.any(), name


def fused(conv: bool) -> Module:
    return Optimised(adamw, network=Classifier([CausalSelfAttention(conv=conv)], width=12))


LAYOUTS = {
    "fused": lambda: fused(False),
    "fused Conv1D": lambda: fused(True),
    "packed": lambda: Optimised(adamw, network=Classifier([Packed()], width=8)),
    "gpt_neox": lambda: Transformer(
        "gpt_neox", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8,
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_and_packed_projections(tmp_path: Path, layout: str) -> None:
    module = LAYOUTS[layout]()
    projector = HeadProjector(probe(), rank=3)
    before = weights_of(module)
    trainer(tmp_path, projector).fit(module, loader(24))
    steps = steps_of(module, before)
    for projection in find_projections(module):
        owner = module.get_submodule(projection.module_name)
        name = "in_proj_weight" if isinstance(owner, nn.MultiheadAttention) else "weight"
        step = steps[f"{projection.module_name}.{name}"]
        step = step if hasattr(owner, "in_features") or name == "in_proj_weight" else step.T
        assert (inside(projector.subspace, projection, step) < 10 * ROUNDING).all()
        assert step.abs().max() > 1e-3


@pytest.mark.parametrize("how", ["same optimiser", "inner optimiser", "lbfgs"])
def test_what_moves_outside_of_a_step_is_projected(tmp_path: Path, how: str) -> None:
    path = tmp_path / "math.safetensors"
    measure_subspace(Module(), probe(), rank=3).save(path)
    module, projector = Perturbed(how), HeadProjector(path)
    before = weights_of(module)
    trainer(tmp_path, projector).fit(module, loader(12))
    steps = steps_of(module, before)
    for projection in find_projections(module):
        step = steps[f"{projection.module_name}.weight"]
        assert (inside(projector.subspace, projection, step) < 10 * ROUNDING).all()
        assert step.abs().max() > 1e-3


def test_a_file_protects_as_the_batches_do(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "math.safetensors"
    measure_subspace(Module(), probe(), rank=3).save(path)
    ends = []
    for protect in (probe(), path, str(path)):
        module = Optimised(adamw)
        trainer(tmp_path, HeadProjector(protect, rank=3)).fit(module, loader(12))
        ends.append(weights_of(module))
    for other in ends[1:]:
        assert all(torch.equal(ends[0][name], value) for name, value in other.items())


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(8)

    def probe_dataloader(self) -> Any:
        return loader(8)


@pytest.mark.parametrize("rank", ["3", "0.25"])
def test_the_command_writes_the_file_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    run = trainer(tmp_path)
    run.fit(Module(), loader(8))
    checkpoint, output = tmp_path / "math.ckpt", tmp_path / "math.safetensors"
    run.save_checkpoint(checkpoint)
    arguments = [
        "--model",
        "modules.Module",
        "--data",
        f"{__name__}.Data",
        "--rank",
        rank,
        "--output",
        str(output),
    ]
    monkeypatch.setattr("sys.argv", ["qkov", "protect", str(checkpoint), *arguments])
    cli.main()
    assert "8 modules, 8 samples" in capsys.readouterr().out
    found = ProtectedSubspace.load(output)
    expected = measure_subspace(run.lightning_module, probe(), rank=int(rank) if rank == "3" else float(rank))
    assert all(torch.equal(found.bases[name], basis) for name, basis in expected.bases.items())
    monkeypatch.setattr("sys.argv", ["qkov", "protect", str(checkpoint)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "Say what to load" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_it_can_be_named_in_yaml(tmp_path: Path) -> None:
    measure_subspace(Module(), probe(), rank=3).save(tmp_path / "math.safetensors")
    config = tmp_path / "config.yaml"
    config.write_text(f"""
        trainer:
          max_steps: 2
          default_root_dir: {tmp_path}
          accelerator: cpu
          logger: false
          enable_checkpointing: false
          callbacks:
            - class_path: qkov_lightning.HeadProjector
              init_args:
                protect: {tmp_path / "math.safetensors"}
                cells: [L0.H1.Q]
    """)
    command = LightningCLI(Module, Data, args=["fit", "--config", str(config)], save_config_callback=None)
    (projector,) = [one for one in command.trainer.callbacks if isinstance(one, HeadProjector)]
    assert projector.taken[0, 1, 0] > 0
    assert projector.taken.isnan().sum() == projector.taken.numel() - 1


def test_a_number_of_cells_is_the_worst_that_surely_hurt_in_a_heatmap(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path / "measured", monitor).fit(Module(), loader(12))
    path, unsure = tmp_path / "heatmap.json", tmp_path / "unsure.json"
    sure(monitor.heatmap, HARM).save(path)
    sure(monitor.heatmap, {}).save(unsure)
    worst = sorted(HARM, key=lambda name: -HARM[name])
    for count in (1, 2):
        projector = HeadProjector(probe(), rank=3, cells=count, heatmap=path, pair="math__code")
        trainer(tmp_path, projector, max_steps=1).fit(Optimised(adamw), loader(4))
        expected = {
            name: tuple(map(int, name.replace("L", "").replace("H", "").split(".")[:2])) for name in worst
        }
        protected = projector.taken.isfinite().nonzero().tolist()
        assert protected == sorted([*expected[name], "QKVO".index(name[-1])] for name in worst[:count])
    with pytest.raises(
        ValueError, match=r"no cell of '.*unsure.json' surely hurts a task.*protect all of them"
    ):
        trainer(tmp_path, HeadProjector(probe(), cells=1, heatmap=unsure)).fit(Module(), loader(4))


def test_the_subspace_can_be_measured_again_at_the_weights_of_every_nth_epoch(tmp_path: Path) -> None:
    class Bases(Callback):
        def __init__(self) -> None:
            self.seen: list[ProtectedSubspace] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.seen.append(projector.subspace)
            self.fresh = measure_subspace(trainer.lightning_module, probe(), rank=3)

    projector, bases = HeadProjector(probe(), rank=3, every_n_epochs=2), Bases()
    trainer(tmp_path, projector, bases, max_epochs=4).fit(Optimised(adamw), loader(4))
    assert [a is b for a, b in pairwise(bases.seen)] == [True, False, True]
    deep = max(projector.subspace.bases)  # the inputs of the first layer do not depend on the weights
    first, third = (one.bases[deep] for one in (bases.seen[0], bases.seen[2]))
    assert not torch.equal(first, third)


class Shared(LightningModule):
    """Attention that learns to halve inputs which share a direction with those of the protected task."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = TinyAttention(width=16)

    def training_step(self, inputs: Tensor, batch_idx: int) -> Tensor:
        return (self.self_attn(inputs) - inputs / 2).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def test_a_planted_shared_direction_is_found_and_protected_in_all_of_100_seeds(tmp_path: Path) -> None:
    """B's steps in Q, K and V lose what they have along it; without protection they have a lot."""
    for seed in range(100):
        torch.manual_seed(seed)
        direction = functional.normalize(torch.randn(16), dim=0)
        of_a, of_b = (
            (1 + torch.rand(32, 3, 1)) * direction + noise * torch.randn(32, 3, 16) for noise in (0.05, 0.5)
        )
        free, held = Shared(), Shared()
        held.load_state_dict(free.state_dict())
        before = weights_of(free)
        projector = HeadProjector([of_a], rank=1)
        trainer(tmp_path, max_steps=3).fit(free, DataLoader(of_b, 8))
        trainer(tmp_path, projector, max_steps=3).fit(held, DataLoader(of_b, 8))
        moved, kept = steps_of(free, before), steps_of(held, before)
        for name in ("q_proj", "k_proj", "v_proj"):
            ((found,),) = projector.subspace.bases[f"self_attn.{name}"].mT
            assert abs(float(found @ direction)) > 0.999, f"seed {seed}, {name}"
            weight = f"self_attn.{name}.weight"
            assert (kept[weight] @ direction).norm() < 0.05 * (moved[weight] @ direction).norm(), (
                f"seed {seed}, {name}"
            )


def test_it_says_how_much_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One step by hand, against what the projector says of each cell."""
    free, held = Optimised(adamw), Optimised(adamw)
    before = weights_of(free)
    trainer(tmp_path, max_steps=1).fit(free, loader(4))
    projector = HeadProjector(probe(), rank=3)
    fit = trainer(tmp_path, projector, max_steps=1)
    fit.fit(held, loader(4))
    steps = steps_of(free, before)
    for projection in find_projections(free):
        step = steps[f"{projection.module_name}.weight"].double()
        basis = projector.subspace.bases[projection.module_name].double()
        for head, features in enumerate(projection.head_features):
            own = step[:, features] if projection.block == "O" else step[features]
            directions = basis[head if projection.block == "O" else 0]
            share = (own @ directions).square().sum() / own.square().sum()
            found = projector.taken[projection.layer, head, "QKVO".index(projection.block)]
            assert float(found) == pytest.approx(float(share), rel=1e-4)
    assert fit.callback_metrics["projector/taken"] == pytest.approx(float(projector.taken.nanmean()))


def test_loggers_get_a_heatmap_of_what_was_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, tuple[int, ...]]] = []

    class Wiki(CSVLogger):
        pass

    def send(logger: Any, publication: Any) -> None:
        assert publication.heatmap is None
        sent.extend((f"{tag}, {publication.caption}", image.shape) for tag, image in publication.tagged())

    monkeypatch.setattr(loggers, "_SENDERS", {"Wiki": send})
    fit = trainer(tmp_path, HeadProjector(probe(), rank=3), max_epochs=2, logger=Wiki(tmp_path))
    fit.fit(Optimised(adamw), loader(4))
    assert [name for name, _ in sent] == [
        f"projector/taken, epoch {epoch}, step {epoch + 1}" for epoch in (0, 1)
    ]
    assert all(len(shape) == 3 and min(shape[:2]) > 100 for _, shape in sent)


class Weights(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = weights_of(pl_module)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    def fit(folder: str, epochs: int, checkpoint: Path | None = None) -> dict[str, Tensor]:
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        module, weights = Optimised(adamw), Weights()
        run = trainer(
            tmp_path,
            HeadProjector(probe(), rank=3),
            keep,
            weights,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        run.fit(module, loader(12), ckpt_path=checkpoint, **WHOLE_CHECKPOINT)
        return weights.end

    whole = fit("a", 2)
    fit("b", 1)
    resumed = fit("b", 2, tmp_path / "b" / "last.ckpt")
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_optimisers_are_left_as_found_even_after_an_exception(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    module = Optimised(adamw)
    run = trainer(tmp_path, HeadProjector(probe(), rank=3), Fails())
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(module, loader(8))
    (optimizer,) = run.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank is 0, expected a number of directions"),
        ({"rank": 1.5}, r"rank is 1\.5, expected a number of directions .* or a share"),
        ({"cells": "some"}, "cells is 'some', expected 'all', a list of names or a number"),
        ({"cells": 0}, "cells is 0, expected 'all', a list of names or a number of at least 1"),
        ({"cells": 3}, "cells is 3 and heatmap None, expected a heatmap to choose"),
        ({"heatmap": "runs"}, "cells is 'all' and heatmap 'runs', expected .* neither heatmap nor pair"),
        ({"every_n_epochs": 2}, "every_n_epochs is 2, expected at least 1, with batches"),
        ({"cells": ["L0.H0.X"]}, "'L0.H0.X' is no cell, expected a name such as 'L15.H8.O'"),
        ({"cells": ["L0.H0.Q"], "rest": "tensors"}, "protects the whole model, expected cells='all'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadProjector("file", **arguments)


def test_what_cannot_be_protected_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "math.safetensors"
    with pytest.raises(FileNotFoundError, match="measure it with `qkov protect`"):
        trainer(tmp_path, HeadProjector(path)).fit(Module(), loader(4))
    path.write_bytes(b"nothing")
    with pytest.raises(SubspaceError, match="holds no subspace of `qkov protect`"):
        trainer(tmp_path, HeadProjector(path)).fit(Module(), loader(4))
    measure_subspace(Module(network=Classifier([GroupedAttention()], width=10)), probe(), rank=3).save(path)
    with pytest.raises(
        SubspaceError, match=r"no directions of `network\.layers\.1\.q_proj`; it has those of"
    ):
        trainer(tmp_path, HeadProjector(path)).fit(Module(), loader(4))
    measure_subspace(Module(), probe(), rank=3).save(path)
    with pytest.raises(SubspaceError, match=r"no rows of|no directions of"):
        trainer(tmp_path, HeadProjector(path, rest="tensors")).fit(Module(), loader(4))
    with pytest.raises(ValueError, match=r"the model has no cell L7\.H0\.Q"):
        trainer(tmp_path, HeadProjector(path, cells=["L7.H0.Q"])).fit(Module(), loader(4))
    with pytest.raises(ValueError, match="The probe did not run `network"):
        measure_subspace(Module(), [], rank=3)


def test_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    module = Module()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), module.network)
    with pytest.raises(
        ArchitectureError, match=r"the weight of `network\.layers\.0\.q_proj` .* computed from"
    ):
        trainer(tmp_path, HeadProjector(probe(), rank=3)).fit(module, loader(4))


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=needs_sharding_on_cpu)])
def test_on_two_processes(tmp_path: Path, mode: str) -> None:
    before, after = on_two_processes("run_projector.py", tmp_path, mode)
    subspace = ProtectedSubspace.load(tmp_path / "subspace.safetensors")
    for projection in find_projections(Module()):
        step = after[f"{projection.module_name}.weight"] - before[f"{projection.module_name}.weight"]
        assert (inside(subspace, projection, step) < 10 * ROUNDING).all()
        assert step.abs().max() > 1e-3
