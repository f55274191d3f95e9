"""Every family is proven by derivatives on a tiny random model; unknown ones are refused."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from qkov_lightning import (
    ArchitectureError,
    Projection,
    contiguous_heads,
    find_projections,
    register_architecture,
    verify_projections,
)
from qkov_lightning.heads import architectures as stage

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    **SPECIAL,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
GROUPED_12 = {**GROUPED, "head_dim": 12}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, **SPECIAL}
VISION = {**PLAIN, "image_size": 8, "patch_size": 4}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
LATENT = {
    **PLAIN,
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, **SPECIAL}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED_12,
    "mixtral": {**GROUPED, **EXPERTS},
    "qwen2": GROUPED,
    "qwen3": GROUPED_12,
    "qwen3_moe": {**GROUPED_12, **EXPERTS},
    "gemma": {**GROUPED_12, "num_key_value_heads": 1},
    "gemma2": GROUPED_12,
    "gemma3_text": GROUPED_12,
    "phi": GROUPED,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "starcoder2": GROUPED,
    "stablelm": GROUPED,
    "cohere": GROUPED,
    "granite": GROUPED,
    "smollm3": GROUPED,
    "gpt_oss": {**GROUPED_12, **EXPERTS},
    "persimmon": PLAIN,
    "gpt_neox": PLAIN,
    "gpt2": GPT,
    "gpt_bigcode: multi-query": {**GPT, "multi_query": True},
    "gpt_bigcode: full heads": {**GPT, "multi_query": False},
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "n_embd": 64, "n_head": 8, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "vocab_size": 64,
        **SPECIAL,
    },
    "opt": {**PLAIN, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **SPECIAL},
    "falcon: multi-query": FALCON,
    "falcon: new decoder": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon: full heads": {**FALCON, "multi_query": False, "alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 32},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 32},
    },
    "deepseek_v2": LATENT,
    "deepseek_v2: plain queries": {**LATENT, "q_lora_rank": None},
    "deepseek_v3": LATENT,
    "bert": PLAIN,
    "roberta": PLAIN,
    "electra": {**PLAIN, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64, **SPECIAL},
    "deberta": {**PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        **PLAIN,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
    },
    "deberta-v2: no relative attention": PLAIN,
    "modernbert": {**PLAIN, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "vocab_size": 64},
    "openai-gpt": GPT,
    "imagegpt": GPT,
    "gpt_neox_japanese": PLAIN,
    "clip_text_model": PLAIN,
    "vit": VISION,
    "dinov2": VISION,
    "clip_vision_model": VISION,
}

TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 32, 38, 4]])
SHORTER = TOKENS[:, :5]


def build(family: str, **settings: Any) -> nn.Module:
    config = AutoConfig.for_model(family.partition(":")[0], **settings)
    return AutoModel.from_config(config).eval()


def sample_for(family: str) -> dict[str, Tensor]:
    if FAMILIES[family] is VISION:
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    return {"input_ids": TOKENS}


def assert_proven(model: nn.Module, batch: Any) -> list[Projection]:
    verification = verify_projections(model, batch)
    assert verification.passed, str(verification)
    return find_projections(model)


def labels(projections: list[Projection]) -> list[str]:
    return [p.layer_name for p in projections if p.block == "O"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slice_of_the_family_is_the_head_that_the_model_computes(family: str) -> None:
    projections = assert_proven(build(family, **FAMILIES[family]), sample_for(family))
    assert Counter(p.block for p in projections) == {"Q": 2, "K": 2, "V": 2, "O": 2}


def test_hybrids_have_rows_for_their_softmax_layers_only_and_gates_are_left_out() -> None:
    model = build(
        "qwen3_next",
        **GROUPED_12,
        **EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
    )
    projections = assert_proven(model, {"input_ids": TOKENS})
    assert labels(projections) == ["layers.1.self_attn"]
    assert projections[0].head_features[1].tolist() == list(range(24, 36))


def gemma(**settings: Any) -> nn.Module:
    layer_types = ["sliding_attention", "full_attention"] * 2
    shared = {"layer_types": layer_types, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    return build(**{**GROUPED_12, **shared, "num_hidden_layers": 4, **settings})


def blocks_of(projections: list[Projection]) -> list[str]:
    """For each layer its blocks, and its key-value heads where it has keys."""
    rows: dict[int, str] = {}
    for p in projections:
        rows[p.layer] = rows.get(p.layer, "") + p.block + (str(p.num_heads) if p.block == "K" else "")
    return list(rows.values())


def test_layers_that_borrow_keys_and_values_have_queries_and_outputs_of_their_own_only() -> None:
    model = gemma(
        family="gemma3n_text",
        num_kv_shared_layers=2,
        intermediate_size=[48] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
    )
    assert blocks_of(assert_proven(model, {"input_ids": TOKENS})) == ["QK2VO", "QK2VO", "QO", "QO"]


def test_a_projection_that_gives_keys_and_values_alike_is_one_block() -> None:
    """Its full attention has other head counts and sizes than its sliding one, too."""
    model = gemma(
        family="gemma4_text",
        num_kv_shared_layers=0,
        attention_k_eq_v=True,
        global_head_dim=16,
        num_global_key_value_heads=1,
    )
    assert blocks_of(assert_proven(model, {"input_ids": TOKENS})) == ["QK2VO", "QK1O", "QK2VO", "QK1O"]


def test_latent_attention_has_heads_of_different_sizes() -> None:
    sizes = {p.block: p.head_dim for p in find_projections(build("deepseek_v3", **LATENT))}
    assert sizes == {"Q": 12, "K": 8, "V": 6, "O": 6}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("t5", {"d_model": 32, "d_kv": 6, "num_layers": 2, "num_heads": 4, "d_ff": 48, "vocab_size": 64}),
        ("bart", ENCODER_DECODER),
        ("whisper", {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 6}),
    ],
)
def test_self_and_cross_attention_are_labelled_apart(family: str, settings: dict[str, Any]) -> None:
    batch = {"decoder_input_ids": SHORTER}
    if family == "whisper":
        batch["input_features"] = torch.randn(2, 8, 12)
    else:
        batch["input_ids"] = TOKENS
    projections = assert_proven(build(family, **settings), batch)
    names = labels(projections)
    assert len(set(names)) == 6
    assert sum(name.startswith("encoder") for name in names) == 2
    assert sum(bool(re.search("encoder_attn|EncDecAttention", name)) for name in names) == 2
    if family != "t5":
        heads = {p.layer_name.partition(".")[0]: p.num_heads for p in projections}
        assert heads == {"encoder": 4, "decoder": 2}


def test_cross_attention_of_gpt2_takes_its_queries_from_a_module_of_their_own() -> None:
    model = build("gpt2", **GPT, add_cross_attention=True)
    batch = {"input_ids": TOKENS, "encoder_hidden_states": torch.randn(2, 5, 32)}
    assert len(labels(assert_proven(model, batch))) == 4


def test_the_pooling_head_of_siglip_is_a_layer_too() -> None:
    projections = assert_proven(
        build("siglip_vision_model", **VISION), {"pixel_values": torch.randn(2, 3, 8, 8)}
    )
    assert labels(projections)[-1] == "head.attention"
    assert len(labels(projections)) == 3


def test_a_layer_that_is_used_again_is_one_row() -> None:
    model = build("albert", **PLAIN, embedding_size=16)
    assert len(labels(assert_proven(model, {"input_ids": TOKENS}))) == 1


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformers_are_placed(batch_first: bool) -> None:
    x, y = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    model = nn.Transformer(32, 4, 2, 2, 48, batch_first=batch_first)
    projections = assert_proven(model, (x, y))
    assert labels(projections)[-2:] == ["decoder.layers.1.self_attn", "decoder.layers.1.multihead_attn"]
    alone = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    assert {p.module_name for p in assert_proven(alone, (x, y, y))} == {"", "out_proj"}


def test_torch_attention_over_keys_of_another_size_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="has keys of size 20 and values of size 32, expected"):
        find_projections(nn.MultiheadAttention(32, 4, kdim=20))


class Block(nn.Module):
    """A copy of how a package outside the test environment computes attention."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, size: int = 8, width: int = 32) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.add(width)

    def add(self, width: int) -> None:
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """From and to [sample, time, head, feature]."""
        group = self.heads // key.shape[2]
        key, value = (t.repeat_interleave(group, dim=2) for t in (key, value))
        context = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return context.transpose(1, 2).flatten(2)


