"""Each way in which people train gives the gradients of batch-of-one autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from models import Classifier, GroupedAttention
from modules import Module, Samples, loader, trainer
from oracles import batch_of_one_gradients
from test_monitor import assert_heatmap_is, expected_scores
from test_taps import TARGETS, TASKS, TOKENS, assert_equals_autograd, grouped, run
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from qkov_lightning import (
    EmpiricalFisher,
    GradientCapture,
    InterferenceMonitor,
    Projection,
    find_projections,
    head_interference,
    samples_from_positions,
    task,
)
from qkov_lightning.capture.samples import label_samples

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)

STEPS = [list(range(start, start + 4)) for start in range(0, 24, 4)]

# Gradients in bfloat16 carry 8 bits: 0.4% an element, less in means over weights and samples, more in tails.
BFLOAT16 = 0.05


def fit(tmp_path: Path, module: Module | None = None, **settings: Any) -> tuple[Module, InterferenceMonitor]:
    module = module or Module(learning_rate=0.0)
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, **settings).fit(module, loader(24))
    assert monitor.heatmap is not None
    return module, monitor


def assert_close_to_autograd(module: Module, monitor: InterferenceMonitor, tolerance: float) -> None:
    assert monitor.heatmap is not None
    expected = expected_scores(module.float(), 24, STEPS)
    for (layer, block, a, b), values in expected.items():
        for score in ("interference", "relative"):
            found = monitor.heatmap.values(a, b, score)[layer, : len(values[score]), "QKVO".index(block)]
            torch.testing.assert_close(found, values[score], rtol=tolerance, atol=0)


def test_32_true(tmp_path: Path) -> None:
    module, monitor = fit(tmp_path, precision="32-true")
    assert_heatmap_is(monitor.heatmap, expected_scores(module, 24, STEPS))


def test_64_true(tmp_path: Path) -> None:
    module, monitor = fit(tmp_path, precision="64-true")
    for (layer, block, a, b), values in expected_scores(module, 24, STEPS).items():
        for score in ("interference", "relative", "cosine"):
            found = monitor.heatmap.values(a, b, score)[layer, : len(values[score]), "QKVO".index(block)]
            torch.testing.assert_close(found, values[score], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(tmp_path: Path, precision: str) -> None:
    module, monitor = fit(tmp_path, precision=precision)
    assert_close_to_autograd(module, monitor, 2 * BFLOAT16 if precision == "bf16-true" else BFLOAT16)


class CpuScaler(MixedPrecision):
    """16-mixed with a gradient scaler, on a processor without an accelerator."""

    def __init__(self, scale: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2))


def test_a_gradient_scaler_is_undone_while_it_changes(tmp_path: Path) -> None:
    """The scale doubles every two steps: each step must be undone by its own. Float16 carries 11 bits."""
    module, monitor = fit(tmp_path, plugins=CpuScaler(2.0**10))
    assert_close_to_autograd(module, monitor, 0.01)


def test_steps_that_overflow_are_dropped_and_counted(tmp_path: Path) -> None:
    module, monitor = Module(learning_rate=0.0), InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, plugins=CpuScaler(2.0**24), max_epochs=2).fit(module, loader(24))
    dropped = monitor.heatmap.notes["non_finite_steps"]
    assert dropped > 0
    assert monitor.heatmap.notes["captured_steps"] == 12 - dropped
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_gradient_scaler_and_accumulation_are_both_undone(tmp_path: Path) -> None:
    """Windows of four and two batches, while the scale doubles every two optimiser steps."""
    module, monitor = fit(tmp_path, plugins=CpuScaler(2.0**10), accumulate_grad_batches=4)
    assert_close_to_autograd(module, monitor, 0.01)


class TokenMean(Module):
    """Next-token prediction over 1 to 4 target tokens a sample, counted as language models do."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0, network=Classifier([GroupedAttention()], width=10, classes=11))

    def token_loss(self, tokens: Tensor) -> Tensor:
        x = self.network.embedding(tokens)
        scores = self.network.head(torch.tanh(x + self.network.layers[0](x)))
        return functional.cross_entropy(scores[:, :-1].flatten(0, 1), targets_of(tokens).flatten())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch["num_target_tokens"] = (targets_of(batch["tokens"]) != -100).sum(dim=1)
        return self.token_loss(batch["tokens"])


