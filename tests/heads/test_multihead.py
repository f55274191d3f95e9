"""``nn.MultiheadAttention`` fires no hook inside, and must be captured all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from qkov_lightning import GradientCapture, find_projections, task
from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.gradients import head_gradients

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
TASKS = ["math", "code", "math"]
Loss = Callable[[nn.Module], Tensor]


def capture(model: nn.Module, loss: Loss) -> CapturedStep:
    with GradientCapture(model, find_projections(model), loss_reduction="sum") as taps:
        taps.start()
        with task(TASKS):
            value = loss(model)
        value.backward()
        (step,) = taps.finish()
    return step


def assert_equal_to_autograd(model: nn.Module, loss_of: Callable[[nn.Module, slice], Tensor]) -> None:
    """Every head of every sample, against a backward pass of that sample alone."""
    model = model.double()
    step = capture(model, lambda model: loss_of(model, slice(None)))
    for sample in range(3):
        model.zero_grad()
        loss_of(model, slice(sample, sample + 1)).backward()
        for p in find_projections(model):
            owner = p.module_name if p.block != "O" else p.module_name.removesuffix("out_proj").strip(".")
            attention = model.get_submodule(owner)
            weight = attention.out_proj.weight if p.block == "O" else attention.in_proj_weight
            grad = weight.grad.T if p.block == "O" else weight.grad
            seen = head_gradients(step.factors[p.module_name], p, step.scales)[sample]
            for head, features in enumerate(p.head_features):
                torch.testing.assert_close(seen[head], grad[features].flatten(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_gradients_of_packed_attention_equal_autograd(
    batch_first: bool, need_weights: bool, distinct: int
) -> None:
    """One, two or three linear maps over parts of one weight, according to which inputs are the same."""
    inputs = [torch.randn(3, 5 if i == 0 or distinct == 1 else 7, 16).double() for i in range(distinct)]
    query, key, value = inputs[0], inputs[min(1, distinct - 1)], inputs[-1]

    def loss(model: nn.Module, samples: slice) -> Tensor:
        parts: dict[int, Tensor] = {}
        for t in (query, key, value):
            part = t[samples] if batch_first else t[samples].transpose(0, 1)
            parts.setdefault(id(t), part)
        output, _ = model(*(parts[id(t)] for t in (query, key, value)), need_weights=need_weights)
        return output.pow(3).sum()

    assert_equal_to_autograd(nn.MultiheadAttention(16, 4, batch_first=batch_first), loss)


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_of_a_whole_transformer_equal_autograd(batch_first: bool) -> None:
    source, target = torch.randn(3, 6, 16).double(), torch.randn(3, 4, 16).double()

    def loss(model: nn.Module, samples: slice) -> Tensor:
        x, y = source[samples], target[samples]
        if not batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        return model(x, y).pow(3).sum()

    assert_equal_to_autograd(nn.Transformer(16, 2, 1, 2, 24, dropout=0.0, batch_first=batch_first), loss)


def test_checkpointed_attention_is_captured() -> None:
    x = torch.randn(3, 5, 16).double().requires_grad_()

    def loss(model: nn.Module, samples: slice) -> Tensor:
        def run(part: Tensor) -> Tensor:
            return model(part, part, part, need_weights=False)[0]

        return checkpoint(run, x[samples], use_reentrant=False).pow(3).sum()

    assert_equal_to_autograd(nn.MultiheadAttention(16, 4, batch_first=True), loss)


def test_outputs_and_gradients_are_the_same_with_and_without_taps() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True), 2)
    x = torch.randn(3, 5, 16)
    plain = model(x)
    plain.pow(2).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    outputs: list[Tensor] = []

    def loss(model: nn.Module) -> Tensor:
        outputs.append(model(x))
        return outputs[0].pow(2).sum()

    capture(model, loss)
    assert torch.equal(outputs[0], plain)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_an_error_inside_attention_leaves_nothing_behind() -> None:
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(3, 5, 16)
    with GradientCapture(model, find_projections(model)) as taps:
        taps.start()
        with pytest.raises(RuntimeError):
            model(x, x, x, attn_mask=torch.zeros(9, 9))
        assert torch.overrides._get_current_function_mode() is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_frozen_packed_weight_is_not_captured_and_its_trained_output_is() -> None:
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    model.in_proj_weight.requires_grad_(False)
    x = torch.randn(3, 5, 16)
    step = capture(model, lambda model: model(x, x, x)[0].sum())
    assert set(step.factors) == {"out_proj"}


def test_other_function_modes_see_what_they_saw() -> None:
    seen: list[object] = []

    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(3, 5, 16)

    def loss(model: nn.Module) -> Tensor:
        with Other():
            return model(x, x, x)[0].sum()

    assert set(capture(model, loss).factors) == {"", "out_proj"}
    assert functional.linear in seen


def test_linear_maps_called_by_keyword_beside_attention_are_let_through() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.other = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.linear(input=x, weight=self.other.weight, bias=self.other.bias)
            return functional.linear(self.attention(x, x, x)[0], weight=self.other.weight)

    model, x = Beside(), torch.randn(3, 5, 16)
    step = capture(model, lambda model: model(x).sum())
    assert set(step.factors) == {"attention", "attention.out_proj"}


def test_labels_that_disagree_with_the_sample_axis_are_refused() -> None:
    """Time first, labelled as if sample first."""
    model = nn.MultiheadAttention(16, 4, batch_first=False)
    x = torch.randn(3, 5, 16)
    with pytest.raises(ValueError, match="samples"):
        capture(model, lambda model: model(x, x, x)[0].sum())