class NanoGPT(Block):
    def add(self, width: int) -> None:
        self.n_head = self.heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(
            self.attend(*(t.unflatten(2, (self.heads, -1)) for t in self.c_attn(x).chunk(3, -1)))
        )


class Timm(Block):
    def add(self, width: int) -> None:
        self.num_heads = self.heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)))


class LitGPT(Block):
    def add(self, width: int) -> None:
        self.config = type(
            "Config",
            (),
            {"n_head": self.heads, "n_query_groups": self.kv_heads, "head_size": self.size},
        )()
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.size)
        self.proj = nn.Linear(self.heads * self.size, width)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        return self.proj(
            self.attend(*(t.unflatten(2, (-1, self.size)) for t in self.qkv(x).split(sizes, -1)))
        )


class Torchtune(Block):
    def add(self, width: int) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = self.heads, self.kv_heads, self.size
        self.q_proj = nn.Linear(width, self.heads * self.size)
        self.k_proj, self.v_proj = (nn.Linear(width, self.kv_heads * self.size) for _ in range(2))
        self.output_proj = nn.Linear(self.heads * self.size, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.output_proj(self.attend(*(t.unflatten(2, (-1, self.size)) for t in parts)))


class VitPytorch(Block):
    def add(self, width: int) -> None:
        self.to_qkv = nn.Linear(width, 3 * self.heads * self.size, bias=False)
        self.to_out = nn.Sequential(nn.Linear(self.heads * self.size, width), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(x).chunk(3, -1)
        return self.to_out(self.attend(*(t.unflatten(2, (self.heads, -1)) for t in parts)))


class XTransformers(Block):
    """Key-value head j serves the query heads j, j + n, j + 2n, ..."""

    def add(self, width: int) -> None:
        self.to_q = nn.Linear(width, self.heads * self.size, bias=False)
        self.to_k, self.to_v = (nn.Linear(width, self.kv_heads * self.size, bias=False) for _ in range(2))
        self.to_out = nn.Linear(self.heads * self.size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [p(x).unflatten(2, (-1, self.size)) for p in (self.to_q, self.to_k, self.to_v)]
        group = self.heads // self.kv_heads
        return self.to_out(self.attend(parts[0], *(t.repeat(1, 1, group, 1) for t in parts[1:])))


def in_package(cls: type[nn.Module], module: str, name: str) -> type[nn.Module]:
    return type(name, (cls,), {"__module__": module})


@pytest.mark.parametrize(
    ("cls", "module", "name", "sizes"),
    [
        (NanoGPT, "model", "CausalSelfAttention", {}),
        (Timm, "timm.layers.attention", "Attention", {}),
        (LitGPT, "litgpt.model", "CausalSelfAttention", {}),
        (LitGPT, "litgpt.model", "CausalSelfAttention", {"kv_heads": 2, "size": 12}),
        (LitGPT, "litgpt.model", "CausalSelfAttention", {"kv_heads": 1}),
        (Torchtune, "torchtune.modules.attention", "MultiHeadAttention", {"kv_heads": 2, "size": 12}),
        (VitPytorch, "vit_pytorch.vit", "Attention", {"size": 12}),
        (XTransformers, "x_transformers.x_transformers", "Attention", {"size": 12}),
        (XTransformers, "x_transformers.x_transformers", "Attention", {"kv_heads": 1}),
    ],
)
def test_copies_of_other_packages_are_placed(
    cls: type[nn.Module], module: str, name: str, sizes: dict[str, int]
) -> None:
    model = nn.Sequential(in_package(cls, module, name)(**sizes), in_package(cls, module, name)(**sizes))
    projections = assert_proven(model, torch.randn(2, 6, 32))
    assert labels(projections) == ["0", "1"]
    assert projections[1].num_heads == sizes.get("kv_heads", 4)


def test_layers_may_have_different_head_counts_and_sizes() -> None:
    model = nn.Sequential(Torchtune(4, 2, 8), Torchtune(6, 3, 4))
    projections = assert_proven(model, torch.randn(2, 5, 32))
    assert [(p.layer, p.num_heads, p.head_dim) for p in projections if p.block != "V"] == [
        (0, 4, 8),
        (0, 2, 8),
        (0, 4, 8),
        (1, 6, 4),
        (1, 3, 4),
        (1, 6, 4),
    ]


def test_frozen_blocks_are_placed_like_the_others() -> None:
    model = nn.Sequential(Torchtune(), Torchtune())
    model[0].requires_grad_(False)
    assert len(assert_proven(model, torch.randn(2, 5, 32))) == 8


def test_fused_projections_of_unknown_order_are_refused() -> None:
    unknown = in_package(Timm, "somewhere", "FusedAttention")
    with pytest.raises(ArchitectureError) as refusal:
        find_projections(nn.Sequential(unknown()))
    message = str(refusal.value)
    assert "Attention `0` (somewhere.FusedAttention) has an unknown layout" in message
    assert "`qkv` (32, 96), `proj` (32, 32) (inputs, outputs)" in message
    assert 'register_architecture("FusedAttention", lambda attention:' in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "the 32 features of `q_proj` do not divide into 5 equal parts"),
        ({"num_kv_heads": 3}, "`k_proj` has 32 rows, expected 3 key-value heads x 8 = 24"),
        ({"head_dim": 16}, "`q_proj` has 32 rows, expected 4 heads x 16 = 64"),
        ({"output_proj": nn.Linear(40, 32)}, "`output_proj` has 40 columns, expected 4 heads x 8"),
        ({"output_proj": nn.Identity()}, "has no output projection: expected one of o_proj"),
        ({"num_heads": None, "heads": None}, "the number of heads is unknown"),
    ],
)
def test_sizes_that_disagree_are_refused(change: dict[str, Any], message: str) -> None:
    attention = Torchtune()
    for name, value in change.items():
        setattr(attention, name, value)
    with pytest.raises(ArchitectureError, match=re.escape(message)):
        find_projections(nn.Sequential(attention))