def targets_of(tokens: Tensor) -> Tensor:
    lengths = 1 + tokens.sum(dim=1, keepdim=True) % 4
    return tokens[:, 1:].masked_fill(torch.arange(4) >= lengths, -100)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_token_mean_loss_is_undone_under_accumulation(tmp_path: Path, accumulate: int) -> None:
    module = TokenMean()
    monitor = InterferenceMonitor(every_n_steps=1, loss_reduction="token_mean")
    trainer(tmp_path, monitor, accumulate_grad_batches=accumulate).fit(module, loader(24))
    samples, names = Samples(24), [("math", "code")[n % 2] for n in range(24)]
    assert len({int((targets_of(tokens[None]) != -100).sum()) for tokens in samples.tokens}) == 4
    module = module.double()
    for projection in find_projections(module):
        found = scores_by_autograd(
            module, projection, lambda n: module.token_loss(samples.tokens[n][None]), names
        )
        for (a, b), values in found.items():
            block = "QKVO".index(projection.block)
            heatmap = monitor.heatmap.values(a, b)[projection.layer, : projection.num_heads, block]
            torch.testing.assert_close(heatmap, values["interference"], rtol=1e-3, atol=1e-7)


def scores_by_autograd(
    module: nn.Module, projection: Projection, loss: Callable[[int], Tensor], names: list[str]
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Scores of one projection from batch-of-one gradients, in captured steps of four."""
    weight = module.get_submodule(projection.module_name).weight
    gradients = batch_of_one_gradients(module, {"w": weight}, loss, len(names))["w"]
    gradients = gradients.transpose(1, 2) if projection.block == "O" else gradients
    heads = gradients.unflatten(1, (projection.num_heads, -1)).flatten(2)
    fisher = EmpiricalFisher(0.95)
    for start in range(0, len(names), 4):
        fisher.update(heads[start : start + 4], names[start : start + 4])
    return head_interference(heads, names, fisher.pooled())


def test_gradient_clipping_and_accumulation_do_not_reach_the_heatmap(tmp_path: Path) -> None:
    module, monitor = fit(tmp_path, gradient_clip_val=1e-4, accumulate_grad_batches=2)
    assert_heatmap_is(monitor.heatmap, expected_scores(module, 24, STEPS))


def test_gradients_that_are_zeroed_instead_of_removed_do_not_add_up(tmp_path: Path) -> None:
    class ZeroedInPlace(Module):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)

    module, monitor = fit(tmp_path, ZeroedInPlace(learning_rate=0.0))
    assert_heatmap_is(monitor.heatmap, expected_scores(module, 24, STEPS))


class Manual(Module):
    """Manual optimisation with two optimisers and two backward passes, one of them past Lightning."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.loss(batch)
        self.manual_backward(0.25 * loss, retain_graph=True)
        (0.75 * loss).backward()
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss.detach(), batch_size=4)
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), 0.0), torch.optim.SGD(self.parameters(), 0.0)]


def test_manual_optimisation_with_several_backward_passes(tmp_path: Path) -> None:
    module, monitor = fit(tmp_path, Manual())
    assert_heatmap_is(monitor.heatmap, expected_scores(module, 24, STEPS))


def test_manual_optimisation_that_returns_nothing(tmp_path: Path) -> None:
    class Silent(Manual):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    module, monitor = fit(tmp_path, Silent())
    assert_heatmap_is(monitor.heatmap, expected_scores(module, 24, STEPS))


def test_a_forward_without_backward_beside_the_real_one_changes_nothing() -> None:
    model = grouped()

    def loss() -> Tensor:
        model(TOKENS.flip(1))  # logged, say, but not part of the loss
        with torch.no_grad():
            model(TOKENS.flip(0))
        return functional.cross_entropy(model(TOKENS), TARGETS)

    (step,) = run(model, loss)
    assert_equals_autograd(
        model, step, lambda n: functional.cross_entropy(model(TOKENS[n : n + 1]), TARGETS[n : n + 1])
    )


