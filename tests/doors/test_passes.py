"""A sample counts once, however often an optimiser or a training step asks for its gradient."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, GroupedAttention
from modules import Module, loader, trainer
from test_monitor import assert_heatmap_is, expected_scores
from test_taps import TARGETS, TASKS, TOKENS, assert_equals_autograd, grouped, run
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning import GradientCapture, InterferenceMonitor, find_projections, task

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)

STEPS = [list(range(start, start + 4)) for start in range(0, 24, 4)]


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021) that comes back to where it started."""

    def __init__(self, parameters: Any, radius: float = 0.5) -> None:
        super().__init__(parameters, {"radius": radius})

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        self.climb()
        with torch.enable_grad():
            closure()
        self.come_back()
        return loss

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["before"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=group["radius"])

    @torch.no_grad()
    def come_back(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["before"])


class SharpnessAware(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Sharpness(self.parameters())


class ByHand(SharpnessAware):
    """The two passes of a step in manual optimisation, within ``with task(...)`` or not."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.named = named

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer = self.optimizers().optimizer
        for move in (optimizer.climb, optimizer.come_back):
            optimizer.zero_grad()
            if self.named:
                with task(batch["task"], sample_ids=batch["sample_id"]):
                    loss = self.loss(batch)
            else:
                loss = self.loss(batch)
            self.manual_backward(loss)
            move()


class Quasi(Module):
    """L-BFGS evaluates the closure up to 20 times a step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=1e-20)


@pytest.mark.parametrize(
    "make", [SharpnessAware, Quasi, lambda: ByHand(named=False), lambda: ByHand(named=True)]
)
def test_an_optimiser_that_evaluates_a_batch_again(tmp_path: Path, make: Callable[[], Module]) -> None:
    module, monitor = make(), InterferenceMonitor(every_n_steps=1)
    start = copy.deepcopy(module)
    trainer(tmp_path, monitor).fit(module, loader(24))
    assert monitor.heatmap is not None
    assert_heatmap_is(monitor.heatmap, expected_scores(start, 24, STEPS))


def loss_of(model: nn.Module, n: int | None = None) -> Tensor:
    rows = slice(None) if n is None else slice(n, n + 1)
    return functional.cross_entropy(model(TOKENS[rows]), TARGETS[rows])


def test_gradients_that_are_asked_for_before_the_backward_pass() -> None:
    """As GradNorm, PCGrad, MGDA and CAGrad do for each task, on the weights that the tasks share."""
    model = grouped()
    weights = list(model.layers.parameters())
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        with task(TASKS):
            scores = model(TOKENS)
        each = functional.cross_entropy(scores, TARGETS, reduction="none")
        for part in (each[::2].sum(), each[1::2].sum()):
            torch.autograd.grad(part, weights, retain_graph=True)
            torch.autograd.grad(part, scores, retain_graph=True)
        capture.note_loss(each.mean())
        each.mean().backward()
        (step,) = capture.finish()
    assert_equals_autograd(model, step, lambda n: loss_of(model, n))


def test_gradients_that_are_only_asked_for() -> None:
    """As where the surgery writes ``.grad`` itself.

    What was asked for, once for each task, is the gradient.
    """
    model = grouped()
    with GradientCapture(model, find_projections(model), "sum") as capture:
        capture.start()
        with task(TASKS):
            each = functional.cross_entropy(model(TOKENS), TARGETS, reduction="none")
        for part in (each[::2].sum(), each[1::2].sum()):
            torch.autograd.grad(part, list(model.layers.parameters()), retain_graph=True)
        (step,) = capture.finish()
    assert_equals_autograd(model, step, lambda n: loss_of(model, n))


def test_gradients_that_are_asked_for_several_at_once() -> None:
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        with task(TASKS):
            each = functional.cross_entropy(model(TOKENS), TARGETS, reduction="none")
        torch.autograd.grad(
            each,
            list(model.layers.parameters()),
            torch.eye(len(each)).to(each),
            retain_graph=True,
            is_grads_batched=True,
        )
        each.mean().backward()
        (step,) = capture.finish()
    assert_equals_autograd(model, step, lambda n: loss_of(model, n))


