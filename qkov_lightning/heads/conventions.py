"""How attention modules name and order their projections: what cannot be known from shapes.

One row per convention. Separate projections are recognised by name. The order inside a fused projection shows
neither in names nor in shapes, so each row lists the classes that use it.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from qkov_lightning.heads.projections import contiguous_heads

Placement = Callable[[int, int, int], tuple[Tensor, Tensor, Tensor]]
"""From query heads, key-value heads and head size to the features of the Q, K and V heads."""

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("to_queries", "to_keys", "to_values"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_linear", "k_linear", "v_linear"),
    ("c_q", "c_k", "c_v"),
    ("Wq", "Wk", "Wv"),
    ("W_q", "W_k", "W_v"),
    ("w_q", "w_k", "w_v"),
)
OUTPUT = (
    "o_proj",
    "out_proj",
    "wo",
    "Wo",
    "out_lin",
    "output_proj",
    "c_proj",
    "dense",
    "proj",
    "projection",
    "projection_layer",
    "o",
    "to_out",
    "to_out.0",
    "linear_out",
    "W_o",
    "w_o",
    "output",
    "output.dense",
)

NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "n_local_heads")
NUM_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "kv_heads",
    "n_query_groups",
    "n_kv_head",
)
QUERY_GROUP = ("num_key_value_groups",)
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head")


def in_blocks(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q0 q1 .. k0 k1 .. v0 v1 ..``."""
    keys = num_heads * head_dim
    values = keys + num_kv_heads * head_dim
    return (
        contiguous_heads(num_heads, head_dim),
        contiguous_heads(num_kv_heads, head_dim, keys),
        contiguous_heads(num_kv_heads, head_dim, values),
    )


