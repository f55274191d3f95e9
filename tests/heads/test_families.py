"""Families of transformers whose attention is unusual: placed and proven, or refused in one sentence."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from qkov_lightning import ArchitectureError, find_projections, verify_projections

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of transformers on kernels that are not installed

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
WORDS: dict[str, Any] = {**SIZES, "vocab_size": 64, "max_position_embeddings": 64}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
SEGMENT: dict[str, Any] = {
    **IMAGE, "mlp_dim": 48, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1],
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
MAMBA: dict[str, Any] = {**WORDS, "num_key_value_heads": 2, "mamba_d_state": 4}
HYBRID: dict[str, Any] = {
    **MAMBA, "num_hidden_layers": 4, "num_key_value_heads": 4, "attention_head_dim": 16,
    "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
}  # fmt: skip
SPEECH: dict[str, Any] = {**SIZES, "num_mel_bins": 16, "subsampling_conv_channels": 8}


def tokens(count: int = 8) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, (2, count))}


def pixels(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, *shape)}


def sounds() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 80, 16), "attention_mask": torch.ones(2, 80, dtype=torch.int64)}


Family = tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]
"""Class of the model, its sizes, and a batch."""

FAMILIES: dict[str, Family] = {
    "lilt": (
        "LiltModel",
        {**WORDS, "hidden_size": 96, "max_2d_position_embeddings": 64},
        lambda: {**tokens(), "bbox": torch.randint(0, 30, (2, 8, 4)).sort(dim=-1).values},
    ),
    "longformer": ("LongformerModel", {**WORDS, "attention_window": 4, "pad_token_id": 1}, lambda: tokens(16)),
    "nystromformer": (
        "NystromformerModel",
        {**WORDS, "segment_means_seq_len": 16, "num_landmarks": 16},
        lambda: tokens(16),
    ),
    "hy_v4": (
        "HYV4Model",
        {**WORDS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
         "num_experts": 2, "moe_topk": 1, "moe_intermediate_size": 16},
        tokens,
    ),
    "jamba": (
        "JambaModel",
        {**MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 4},
        tokens,
    ),
    "zamba": ("ZambaModel", {**HYBRID, "n_mamba_heads": 2}, tokens),
    "zamba2": (
        "Zamba2Model",
        {**HYBRID, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1, "n_mamba_heads": 4, "mamba_headdim": 16,
         "mamba_ngroups": 1, "adapter_rank": 4},
        tokens,
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridModel",
        {**MAMBA, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
         "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32},
        tokens,
    ),
    "granite_speech_encoder": (
        "GraniteSpeechCTCEncoder",
        {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "dim_head": 8, "input_dim": 16, "context_size": 8,
         "output_dim": 8},
        lambda: {"hidden_states": torch.randn(2, 16, 16)},
    ),
    "nemotron_asr_streaming_encoder": ("NemotronAsrStreamingEncoder", SPEECH, sounds),
    "swinv2": ("Swinv2Model", SWIN, lambda: pixels(3, 32, 32)),
    "maskformer-swin": ("MaskFormerSwinModel", SWIN, lambda: pixels(3, 32, 32)),
    "timesformer": (
        "TimesformerModel", {**IMAGE, "patch_size": 16, "num_frames": 3}, lambda: pixels(3, 3, 32, 32),
    ),
    "sam_vision_model": ("SamVisionModel", SEGMENT, lambda: pixels(3, 32, 32)),
    "sam_hq_vision_model": ("SamHQVisionModel", SEGMENT, lambda: pixels(3, 32, 32)),
    "pp_formulanet_vision": (
        "PPFormulaNetVisionModel", {**SEGMENT, "output_channels": 256}, lambda: pixels(3, 32, 32),
    ),
    "sam2_hiera_det_model": (
        "Sam2HieraDetModel",
        {"hidden_size": 16, "num_attention_heads": 2, "image_size": [128, 128], "blocks_per_stage": [1, 2, 1, 1],
         "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [2, 4, 8, 16],
         "window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": [2]},
        lambda: pixels(3, 128, 128),
    ),
    "hiera": (
        "HieraModel",
        {"image_size": [96, 96], "embed_dim": 16, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1]},
        lambda: pixels(3, 96, 96),
    ),
    "kosmos-2": (
        "Kosmos2Model",
        {"text_config": {"vocab_size": 64, "embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 48},
         "vision_config": IMAGE, "latent_query_num": 4},
        lambda: {**tokens(), **pixels(3, 32, 32), "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0]] * 2)},
    ),
}  # fmt: skip


def build(family: str, **changes: Any) -> nn.Module:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    torch.manual_seed(0)
    name, sizes, _ = FAMILIES[family]
    config = CONFIG_MAPPING[family](**{**sizes, **changes})
    config._attn_implementation = "eager"
    module = type(config).__module__.replace("configuration_", "modeling_")
    model: nn.Module = getattr(importlib.import_module(module), name)(config).eval()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_is_placed_and_proven_and_exchanged_heads_are_not(family: str) -> None:
    model = build(family)
    batch = FAMILIES[family][2]()
    placed = find_projections(model)
    verification = verify_projections(model, batch, placed)
    assert verification.passed, str(verification)[:2000]
    for block in "QKVO":
        wrong = [
            dataclasses.replace(p, head_features=p.head_features.flip(0)) if p.block == block else p
            for p in placed
        ]
        failures = verify_projections(model, batch, wrong).failures
        assert {cell.projection.block for cell in failures} == {block}
        # All of them, but for layers of a single head, which has nothing to be exchanged with.
        expected = sum(p.num_heads - p.num_heads % 2 for p in placed if p.block == block)
        assert len(failures) == expected


@pytest.mark.parametrize("family", ["hiera", "sam2_hiera_det_model"])
def test_where_queries_are_pooled_a_key_is_no_query(family: str) -> None:
    model = build(family)
    placed = find_projections(model)
    features = {(p.layer, p.block): p.head_features for p in placed}
    other = {"Q": "K", "K": "Q"}
    wrong = [
        dataclasses.replace(p, head_features=features[p.layer, other.get(p.block, p.block)]) for p in placed
    ]
    failures = verify_projections(model, FAMILIES[family][2](), wrong).failures
    assert {"Q", "K"} <= {cell.projection.block for cell in failures}
    assert {cell.projection.layer for cell in failures} == {p.layer for p in placed}


def test_attention_over_landmarks_is_refused() -> None:
    model = build("nystromformer", num_landmarks=4)
    with pytest.raises(ArchitectureError, match="has softmaxes over landmarks in place of one over tokens"):
        find_projections(model)


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("ibert", "IBertModel", "has projections that return more than one tensor"),
        ("wavlm", "WavLMModel", "has weights that it uses without calling its projections"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_words(family: str, name: str, reason: str) -> None:
    import transformers

    sizes = {"conv_dim": [16], "conv_stride": [5], "conv_kernel": [10], "num_conv_pos_embedding_groups": 4}
    config = CONFIG_MAPPING[family](**(WORDS if family == "ibert" else {**SIZES, **sizes}))
    with pytest.raises(ArchitectureError, match=reason):
        find_projections(getattr(transformers, name)(config))
