"""What must be undone of a loss is read from the loss itself; the oracle takes each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qkov_lightning import GradientCapture, find_projections, task, verify_capture
from qkov_lightning.capture.loss_terms import read_loss
from qkov_lightning.capture.reductions import joining
from qkov_lightning.capture.samples import Samples

SAMPLES = Samples(("a",) * 3, ("0", "1", "2"))
TARGETS = torch.tensor([[1, 4, 2, -100, -100, -100], [0, 0, 3, 1, 4, -100], [2, 2, 1, 0, 4, 3]])
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
Loss = Callable[[Tensor, Tensor], Tensor]


def entropy(scores: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    return functional.cross_entropy(scores.reshape(-1, 5), targets.reshape(-1), **settings)


def each(scores: Tensor, targets: Tensor) -> Tensor:
    return entropy(scores, targets, reduction="none").view(targets.shape)


def per_sample(scores: Tensor, targets: Tensor) -> Tensor:
    return (each(scores, targets) * valid(targets)).sum(dim=1) / valid(targets).sum(dim=1)


def valid(targets: Tensor) -> Tensor:
    return targets != -100


def by_hand(scores: Tensor, targets: Tensor) -> Tensor:
    chosen = scores.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(chosen * valid(targets)).sum() / valid(targets).sum()


LOSSES: dict[str, tuple[str, Loss]] = {
    "cross-entropy": ("token_mean", entropy),
    "cross-entropy, scaled": ("token_mean", lambda s, t: 2.0 * entropy(s, t) / 4),
    "cross-entropy over positions": ("token_mean", lambda s, t: functional.cross_entropy(s.transpose(1, 2), t)),
    "cross-entropy, shifted": ("token_mean", lambda s, t: entropy(s[:, :-1], t[:, 1:])),
    "cross-entropy, class weights": ("token_mean", lambda s, t: entropy(s, t, weight=CLASS_WEIGHTS.to(s))),
    "cross-entropy, smoothed": ("token_mean", lambda s, t: entropy(s, t, label_smoothing=0.1)),
    "cross-entropy, learned weight": ("token_mean", lambda s, t: entropy(s, t) * nn.Parameter(torch.ones(())).exp()),
    "cross-entropy and weight decay": ("token_mean", lambda s, t: entropy(s, t) + WEIGHT.square().sum()),
    "valid rows only": ("token_mean", lambda s, t: entropy(s[valid(t)], t[valid(t)])),
    "masked": ("token_mean", lambda s, t: (each(s, t) * valid(t)).sum() / valid(t).sum()),
    "selected": ("token_mean", lambda s, t: each(s, t)[valid(t)].mean()),
    "by hand": ("token_mean", by_hand),
    "sum": ("sum", lambda s, t: entropy(s, t, reduction="sum")),
    "sum, scaled": ("sum", lambda s, t: 0.37 * entropy(s, t, reduction="sum")),
    "sum of selected": ("sum", lambda s, t: each(s, t)[valid(t)].sum()),
    "sum of means": ("sum", lambda s, t: per_sample(s, t).sum()),
    "loop, sum": ("sum", lambda s, t: sum(map(functional.cross_entropy, s, t))),
    "squared error, sum": ("sum", lambda s, t: functional.mse_loss(s, torch.ones_like(s), reduction="sum")),
    "mean of means": ("mean", lambda s, t: per_sample(s, t).mean()),
    "mean of sums": ("mean", lambda s, t: (each(s, t) * valid(t)).sum(dim=1).mean()),
    "mean over padding too": ("mean", lambda s, t: (each(s, t) * valid(t)).mean()),
    "sum by samples": ("mean", lambda s, t: (each(s, t) * valid(t)).sum() / len(t)),
    "loop, mean": ("mean", lambda s, t: sum(map(functional.cross_entropy, s, t)) / len(t)),
    "squared error": ("mean", lambda s, t: functional.mse_loss(s, torch.ones_like(s))),
    "squared error by hand": ("mean", lambda s, t: (s - 1).square().mean(dim=(1, 2)).mean()),
    "binary": ("mean", lambda s, t: functional.binary_cross_entropy_with_logits(s, torch.full_like(s, 0.2))),
    "divergence": ("mean", lambda s, t: functional.kl_div(s.log_softmax(-1), torch.full_like(s, 0.2), reduction="batchmean")),
    "one class a sample": ("mean", lambda s, t: functional.cross_entropy(s[:, 0], t[:, 0])),
    "last token": ("mean", lambda s, t: functional.cross_entropy(s[torch.arange(len(s)), 2], t[:, 0])),
    "probabilities": ("mean", lambda s, t: functional.cross_entropy(s.flatten(0, 1), torch.full_like(s.flatten(0, 1), 0.2))),
}  # fmt: skip
WEIGHT = nn.Parameter(torch.randn(7, 2))


def expected_scales(loss: Loss, scores: Tensor) -> Tensor:
    """By how much the gradient of each sample in the batch is smaller than that of its own loss."""
    (batch,) = torch.autograd.grad(loss(scores, TARGETS), scores)
    ratios = []
    for n in range(3):
        alone = scores[n : n + 1].detach().requires_grad_()
        (own,) = torch.autograd.grad(loss(alone, TARGETS[n : n + 1]), alone)
        ratios.append(own.norm() / batch[n].norm())
    return torch.stack(ratios)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_how_it_joins_its_samples(name: str) -> None:
    kind, loss = LOSSES[name]
    scores = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    found = joining(SAMPLES, "auto", read_loss(loss(scores, TARGETS)))
    expected = expected_scales(loss, scores)
    torch.testing.assert_close(found.scales(3), expected, rtol=1e-9, atol=0)
    assert found.reduction == kind


# Targets of each sample, of which 3, 5 and 6 are valid, or what the own loss is the mean of instead.
TERMS: dict[str, tuple[float, ...] | float | None] = {
    "cross-entropy, shifted": (2, 4, 5),
    "cross-entropy, class weights": (10**2 / 38, 13**2 / 47, 18**2 / 64),
    **dict.fromkeys(("sum", "sum, scaled", "sum of selected", "sum by samples", "mean of sums"), 1),
    "squared error, sum": 1,
    **dict.fromkeys(("loop, sum", "loop, mean"), None),  # which part is which sample is not seen
    "mean over padding too": 6,
    **dict.fromkeys(("squared error", "squared error by hand", "binary"), 30),
    "divergence": 1,
    "probabilities": 6,
    **dict.fromkeys(("one class a sample", "last token"), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_how_many_terms_each_sample_has(name: str) -> None:
    scores = torch.randn(3, 6, 5, requires_grad=True)
    loss = LOSSES[name][1](scores, TARGETS)
    found = [
        joining(SAMPLES, choice, read_loss(loss / by)).num_terms for choice, by in (("auto", 1), ("auto", 7))
    ]
    expected = TERMS.get(name, (3, 5, 6))
    expected = (expected,) * 3 if isinstance(expected, (int, float)) else expected
    assert found == [expected if expected is None else pytest.approx(expected, rel=1e-6)] * 2


def test_a_sample_alone_has_its_terms_too() -> None:
    scores = torch.randn(1, 6, 5, requires_grad=True)
    one = Samples(("a",), ("0",))
    assert joining(one, "auto", read_loss(entropy(scores, TARGETS[:1]))).num_terms == (3,)
    assert joining(one, "mean", read_loss(entropy(scores, TARGETS[:1]))).num_terms == (3,)
    assert joining(one, "sum", read_loss(entropy(scores, TARGETS[:1]))).num_terms == (1,)


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_same_in_bfloat16(name: str) -> None:
    """Counts are exact, whatever the loss is rounded to."""
    _, loss = LOSSES[name]
    scores = torch.randn(3, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    found = joining(SAMPLES, "auto", read_loss(loss(scores, TARGETS))).scales(3)
    exact = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(found, expected_scales(loss, exact), rtol=4e-3, atol=0)


def test_reading_a_loss_changes_no_gradient() -> None:
    scores = torch.randn(3, 6, 5, requires_grad=True)
    for _, loss in LOSSES.values():
        (plain,) = torch.autograd.grad(loss(scores, TARGETS), scores)
        value = loss(scores, TARGETS)
        read_loss(value)
        assert torch.equal(torch.autograd.grad(value, scores)[0], plain)


def test_parts_that_cannot_both_be_undone_are_refused() -> None:
    scores = torch.randn(3, 6, 5, requires_grad=True)
    loss = entropy(scores, TARGETS) + scores.square().mean()
    with pytest.raises(
        ValueError, match=r"a mean over target tokens and a mean over samples.*Pass the one of the main part"
    ):
        joining(SAMPLES, "auto", read_loss(loss))
    assert joining(SAMPLES, "mean", read_loss(loss)).reduction == "mean"


class Opaque(torch.autograd.Function):
    """A loss that is one operation, as fused kernels are."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.shape = scores.shape
        return scores.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].expand(ctx.shape)