@pytest.mark.parametrize(
    ("cls", "module", "name"),
    [
        (NanoGPT, "somewhere", "SelfAttention"),
        (NanoGPT, "somewhere", "Attention"),
        (Timm, "timm.models.nest", "Attention"),  # the features of a head lie heads apart
        (Timm, "timm.models.tiny_vit", "Attention"),  # query, key and value of each head lie together
        (VitPytorch, "somewhere", "Attention"),
        (Timm, "somewhere", "MHSA"),
    ],
)
def test_the_name_of_a_fused_projection_is_no_evidence_of_its_order(
    cls: type[nn.Module], module: str, name: str
) -> None:
    """Nor may such a layer be left out in silence because others could be placed."""
    with pytest.raises(ArchitectureError, match=rf"Attention `1` \({module}.{name}\) has an unknown layout"):
        find_projections(nn.Sequential(Torchtune(), in_package(cls, module, name)()))


@pytest.mark.parametrize("family", ["diffllama", "prophetnet", "doge"])
def test_heads_that_are_no_slices_are_refused_although_their_names_look_ordinary(family: str) -> None:
    settings = {**SPECIAL, "vocab_size": 64, "hidden_size": 32} if family == "prophetnet" else GROUPED
    if family == "prophetnet":
        sizes = dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4)
        settings |= {**sizes, "num_encoder_layers": 1, "num_decoder_layers": 1}
    with pytest.raises(ArchitectureError, match="has heads that are mixed with one another"):
        find_projections(build(family, **settings))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("talking_heads", nn.Conv2d(4, 4, 1)),
        ("pre_softmax_talking_heads", nn.Conv2d(4, 4, 1)),
        ("reattn_weights", nn.Parameter(torch.randn(4, 4))),
        ("lambda_q1", nn.Parameter(torch.randn(8))),
    ],
)
def test_a_part_that_mixes_heads_is_refused(name: str, part: nn.Module | nn.Parameter) -> None:
    attention = Torchtune()
    setattr(attention, name, None)
    assert len(find_projections(nn.Sequential(attention))) == 4
    setattr(attention, name, part)
    with pytest.raises(ArchitectureError, match="has heads that are mixed with one another"):
        find_projections(nn.Sequential(attention))