def in_groups(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q0 q1 k0 v0 q2 q3 k1 v1 ..``: query heads, then the key and value head that they share."""
    group = num_heads // num_kv_heads
    pieces = contiguous_heads(num_kv_heads * (group + 2), head_dim).view(num_kv_heads, group + 2, head_dim)
    return pieces[:, :group].flatten(0, 1), pieces[:, group], pieces[:, group + 1]


def in_four_shards(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q.. v.. k..`` in each of four shards of the heads."""
    pieces = contiguous_heads(2 * num_kv_heads + num_heads, head_dim).view(4, 3, num_heads // 4, head_dim)
    query, value, key = (pieces[:, i].reshape(num_heads, head_dim) for i in range(3))
    return query, key, value


FUSED: tuple[tuple[Placement, tuple[str, ...]], ...] = (
    (
        in_groups,
        (
            "transformers.*.GPTBigCodeAttention.c_attn",
            "transformers.*.GPTNeoXAttention.query_key_value",
            "transformers.*.BloomAttention.query_key_value",
            "transformers.*.PersimmonAttention.query_key_value",
            "transformers.*.FalconAttention.query_key_value",
            "transformers.*.DisentangledSelfAttention.in_proj",
            "transformers.*.GPTNeoXJapaneseAttention.query_key_value",
        ),
    ),
    (in_four_shards, ("transformers.*.CodeGenAttention.qkv_proj",)),
    (
        in_blocks,
        (
            "*.CausalSelfAttention.c_attn",  # nanoGPT, which people copy into modules of their own
            "*.QWenAttention.c_attn",
            "*GPT2Attention.c_attn",
            "transformers.*.ImageGPTAttention.c_attn",
            "transformers.*.Attention.c_attn",  # of the first GPT
            "transformers.*.BarkSelfAttention.att_proj",
            "transformers.*.MptAttention.Wqkv",
            "transformers.*.DbrxAttention.Wqkv",
            "transformers.*.ModernBertAttention.Wqkv",
            "transformers.*.Phi3Attention.qkv_proj",
            "transformers.*.Phi4MultimodalAttention.qkv_proj",
            "transformers.*VisionAttention.qkv",
            "transformers.*Blip*Attention.qkv",
            "transformers.*RecAttention.qkv",
            "transformers.*.MgpstrAttention.qkv",
            "transformers.*.SegGptAttention.qkv",
            "transformers.*.VitDetAttention.qkv",
            "transformers.*.TimesformerSelfAttention.qkv",
            "transformers.*.HieraMaskUnitAttention.qkv",
            "transformers.*.Sam2*MultiScaleAttention.qkv",
            "timm.layers.attention.Attention*.qkv",
            "timm.models.vision_transformer*.Attention.qkv",
            "timm.models.crossvit.Attention.qkv",
            "timm.models.fastvit.Attention.qkv",
            "timm.models.metaformer.Attention.qkv",
            "timm.models.swin_transformer.WindowAttention.qkv",
            "litgpt.*.CausalSelfAttention.qkv",
            "vit_pytorch.*.Attention.to_qkv",
        ),
    ),
)
"""Conventions for fused projections: full names of the classes that follow them, and of the module."""

FUSED_NAMES = ("qkv", "Wqkv", "to_qkv", "qkv_proj", "c_attn", "query_key_value", "wqkv", "W_pack")
"""Names that say a projection is fused, whatever the class around it is called."""

KEYS_THEN_VALUES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("to_q", "to_kv", ("transformers.*.GraniteSpeech*Attention",)),
)
"""Queries of their own, and a projection ``k0 k1 .. v0 v1 ..``: names, and full names of the classes."""

GATED_QUERY = (
    "transformers.*.Qwen3NextAttention",
    "transformers.*.Qwen3_5Attention",
    "transformers.*.Qwen3_5MoeAttention",
)
"""Attention whose query projection holds, for each head, the query and then a gate of the same size."""

LATENT = "kv_b_proj"
"""Multi-head latent attention (DeepSeek): expands the latent to ``k0 v0 k1 v1 ..``."""

LATENT_QUERIES = ("q_b_proj", "q_proj")

TILED_GROUPS = ("x_transformers.*",)
"""Grouped-query attention whose key-value head j serves the query heads j, j + n, j + 2n, ..."""

BORROWS_KEYS_AND_VALUES = "is_kv_shared_layer"
"""True of attention that takes keys and values from an earlier layer, and has only queries and output."""

NOT_SOFTMAX = ("conv1d", "q_conv1d", "A_log", "dt_bias", "igate_preact")
"""Parts of state-space and linear-attention mixers, which name their projections as attention does."""

LINEAR_ATTENTION = ("transformers.*.MiniMaxLightningAttention",)
"""Linear attention without such parts."""

LANDMARKS = ("transformers.*.NystromformerSelfAttention",)
"""Attention over landmarks, or over tokens where there are as many of these."""

MIXES_HEADS = (
    "talking_head*",
    "pre_*talking_heads",
    "post_*talking_heads",
    "proj_l",
    "reattn_weights",
    "mix_heads_*",
    "lambda_q*",
)
"""Parts of attention whose heads are mixed with one another: no slice belongs to one head alone."""

REFUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "heads that are mixed with one another",
        (
            "transformers.*.DiffLlamaAttention",
            "transformers.*.DogeAttention",
            "transformers.*.ProphetNetNgramSelfAttention",
        ),
    ),
    (
        "no softmax over tokens",
        (
            "transformers.*.GroupViTAssignAttention",
            "transformers.*.MraSelfAttention",
            "transformers.*.YosoSelfAttention",
            "*.*LinearAttention",
            "*.*LinearAttn*",
            "*.*LightningAttention*",
            "*.*DeltaNet",
            "*.*Retention",
            "*.*ChannelAttention",
            "*.XCA",
        ),
    ),
    (
        "projections that return more than one tensor",
        ("transformers.*.IBertSelfAttention",),
    ),
    (
        "weights that it uses without calling its projections, so that no gradient can be captured,",
        (
            "transformers.*.WavLMAttention",
            "fairseq.*.MultiheadAttention",
            "open_clip.*.AttentionPool2d",
            "clip.*.AttentionPool2d",
        ),
    ),
)
"""Attention that is no head map although its names look ordinary: why, and which classes."""


def refusal(module: nn.Module) -> str | None:
    """Why an attention module is refused whatever the names of its parts, or None."""
    if follows(module, LANDMARKS) and getattr(module, "num_landmarks", 0) != getattr(module, "seq_len", 0):
        return "softmaxes over landmarks in place of one over tokens"
    for reason, classes in REFUSED:
        # In diffusers a processor does the arithmetic of an attention module.
        if follows(module, classes) or follows(getattr(module, "processor", None), classes):
            return reason
    parts = [name for name, _ in module.named_modules()] + [name for name, _ in module.named_parameters()]
    if any(fnmatchcase(part.rpartition(".")[2], mixing) for part in parts for mixing in MIXES_HEADS):
        return REFUSED[0][0]
    return None


def follows(module: object, patterns: tuple[str, ...], leaf: str = "") -> bool:
    """Whether an object's class, or one that it inherits from, is among patterns of full names."""
    names = [f"{cls.__module__}.{cls.__name__}{leaf}" for cls in type(module).__mro__]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
