"""Adapters, shared weights and frozen blocks: the gradient is that of the effective weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from qkov_lightning import GradientCapture, find_projections, task, verify_projections
from qkov_lightning.capture.gradients import head_gradients

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 2,
}
GATED = {
    "num_key_value_heads": 2,
    "head_dim": 12,
    "layer_types": ["full_attention"] * 2,
    "mlp_only_layers": [0, 1],
}
BORROWING = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "attention_k_eq_v": True,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [8, 9, 7, 9, 32, 38], [2, 7, 1, 8, 2, 8]])
TASKS = ["math", "code", "math"]


def build(family: str, **settings: Any) -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model(family, vocab_size=64, **settings)).double().eval()


def llama() -> nn.Module:
    return build("llama", **SIZES, num_key_value_heads=2)


def gpt2() -> nn.Module:
    return build("gpt2", n_embd=32, n_layer=2, n_head=4)


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    wrapped = get_peft_model(
        model, LoraConfig(r=3, target_modules=targets, fan_in_fan_out="c_attn" in targets)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide a mistake
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def loss(model: nn.Module, samples: slice) -> Tensor:
    return model(input_ids=IDS[samples])[0].pow(3).sum()


def captured(model: nn.Module) -> dict[tuple[int, str], Tensor]:
    projections = find_projections(model)
    with GradientCapture(model, projections, loss_reduction="sum") as taps:
        taps.start()
        with task(TASKS):
            value = loss(model, slice(None))
        value.backward()
        (step,) = taps.finish()
    return {
        (p.layer, p.block): head_gradients(step.factors[p.module_name], p, step.scales) for p in projections
    }


def by_autograd(model: nn.Module, sample: int) -> dict[tuple[int, str], Tensor]:
    """Head by head, from a backward pass of one sample through a model of plain weights."""
    model.zero_grad()
    loss(model, slice(sample, sample + 1)).backward()
    gradients = {}
    for p in find_projections(model):
        module = model.get_submodule(p.module_name)
        grad = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad
        grad = grad.T if p.block == "O" else grad
        gradients[p.layer, p.block] = torch.stack([grad[features].flatten() for features in p.head_features])
    return gradients


@pytest.mark.parametrize("family", [
    ("llama", {**SIZES, "num_key_value_heads": 2}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    ("gpt_neox", SIZES),
    ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ("codegen", {"n_embd": 64, "n_layer": 1, "n_head": 8, "rotary_dim": 4}),
    ("bert", SIZES),
    ("phi3", {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    ("deberta", {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("deberta-v2", {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}),
    ("deepseek_v3", {**SIZES, **LATENT}),
    ("qwen3_next", {**SIZES, **GATED}),
    ("gemma4_text", {**SIZES, **BORROWING}),
], ids=lambda family: family[0])  # fmt: skip
def test_head_gradients_of_each_convention_equal_autograd(family: tuple[str, dict[str, Any]]) -> None:
    model = build(family[0], **family[1])
    seen = captured(model)
    # Gemma normalises in float32 whatever the model is in: a batch of three rounds unlike a batch of one, in
    # proportion to the largest gradient.
    rounds = family[0] == "gemma4_text"
    for sample in range(3):
        for cell, expected in by_autograd(model, sample).items():
            rtol, atol = (1e-4, 1e-6 * float(expected.abs().max())) if rounds else (1e-8, 1e-10)
            torch.testing.assert_close(seen[cell][sample], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama, ["q_proj", "k_proj", "v_proj", "o_proj"]), (gpt2, ["c_attn", "c_proj"])],
)
def test_adapted_projections_give_the_gradient_of_the_effective_weight(make: Any, targets: list[str]) -> None:
    adapted = lora(make(), targets)
    plain = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True)
    seen = captured(adapted)
    assert len(seen) == 8
    for sample in range(3):
        for cell, expected in by_autograd(plain, sample).items():
            torch.testing.assert_close(seen[cell][sample], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("merged", [False, True])
def test_adapted_models_are_proven_merged_or_not(merged: bool) -> None:
    model = lora(gpt2(), ["c_attn", "c_proj"])
    if merged:
        model.merge_adapter()
    verification = verify_projections(model, {"input_ids": IDS})
    assert verification.passed, str(verification)
    assert {p.module_name for p in find_projections(model)} == {
        f"base_model.model.h.{layer}.attn.{leaf}" for layer in range(2) for leaf in ("c_attn", "c_proj")
    }


def test_only_the_adapted_projections_have_data() -> None:
    model = lora(llama(), ["q_proj", "v_proj"])
    projections = find_projections(model)
    with GradientCapture(model, projections, loss_reduction="sum") as taps:
        taps.start()
        with task(TASKS):
            value = loss(model, slice(None))
        value.backward()
        (step,) = taps.finish()
    assert {name.rpartition(".")[2] for name in step.factors} == {"q_proj", "v_proj"}


def test_an_attention_module_shared_by_layers_is_one_row_with_the_gradient_of_all_its_calls() -> None:
    model = llama()
    model.layers[1].self_attn = model.layers[0].self_attn
    assert {p.layer for p in find_projections(model)} == {0}
    seen = captured(model)
    for sample in range(3):
        for cell, expected in by_autograd(model, sample).items():
            torch.testing.assert_close(seen[cell][sample], expected, rtol=1e-8, atol=1e-10)
    assert verify_projections(model, {"input_ids": IDS, "use_cache": False}).passed


def test_a_projection_shared_by_layers_shows_its_whole_gradient_in_both_rows() -> None:
    model = llama()
    model.layers[1].self_attn.q_proj = model.layers[0].self_attn.q_proj
    seen = captured(model)
    for sample in range(3):
        for cell, expected in by_autograd(model, sample).items():
            torch.testing.assert_close(seen[cell][sample], expected, rtol=1e-8, atol=1e-10)