def reloaded(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
def test_a_copy_of_the_model_delivers_nothing(
    tmp_path: Path, copied: Callable[[nn.Module], nn.Module]
) -> None:
    class Teacher(Module):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            teacher = copied(self.network)
            return self.loss(batch) + teacher(batch["tokens"]).square().mean()

    module, monitor = Teacher(learning_rate=0.0), InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader(24))
    assert monitor.heatmap is not None
    assert_heatmap_is(monitor.heatmap, expected_scores(module, 24, STEPS))


@pytest.mark.parametrize("copied", [copy.deepcopy, reloaded])
def test_between_captured_steps_the_model_has_no_hook_to_copy(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = grouped()
    with GradientCapture(model, find_projections(model)) as capture:
        run_once(model, capture)
        for network in (model, copied(model)):
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def run_once(model: nn.Module, capture: GradientCapture) -> None:
    capture.start()
    with task(TASKS):
        loss = loss_of(model)
    loss.backward()
    assert capture.finish()


def test_two_captures_that_overlap_leave_compiled_modules_compiled() -> None:
    """The one that began first ends first, as two monitors of one trainer do."""
    model = grouped()
    first, second = (GradientCapture(model, find_projections(model)) for _ in range(2))
    first.start()
    second.start()
    first.discard()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.discard()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_shallow_copy_shares_hooks_and_delivers_nothing() -> None:
    model = grouped(layers=1)
    twin = copy.copy(model.layers[0].q_proj)

    class Beside(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens) + 0 * twin(self.inner.embedding(tokens)).mean()

    outer = Beside(model)
    (step,) = run(outer, lambda: functional.cross_entropy(outer(TOKENS), TARGETS))
    assert_equals_autograd(
        outer, step, lambda n: functional.cross_entropy(outer(TOKENS[n : n + 1]), TARGETS[n : n + 1])
    )


def test_two_tasks_that_step_one_after_the_other_both_count(tmp_path: Path) -> None:
    """The weights move between the two forward passes, but the samples are others."""

    class InTurn(Module):
        def __init__(self) -> None:
            super().__init__(learning_rate=1e-12)
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            for start, name in enumerate(("math", "code")):
                part = {key: value[start::2] for key, value in batch.items()}
                with task(name, sample_ids=part["sample_id"]):
                    loss = self.loss(part)
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()

    module, monitor = InTurn(), InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader(24))
    assert monitor.heatmap is not None
    assert monitor.heatmap.samples_per_task == {"code": 12, "math": 12}


def test_rows_that_are_windows_of_a_sample_are_refused(tmp_path: Path) -> None:
    """As in a Swin transformer: with one task for the whole batch, every window counted as a sample."""

    class Windows(Module):
        def loss(self, batch: dict[str, Any]) -> Tensor:
            windows = batch["tokens"][:, :4].reshape(-1, 2)
            scores = self.network(windows).view(len(batch["tokens"]), 2, -1).mean(dim=1)
            return functional.cross_entropy(scores, batch["target"])

    monitor = InterferenceMonitor(
        every_n_steps=1, task_of=lambda batch: "all", sample_id_of=lambda batch: None
    )
    with pytest.raises(ValueError, match=r"The batch has 4 samples .* have 8 rows.*`token_samples`"):
        trainer(tmp_path, monitor).fit(Windows(), loader(24))


def test_the_loss_tells_where_the_batch_does_not() -> None:
    model = Classifier([GroupedAttention()], width=10)
    windows = torch.arange(24).view(12, 2) % 11
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        with task("all"):
            scores = model(windows).view(4, 3, -1).mean(dim=1)
        loss = functional.cross_entropy(scores, torch.arange(4))
        capture.note_loss(loss)
        loss.backward()
        with pytest.raises(
            ValueError, match=r"have 12 rows, but the loss is made of 4 elements.*`token_samples`"
        ):
            capture.finish()


def test_samples_without_an_identifier_are_recognised_in_the_next_epoch(tmp_path: Path) -> None:
    module, monitor = Module(learning_rate=0.0), InterferenceMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, max_epochs=5).fit(module, loader(24, ids=False))
    assert monitor.heatmap is not None
    assert monitor.heatmap.samples_per_task == {"code": 12, "math": 12}
    assert monitor.heatmap.notes["captured_steps"] == 30