def test_blocks_frozen_in_one_step_are_captured_in_the_next() -> None:
    """As adversarial training does, toggling who learns."""
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        for frozen in (True, False):
            model.layers[0].requires_grad_(not frozen)
            capture.start()
            functional.cross_entropy(model(TOKENS), TARGETS).backward()
            (step,) = capture.finish(lambda: label_samples(TASKS))
            assert any(name.startswith("layers.0") for name in step.factors) is not frozen
            assert any(name.startswith("layers.1") for name in step.factors)


def test_a_gradient_that_an_earlier_step_left_behind_is_no_alarm() -> None:
    """Alternating optimisers, and accumulation over branches.

    A block that does not run still has its old gradient.
    """
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        functional.cross_entropy(model(TOKENS), TARGETS).backward()
        capture.start()
        model.head(model.layers[1](model.embedding(TOKENS)).mean(dim=1)).sum().backward()
        (step,) = capture.finish(lambda: label_samples(TASKS))  # a warning would be an error
    assert all(name.startswith("layers.1") for name in step.factors)
    assert all(p.grad.any() for p in model.layers[0].o_proj.parameters())


class Adversarial(Module):
    """A generator and a critic, both with attention, that learn in turn within each step."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.automatic_optimization = False
        self.generator = Classifier([GroupedAttention()], width=10, classes=10)
        self.critic = Classifier([GroupedAttention()], width=10, classes=1)
        del self.network

    def made(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.generator(tokens)).unsqueeze(1) + self.critic.embedding(tokens)

    def judge(self, x: Tensor) -> Tensor:
        return self.critic.head(torch.tanh(x + self.critic.layers[0](x)).mean(dim=1)).squeeze(-1)

    def critic_losses(self, tokens: Tensor) -> Tensor:
        return self.judge(self.made(tokens).detach()) - self.judge(self.critic.embedding(tokens)).square()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        learn_critic, learn_generator = self.optimizers()
        for optimizer, losses in (
            (learn_critic, self.critic_losses),
            (learn_generator, self.generator_losses),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(losses(batch["tokens"]).mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def generator_losses(self, tokens: Tensor) -> Tensor:
        return -self.judge(self.made(tokens))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), 0.0) for part in (self.critic, self.generator)]


def test_two_optimisers_that_freeze_each_others_blocks(tmp_path: Path) -> None:
    """As in a GAN: each part is measured by its own loss, though the generator's passes the critic."""
    module, monitor = fit(tmp_path, Adversarial())
    module = module.double()
    samples, names = Samples(24), [("math", "code")[n % 2] for n in range(24)]
    for projection in find_projections(module):
        part = projection.module_name.partition(".")[0]
        losses = module.critic_losses if part == "critic" else module.generator_losses
        found = scores_by_autograd(
            module, projection, lambda n, losses=losses: losses(samples.tokens[n][None]).sum(), names
        )
        for (a, b), values in found.items():
            block = "QKVO".index(projection.block)
            heatmap = monitor.heatmap.values(a, b)[projection.layer, : projection.num_heads, block]
            torch.testing.assert_close(heatmap, values["interference"], rtol=1e-3, atol=1e-7)