@pytest.mark.parametrize(
    "name", ["GatedLinearAttention", "DeltaNet", "MultiScaleRetention", "ChannelAttention"]
)
def test_attention_that_says_it_has_no_softmax_over_tokens_is_refused(name: str) -> None:
    with pytest.raises(ArchitectureError, match="has no softmax over tokens"):
        find_projections(nn.Sequential(in_package(Torchtune, "somewhere", name)()))


def test_attention_whose_processor_has_no_softmax_is_refused() -> None:
    attention = XTransformers()
    attention.processor = type("SanaLinearAttnProcessor2_0", (), {})()
    with pytest.raises(ArchitectureError, match="has no softmax over tokens"):
        find_projections(nn.Sequential(attention))


def test_weights_that_are_used_without_their_module_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="uses without calling its projections, so that no gradient"):
        find_projections(build("wavlm", **{**PLAIN, "num_conv_pos_embedding_groups": 2}))


def test_key_value_heads_that_serve_every_nth_query_head_are_refused() -> None:
    model = nn.Sequential(in_package(XTransformers, "x_transformers.x_transformers", "Attention")(kv_heads=2))
    message = "each of 2 key-value heads serves every 2th query head, expected 2 query heads in a row"
    with pytest.raises(ArchitectureError, match=message):
        find_projections(model)
    unnoticed = nn.Sequential(XTransformers(kv_heads=2))
    failures = {str(cell) for cell in verify_projections(unnoticed, torch.randn(2, 5, 32)).failures}
    assert "L0 H0 K (`0`): moves heads 0, 2 instead of heads 0, 1" in failures