def test_a_loss_that_does_not_show_it_is_refused_if_the_samples_differ() -> None:
    loss = Opaque.apply(torch.randn(3, 6, 5, requires_grad=True))
    assert joining(SAMPLES, "auto", read_loss(loss)).reduction == "mean"
    counted = Samples(SAMPLES.tasks, SAMPLES.ids, (3, 5, 6))
    with pytest.raises(
        ValueError, match=r"3 to 6 target tokens, and the loss does not show .* loss_reduction=\"token_mean\""
    ):
        joining(counted, "auto", read_loss(loss))
    assert joining(counted, "token_mean", read_loss(loss)).scales(3).tolist() == [14 / 3, 14 / 5, 14 / 6]


def padded() -> tuple[Tensor, Tensor]:
    tokens = torch.arange(24).view(3, 8) % 13 + 1
    labels = tokens.clone()
    labels[0, 3:] = labels[1, 7:] = -100
    return tokens, labels


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    tokens, labels = padded()
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    batch = {"input_ids": tokens, "attention_mask": (labels != -100).long(), "labels": labels}
    return LlamaForCausalLM(config), batch


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    tokens, labels = padded()
    config = T5Config(
        vocab_size=16,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config), {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("family", [llama, t5])
def test_a_padded_batch_of_a_language_model_is_right_by_default(family: Callable[[], Any]) -> None:
    """Called a mean over samples, the gradients of short samples were several times too small."""
    model, batch = family()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    assert verify_capture(model, batch, loss=loss).passed
    assert not verify_capture(model, batch, loss=loss, loss_reduction="mean").passed
    assert verify_capture(
        model, batch, loss=loss, loss_reduction="token_mean"
    ).passed  # counted from the loss


def test_a_loss_of_the_routers_of_experts_is_no_loss_of_samples() -> None:
    """Its numbers are statistics of the batch, whose size may happen to be a multiple of the samples."""
    tokens, labels = padded()
    config = MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    loss = model(input_ids=tokens, attention_mask=(labels != -100).long(), labels=labels).loss
    counts = (labels[:, 1:] != -100).sum(dim=1).double()
    found = joining(SAMPLES, "auto", read_loss(loss)).scales(3)
    torch.testing.assert_close(found, counts.sum() / counts)


def test_a_fused_loss_on_padded_samples_is_refused_without_any_help_of_the_batch() -> None:
    model, batch = llama()

    def fused(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return Opaque.apply(model(input_ids=batch["input_ids"]).logits)

    with pytest.raises(ValueError, match=r"2 to 7 target tokens|3 to 8 target tokens"):
        verify_capture(model, batch, loss=fused)
    assert not verify_capture(model, batch, loss=fused, loss_reduction="mean").passed
    assert verify_capture(model, batch, loss=fused, loss_reduction="sum").passed


def test_two_forward_passes_have_a_reduction_each() -> None:
    model, batch = llama()
    rest = {key: value[:2] for key, value in batch.items()}
    with GradientCapture(model, find_projections(model)) as capture:
        capture.start()
        with task("a"):
            first = model(**batch).loss
        with task("b"):
            second = (each_token(model, rest) * (rest["labels"][:, 1:] != -100)).sum()
        capture.note_loss(first + second)
        (first + second).backward()
        steps = {step.samples.tasks[0]: step for step in capture.finish()}
    counts = (batch["labels"][:, 1:] != -100).sum(dim=1).double()
    torch.testing.assert_close(steps["a"].scales, counts.sum() / counts)
    torch.testing.assert_close(steps["a"].num_terms, counts)
    assert steps["b"].scales.tolist() == steps["b"].num_terms.tolist() == [1.0, 1.0]


def each_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return functional.cross_entropy(scores.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