class PerTask(Module):
    """One forward per task, as with a CombinedLoader."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        total = torch.zeros(())
        for name in ("math", "code"):
            with task(name, sample_ids=batch[name]["sample_id"]):
                total = total + self.loss(batch[name])
        return total


def test_a_combined_loader_with_one_forward_per_task(tmp_path: Path) -> None:
    monitor = InterferenceMonitor(every_n_steps=1)
    module = PerTask(learning_rate=0.0)
    loaders = {}
    for name, rows in (("math", range(0, 24, 2)), ("code", range(1, 24, 2))):
        loaders[name] = DataLoader([Samples(24)[row] for row in rows], batch_size=2)
    trainer(tmp_path, monitor).fit(module, loaders)
    assert_heatmap_is(monitor.heatmap, expected_scores(module, 24, STEPS))


# Packing


def packed(model: Classifier, tokens: Tensor, sample: Tensor) -> Tensor:
    """Class scores of packed samples: attention within each sample only, then the mean of its tokens."""
    x = model.embedding(tokens)
    same = sample.unsqueeze(-1) == sample.unsqueeze(-2)
    for layer in model.layers:
        query, key, value = (
            layer.q_proj(x),
            *(torch.cat([part, part], -1) for part in (layer.k_proj(x), layer.v_proj(x))),
        )
        logits = (query @ key.transpose(-1, -2)).masked_fill(~same, -torch.inf)
        x = torch.tanh(x + layer.o_proj(logits.softmax(-1) @ value))
    flat, index = x.flatten(0, -2), sample.flatten()
    return model.head(torch.stack([flat[index == n].mean(dim=0) for n in range(int(index.max()) + 1)]))


PACKED = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 1, 2]])
SAMPLES = samples_from_positions(torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]]))


@pytest.mark.parametrize("layout", ["rows", "flattened", "padded and out of order"])
def test_packed_samples_are_told_apart_by_token(layout: str) -> None:
    model, tokens, sample = grouped(), PACKED, SAMPLES
    if layout != "rows":
        tokens, sample = tokens.flatten(), sample.flatten()
    if layout == "padded and out of order":
        order = torch.randperm(12)
        tokens, sample = (
            torch.cat([tokens[order], tokens[:2]]),
            torch.cat([sample[order], torch.tensor([-1, -1])]),
        )
    (step,) = run(
        model, lambda: functional.cross_entropy(packed(model, tokens, sample), TARGETS), token_samples=sample
    )
    assert step.factors["layers.0.q_proj"].offsets.diff().tolist() == [3, 3, 1, 5]

    def alone(n: int) -> Tensor:
        return functional.cross_entropy(packed(model, tokens, sample)[n : n + 1], TARGETS[n : n + 1])

    assert_equals_autograd(model, step, alone)


def test_a_token_map_that_does_not_fit_is_refused() -> None:
    model = grouped()
    with pytest.raises(ValueError, match="one token for each of the 11 entries of `token_samples`"):
        run(model, lambda: packed(model, PACKED, SAMPLES).sum(), token_samples=SAMPLES.flatten()[:11])
    with pytest.raises(ValueError, match="A token belongs to sample 3, but there are 2 tasks"):
        label_samples(["math", "code"], token_samples=SAMPLES)


def test_packed_sequences_without_a_token_map_are_refused() -> None:
    model = grouped()
    with pytest.raises(ValueError, match=r"4 tasks .* have 2 rows.*`token_samples`"):
        run(model, lambda: functional.cross_entropy(packed(model, PACKED, SAMPLES), TARGETS))


# Compiled modules


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo looks at it
@pytest.mark.parametrize("part", ["whole", "blocks"])
@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_modules_are_captured_and_run_compiled_in_between(part: str, compiled_first: bool) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(module: nn.Module, example_inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return module.forward

    model = grouped()
    if part == "whole":
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = model
        for layer in model.layers:
            layer.compile(backend=backend)
    if compiled_first:
        compiled(TOKENS)
    with GradientCapture(model, find_projections(model)) as capture:
        for captured in (False, True, False, True, False):
            if captured:
                capture.start()
            functional.cross_entropy(compiled(TOKENS), TARGETS).backward()
            if captured:
                (step,) = capture.finish(lambda: label_samples(TASKS))
                assert_equals_autograd(
                    model,
                    step,
                    lambda n: functional.cross_entropy(model(TOKENS[n : n + 1]), TARGETS[n : n + 1]),
                )
            elif not compiled_first:
                assert graphs, "steps that are not captured are compiled"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_a_compiled_module_in_the_trainer_gives_the_heatmap(tmp_path: Path, part: str) -> None:
    torch._dynamo.reset()
    module, monitor = Module(learning_rate=0.0), InterferenceMonitor(every_n_steps=2)
    graphs: list[int] = []

    def backend(graph: nn.Module, example_inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return graph.forward

    fitted: Any = module
    if part == "whole":
        fitted = torch.compile(module, backend=backend)
    else:
        for layer in module.network.layers:
            layer.compile(backend=backend)
    trainer(tmp_path, monitor).fit(fitted, loader(24))
    assert graphs, "batches that are not captured run compiled"
    torch._dynamo.reset()
    network = Module(learning_rate=0.0)
    assert_heatmap_is(monitor.heatmap, expected_scores(network, 24, STEPS[::2]))


# Training is not touched


class Checkpointed(Classifier):
    """Dropout inside of a checkpoint, which has to draw the same numbers again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__([GroupedAttention() for _ in range(2)], width=10)
        self.reentrant, self.dropout = reentrant, nn.Dropout(0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: self.dropout(layer(x)), x, use_reentrant=self.reentrant)
        return self.head(x.mean(dim=1))


