"""How attention modules name and order their projections: what cannot be known from shapes.

One row per convention. Separate projections are told by their names; the order of the pieces of a FUSED one is
told by nothing but who wrote it, so each row lists the classes that follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from qkov_lightning.projections import contiguous_heads

Placement = Callable[[int, int, int], tuple[Tensor, Tensor, Tensor]]
"""From query heads, key-value heads and head size to the features of the Q, K and V heads."""

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
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
    "o",
    "output.dense",
)

NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_query_groups")
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


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
            "transformers.GPTBigCodeAttention.c_attn",
            "transformers.GPTNeoXAttention.query_key_value",
            "transformers.BloomAttention.query_key_value",
            "transformers.PersimmonAttention.query_key_value",
            "transformers.FalconAttention.query_key_value",
            "transformers.DisentangledSelfAttention.in_proj",
        ),
    ),
    (in_four_shards, ("transformers.CodeGenAttention.qkv_proj",)),
    (
        in_blocks,
        (
            "*.c_attn",
            "transformers.MptAttention.Wqkv",
            "transformers.DbrxAttention.Wqkv",
            "transformers.ModernBertAttention.Wqkv",
            "transformers.Phi3Attention.qkv_proj",
            "timm.Attention.qkv",
            "litgpt.CausalSelfAttention.qkv",
        ),
    ),
)
"""Conventions for fused projections, and who follows them: package, class and module name."""

GATED_QUERY = (
    "transformers.Qwen3NextAttention",
    "transformers.Qwen3_5Attention",
    "transformers.Qwen3_5MoeAttention",
)
"""Attention whose query projection holds, for each head, the query and then a gate of the same size."""

LATENT = "kv_b_proj"
"""Multi-head latent attention (DeepSeek): expands the latent to ``k0 v0 k1 v1 ..``."""

LATENT_QUERIES = ("q_b_proj", "q_proj")

NOT_SOFTMAX = ("conv1d", "q_conv1d", "A_log", "dt_bias", "dt_proj")
"""Parts of state-space and linear-attention mixers, which name their projections as attention does."""

MIXED_HEADS = ("transformers.DiffLlamaAttention", "transformers.ProphetNetNgramSelfAttention")
"""Attention whose names look ordinary, but whose heads are no slices: heads are subtracted, or streams mixed."""


def follows(module: nn.Module, patterns: tuple[str, ...], leaf: str = "") -> bool:
    """Whether a module's class, or one that it inherits from, is among ``package.Class`` patterns."""
    names = [f"{cls.__module__.partition('.')[0]}.{cls.__name__}{leaf}" for cls in type(module).__mro__]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
