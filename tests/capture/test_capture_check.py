"""The check of a user's own model passes where capture is right, and names the reason where it cannot be."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule
from models import CausalSelfAttention, Classifier, GroupedAttention
from modules import Module, loader, trainer
from rich.console import Console
from test_adapters import gpt2, lora
from test_regimes import PACKED, SAMPLES, Checkpointed, packed
from test_taps import TARGETS, TOKENS, grouped
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from qkov_lightning import CaptureVerification, task, verify_capture
from qkov_lightning.capture.single_sample import take_sample
from qkov_lightning.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

BATCH = {"tokens": TOKENS, "target": TARGETS}


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["tokens"]), batch["target"])


def sum_loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["tokens"]), batch["target"], reduction="sum")


class Packed(nn.Module):
    """``nn.MultiheadAttention``, whose weights are parts of one parameter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Extra(Classifier):
    """A classifier with one more module before its head."""

    def __init__(self, extra: nn.Module, attention: nn.Module | None = None, width: int = 10) -> None:
        super().__init__([attention or GroupedAttention()], width=width)
        self.extra = extra

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.extra(torch.tanh(self.layers[0](self.embedding(tokens))).mean(dim=1)))


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def check(model: nn.Module, **settings: Any) -> CaptureVerification:
    return verify_capture(model, BATCH, **{"loss": mean_loss, **settings})