class TwoOptimisers(Manual):
    """Manual optimisation that learns."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), 0.05), torch.optim.Adam(self.parameters(), 0.01)]


def compiled() -> Module:
    torch._dynamo.reset()
    module = Module(dropout=0.3)
    for layer in module.network.layers:
        layer.compile(backend="eager")
    return module


REGIMES: dict[str, tuple[Callable[[], Module], dict[str, Any]]] = {
    "plain": (lambda: Module(dropout=0.3), {}),
    "64-true": (lambda: Module(dropout=0.3), {"precision": "64-true"}),
    "bf16-mixed": (lambda: Module(dropout=0.3), {"precision": "bf16-mixed"}),
    "bf16-true": (lambda: Module(dropout=0.3), {"precision": "bf16-true"}),
    "16-mixed, overflow": (lambda: Module(dropout=0.3), {"plugins": 2.0**17}),
    "accumulation, partial last window": (lambda: Module(dropout=0.3), {"accumulate_grad_batches": 4}),
    "clipping": (lambda: Module(dropout=0.3), {"gradient_clip_val": 0.01}),
    "checkpointing, reentrant": (lambda: Module(network=Checkpointed(True)), {}),
    "checkpointing, non-reentrant": (lambda: Module(network=Checkpointed(False)), {}),
    "manual optimisation, two optimisers": (TwoOptimisers, {}),
    "one forward per task": (lambda: PerTask(dropout=0.3), {}),
    "compiled blocks": (compiled, {}),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("regime", REGIMES)
def test_training_is_bit_identical_with_and_without_the_monitor(tmp_path: Path, regime: str) -> None:
    """All parameters, and the random numbers after the last batch; every second batch is captured."""
    build, settings = REGIMES[regime]
    ends = []
    for callbacks in ([], [InterferenceMonitor(every_n_steps=2, num_hot_cells=1)]):
        torch.manual_seed(7)
        module = build()
        torch.manual_seed(11)
        data: Any = DataLoader(Samples(24), batch_size=4, shuffle=True)
        if isinstance(module, PerTask):
            samples = Samples(24)
            data = {
                name: DataLoader([samples[n] for n in range(first, 24, 2)], batch_size=2, shuffle=True)
                for first, name in enumerate(("math", "code"))
            }
        own = {"plugins": CpuScaler(settings["plugins"])} if "plugins" in settings else settings
        trainer(tmp_path, *callbacks, **own).fit(module, data)
        ends.append([*(p.detach().clone() for p in module.parameters()), torch.get_rng_state()])
        if callbacks:
            assert callbacks[0].heatmap is not None
            assert callbacks[0].heatmap.notes["captured_steps"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    torch.manual_seed(7)
    untrained = build()
    assert not all(torch.equal(a, b) for a, b in zip(ends[0][:-1], untrained.parameters(), strict=True))


# Memory


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "no checkpoint"])
def test_taps_hold_no_activation_under_checkpointing(mode: str) -> None:
    """Inputs of O live inside the checkpoint only: after the forward pass none may be alive."""
    alive: list[weakref.ref[Tensor]] = []
    layers = nn.ModuleList(GroupedAttention() for _ in range(3))
    for layer in layers:
        layer.o_proj.register_forward_pre_hook(lambda _, inputs: alive.append(weakref.ref(inputs[0])))
    with GradientCapture(layers, find_projections(layers)) as capture:
        capture.start()
        x = torch.randn(4, 5, 10, requires_grad=True)
        for layer in layers:
            x = (
                layer(x)
                if mode == "no checkpoint"
                else checkpoint(layer, x, use_reentrant=mode == "reentrant")
            )
        held = sum(ref() is not None for ref in alive)
        assert held == (3 if mode == "no checkpoint" else 0)
        x.sum().backward()
        (step,) = capture.finish(lambda: label_samples(TASKS))
    assert len(step.factors) == 12