def test_what_the_module_says_of_its_groups_counts_more_than_the_config() -> None:
    model = build("llama", **GROUPED)
    attention = model.layers[1].self_attn
    attention.k_proj, attention.v_proj = nn.Linear(32, 32), nn.Linear(32, 32)
    with pytest.raises(ArchitectureError, match="`k_proj` has 32 rows, expected 2 key-value heads"):
        find_projections(model)
    attention.num_key_value_groups = 1
    assert blocks_of(assert_proven(model, {"input_ids": TOKENS})) == ["QK2VO", "QK4VO"]


def test_linear_attention_that_borrows_the_names_is_passed_over() -> None:
    mixer = Torchtune()
    mixer.conv1d = nn.Conv1d(32, 32, 4)
    assert labels(find_projections(nn.Sequential(mixer, Torchtune()))) == ["1"]


def test_linear_attention_of_a_known_hybrid_is_passed_over() -> None:
    layer_types = ["linear_attention", "full_attention"]
    model = build("minimax", **GROUPED_12, **EXPERTS, layer_types=layer_types, block_size=4)
    assert labels(assert_proven(model, {"input_ids": TOKENS})) == ["layers.1.self_attn"]


def test_softmax_attention_of_a_hybrid_may_be_named_after_its_linear_one() -> None:
    settings = {**LATENT, "q_lora_rank": None, "layer_types": ["full_attention"] * 2}
    model = build("kimi_linear", **settings)
    assert type(model.layers[1].self_attn).__name__ == "KimiLinearAttention"
    assert len(labels(assert_proven(model, {"input_ids": TOKENS}))) == 2


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"No attention layer was found in Sequential.*q_proj/k_proj"):
        find_projections(nn.Sequential(nn.Linear(4, 4)))


@pytest.fixture
def forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_registered", {})


@pytest.mark.usefixtures("forget_registrations")
def test_the_line_in_the_refusal_works_when_it_is_followed_and_the_proof_tells_whether_it_is_right() -> None:
    class PerHead(Timm):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.attend(*self.qkv(x).unflatten(2, (self.heads, -1)).chunk(3, -1)))

    for cls, right in ((Timm, True), (PerHead, False)):
        model = nn.Sequential(in_package(cls, "somewhere", f"{cls.__name__}Fused")())
        with pytest.raises(ArchitectureError) as refusal:
            find_projections(model)
        line = str(refusal.value)[str(refusal.value).index("register_architecture(") :]
        exec(line, {"register_architecture": register_architecture, "contiguous_heads": contiguous_heads})
        assert verify_projections(model, torch.randn(2, 5, 32)).passed == right


@pytest.mark.usefixtures("forget_registrations")
def test_the_line_for_mixed_heads_leaves_them_out() -> None:
    attention = in_package(Torchtune, "somewhere", "TalkingHeads")()
    attention.talking_heads = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(attention, Torchtune())
    with pytest.raises(ArchitectureError) as refusal:
        find_projections(model)
    line = str(refusal.value)[str(refusal.value).index("register_architecture(") :]
    exec(line, {"register_architecture": register_architecture})
    assert labels(find_projections(model)) == ["1"]


@pytest.mark.usefixtures("forget_registrations")
def test_a_registered_family_is_placed_and_can_be_proven() -> None:
    unknown = in_package(Timm, "somewhere", "FusedAttention")

    def heads(attention: nn.Module) -> dict[Any, tuple[str, Tensor]]:
        query, key, value = contiguous_heads(12, 8).split(4)
        return {"Q": ("qkv", query), "K": ("qkv", key), "V": ("qkv", value), "O": ("proj", query)}

    register_architecture("FusedAttention", heads)
    assert len(assert_proven(nn.Sequential(unknown()), torch.randn(2, 5, 32))) == 4
    register_architecture("FusedAttention", lambda _: {})
    assert labels(find_projections(nn.Sequential(unknown(), Torchtune()))) == ["1"]