@pytest.mark.parametrize(
    "build",
    [
        lambda: Classifier([GroupedAttention() for _ in range(2)], width=10),
        lambda: Classifier([CausalSelfAttention() for _ in range(2)], width=12),
        lambda: Classifier([CausalSelfAttention(conv=False)], width=12),
        lambda: Classifier([Packed()], width=12),
        lambda: Classifier([GroupedAttention()] * 2, width=10),
    ],
    ids=["grouped-query", "fused Conv1D", "fused linear", "nn.MultiheadAttention", "shared module"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_captured_gradients_of_each_layout_pass(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    verification = check(build().to(dtype))
    assert verification.passed, str(verification)
    assert verification.reasons == ()
    assert verification.num_samples == 4
    assert verification.tolerance == torch.finfo(dtype).eps ** 0.5
    errors = [cell.error for cell in verification.cells]
    assert None not in errors
    assert 0 < max(errors) < verification.tolerance / 10, "an exact zero would compare a thing with itself"


def test_adapters_are_compared_with_the_gradient_of_the_effective_weight() -> None:
    model = lora(gpt2(), ["c_attn", "c_proj"])
    for module in model.modules():
        if hasattr(module, "lora_B"):
            assert not module.weight.requires_grad

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(input_ids=batch["input_ids"])[0].pow(3).sum()

    verification = verify_capture(model, {"input_ids": TOKENS}, loss=loss, loss_reduction="sum")
    assert verification.passed, str(verification)
    assert all(cell.error is not None for cell in verification.cells)


def test_the_training_step_of_a_lightning_module_is_the_loss() -> None:
    batch = next(iter(loader(24)))
    verification = verify_capture(Module(), batch)
    assert verification.passed, str(verification)


def test_autocast_around_the_call_is_what_is_verified() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        verification = check(grouped().float())
    assert verification.tolerance == torch.finfo(torch.bfloat16).eps ** 0.5
    assert verification.passed, str(verification)


def test_a_token_mean_loss_passes_when_it_is_called_one_and_fails_when_it_is_called_a_mean() -> None:
    model = grouped()
    model.head = nn.Linear(10, 11).double()
    labels = TOKENS.clone()
    labels[0, 1:] = labels[1, 3:] = -100  # samples of 1, 3, 5 and 5 target tokens
    batch = {"tokens": TOKENS, "labels": labels, "num_target_tokens": (labels != -100).sum(dim=1)}

    def loss(model: Any, batch: Any) -> Tensor:
        x = model.embedding(batch["tokens"])
        for layer in model.layers:
            x = torch.tanh(x + layer(x))
        return functional.cross_entropy(model.head(x).flatten(0, 1), batch["labels"].flatten())

    assert verify_capture(model, batch, loss=loss, loss_reduction="token_mean").passed
    assert verify_capture(model, batch, loss=loss).passed  # the loss says it
    wrong = verify_capture(model, batch, loss=loss, loss_reduction="mean")
    assert not wrong.passed
    assert 'a weighted mean over samples, not what loss_reduction="mean" says' in wrong.reasons[0]
    assert 'If it is a mean over tokens, say loss_reduction="token_mean"' in wrong.reasons[0]
    counted = {**batch, "num_target_tokens": torch.ones(4, dtype=torch.int64)}
    wrong = verify_capture(model, counted, loss=loss, loss_reduction="token_mean")
    assert "otherwise than by the numbers of target tokens" in wrong.reasons[0]


@pytest.mark.parametrize(
    ("loss", "declared", "message"),
    [
        (sum_loss, "mean", r'by a factor of 4: the loss is a sum .* Say loss_reduction="sum"'),
        (mean_loss, "sum", r'by a factor of 0\.25: the loss is a mean .* Say loss_reduction="mean"'),
        (
            lambda model, batch: mean_loss(model, batch) * (3 if len(batch["target"]) > 1 else 1),
            "mean",
            "by a factor of 3: is the loss multiplied with something",
        ),
    ],
)
def test_a_wrong_loss_reduction_is_named(loss: Any, declared: Any, message: str) -> None:
    verification = check(grouped(), loss=loss, loss_reduction=declared)
    assert len(verification.failures) == len(verification.cells)
    (reason,) = verification.reasons
    assert_matches(message, reason)


def test_dropout_is_named_and_proven_to_be_the_reason() -> None:
    verification = check(Extra(nn.Dropout(0.5)))
    assert not verification.passed
    first, last = verification.reasons
    assert_matches(r"`extra` \(Dropout\) draws random numbers", first)
    assert_matches("in evaluation mode every cell agrees: they are the reason", last)
    assert check(Extra(nn.Dropout(0.5)).eval()).passed


def test_dropout_inside_an_attention_function_is_named() -> None:
    verification = check(Extra(nn.Identity(), Packed(dropout=0.5), width=12))
    assert_matches(
        r"`layers\.0\.attention` \(MultiheadAttention\) draws random numbers", verification.reasons[0]
    )
    assert_matches("they are the reason", verification.reasons[-1])


def test_random_numbers_of_the_loss_itself_are_named() -> None:
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(functional.dropout(model(batch["tokens"]), 0.5), batch["target"])

    verification = check(grouped(), loss=noisy)
    assert_matches("The forward pass of Classifier itself draws random numbers", verification.reasons[0])


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_is_named(track: bool) -> None:
    model = Extra(nn.BatchNorm1d(10, track_running_stats=track)).double()
    verification = check(model)
    assert not verification.passed
    assert_matches(r"`extra` \(BatchNorm1d\) normalises over the batch", verification.reasons[0])
    assert_matches(
        "they are the reason" if track else "No reason|cells still differ", verification.reasons[1]
    )
    assert check(model.eval()).passed is track


def test_dropout_does_not_hide_a_wrong_reduction() -> None:
    verification = check(Extra(nn.Dropout(0.5)), loss=sum_loss, loss_reduction="mean")
    assert_matches("cells still differ", verification.reasons[1])
    assert_matches('Say loss_reduction="sum"', verification.reasons[2])


def test_a_weight_that_two_modules_share_is_named() -> None:
    model = grouped()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    verification = check(model)
    assert {cell.projection.block for cell in verification.failures} == {"Q"}
    assert_matches(r"`layers\.0\.q_proj` shares its weight with `layers\.1\.q_proj`", verification.reasons[0])


def test_a_loss_that_compares_samples_is_not_explained_away() -> None:
    def contrastive(model: nn.Module, batch: Any) -> Tensor:
        scores = model(batch["tokens"])
        return functional.cross_entropy(scores @ scores.T, torch.arange(len(scores)))

    verification = check(grouped(), loss=contrastive)
    assert not verification.passed
    assert_matches(
        "No reason was found. Does the loss compare samples with each other", verification.reasons[0]
    )


def test_a_projection_that_went_past_its_module_is_named() -> None:
    class Functional(GroupedAttention):
        def forward(self, x: Tensor) -> Tensor:
            query = functional.linear(x, self.q_proj.weight, self.q_proj.bias)
            key, value = self.k_proj(x).repeat_interleave(2, -1), self.v_proj(x).repeat_interleave(2, -1)
            return self.o_proj((query @ key.transpose(1, 2)).softmax(-1) @ value)

    verification = check(Classifier([Functional()], width=10))
    assert {cell.projection.block for cell in verification.failures} == {"Q"}
    assert_matches(
        r"`layers\.0\.q_proj` delivered nothing, though its weight has a gradient", verification.reasons[0]
    )


def test_frozen_projections_are_not_compared() -> None:
    model = grouped()
    model.layers[0].k_proj.requires_grad_(False)
    verification = check(model)
    assert verification.passed
    assert {(c.projection.layer, c.projection.block) for c in verification.cells if c.error is None} == {
        (0, "K")
    }
    assert "no gradient" in str(verification)


def test_a_model_whose_projections_are_all_frozen_is_refused() -> None:
    model = grouped()
    model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="All attention projections are frozen"):
        check(model)


def test_reentrant_checkpoints_are_refused_or_named() -> None:
    """``torch.autograd.grad`` does not enter them, and a backward pass would touch the model's gradients."""
    with pytest.raises(ValueError, match=r"reentrant checkpoints.*Use `use_reentrant=False`"):
        check(without_dropout(Checkpointed(reentrant=True)))
    assert check(without_dropout(Checkpointed(reentrant=False))).passed

    class Half(Checkpointed):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            x = torch.tanh(x + checkpoint(self.layers[0], x, use_reentrant=True))
            return self.head(self.layers[1](x).mean(dim=1))

    verification = check(without_dropout(Half(reentrant=True)))
    assert {cell.projection.layer for cell in verification.cells if cell.error is None} == {0}
    assert_matches(r"`layers\.0\.q_proj`: it ran forward, but no gradient", verification.reasons[0])


def without_dropout(model: Checkpointed) -> nn.Module:
    model.dropout.p = 0.0
    return model


def test_two_forward_passes_with_tasks_of_their_own_are_refused() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with task("math"):
            first = mean_loss(model, batch)
        with task("code"):
            return first + mean_loss(model, batch)

    with pytest.raises(ValueError, match="The loss ran 2 forward passes with samples of their own"):
        check(grouped(), loss=loss)


def test_packed_samples_need_to_be_taken_apart_by_the_user() -> None:
    model = grouped()
    batch = {"tokens": PACKED, "token_samples": SAMPLES, "target": TARGETS, "task": ["a"] * 4}

    def loss(model: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(
            packed(model, batch["tokens"], batch["token_samples"]), batch["target"]
        )

    def unpacked(batch: Any, index: int) -> Any:
        tokens = batch["tokens"][batch["token_samples"] == index]
        return {
            "tokens": tokens,
            "token_samples": torch.zeros_like(tokens),
            "target": batch["target"][index][None],
        }

    with pytest.raises(ValueError, match="The samples of the batch are packed: pass `sample_of="):
        verify_capture(model, batch, loss=loss)
    verification = verify_capture(model, batch, loss=loss, sample_of=unpacked)
    assert verification.passed, str(verification)


def test_the_model_is_left_as_found() -> None:
    model = Extra(nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(0.5)))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert not check(model).passed
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None or bool((p.grad == 1).all()) for p in model.parameters())


def test_the_table_has_a_row_for_each_projection_and_the_error_of_each_head() -> None:
    verification = check(grouped(), loss=sum_loss, loss_reduction="mean")
    lines = str(verification).splitlines()
    assert lines[0].startswith("L0  Q layers.0.q_proj: 3e+00 3e+00 3e+00 3e+00 DIFFERS")
    assert len(lines) == 8 + 2
    assert "0 of 24 cells agree with batch-of-one autograd: 4 samples" in lines[8]
    console = Console(record=True, width=120)
    console.print(verification)
    printed = console.export_text()
    assert "layers.1.o_proj" in printed
    assert "Say loss_reduction" in printed


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, r"Classifier has no `training_step` that returns a loss"),
        (lambda model, batch: model(batch["tokens"]), "expected one number that depends on the parameters"),
        (lambda model, batch: model(batch["tokens"]).sum() * torch.inf, "expected a finite number"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(grouped(), loss=loss)


class Fields(NamedTuple):
    tokens: Tensor
    tasks: list[str]
    weight: float


def test_everything_with_one_entry_per_sample_is_cut() -> None:
    x = torch.arange(6).view(3, 2)
    cut = take_sample((x, {"ids": ["a", "b", "c"], "mask": [x, x]}, torch.tensor(3.0), "abc", None), 1, 3)
    assert torch.equal(cut[0], x[1:2])
    assert cut[1]["ids"] == ["b"]
    assert [one.shape for one in cut[1]["mask"]] == [(1, 2), (1, 2)]
    assert cut[2:] == (torch.tensor(3.0), "abc", None)
    fields = take_sample(Fields(x, ["a", "b", "c"], 0.5), 2, 3)
    assert (fields.tasks, fields.weight) == (["c"], 0.5)


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(8)


def doubled(model: nn.Module, batch: Any) -> Tensor:
    """Twice the mean, for more than one sample."""
    return model.loss(batch) * min(2, len(batch["target"]))


class Dropping(Module):
    def __init__(self) -> None:
        super().__init__(dropout=0.5)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["qkov", "verify", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    main()


def test_the_command_prints_the_table_and_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    fitted = trainer(tmp_path, max_epochs=0)
    fitted.fit(Module(), loader(8), loader(8))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    run(
        monkeypatch, "--model", "modules.Module", "--data", f"{__name__}.Data",
        "--checkpoint", str(tmp_path / "a.ckpt"),
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "network.layers.1.o_proj" in printed
    assert "24 of 24 cells agree" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", f"{__name__}.Dropping"], r"`dropout` (Dropout) draws random numbers"),
        (["--model", "modules.Module", "--loss_reduction", "sum"], 'Say loss_reduction="mean"'),
        (
            ["--model", "modules.Module", "--loss", f"{__name__}.doubled"],
            "too large by a factor of 2: is the loss multiplied",
        ),
        ([], "Say what to load: `--model <class path>`"),
    ],
)
def test_the_command_fails_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments, "--data", f"{__name__}.Data")
    assert message in capsys.readouterr().err
