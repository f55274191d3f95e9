"""Tiny models that expose mistakes.

Every head different, head sizes that are not width // heads, odd layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkov_lightning.heads.projections import BLOCKS, Projection, contiguous_heads


class GroupedAttention(nn.Module):
    """Grouped-query attention with a head size that is not width // heads, and another one for values."""

    def __init__(
        self,
        width: int = 10,
        heads: int = 4,
        kv_heads: int = 2,
        size: int = 3,
        value_size: int = 5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = heads, kv_heads
        self.q_proj = nn.Linear(width, heads * size, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * value_size, bias=bias)
        self.o_proj = nn.Linear(heads * value_size, width, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = (
            project(x)
            .unflatten(-1, (self.num_kv_heads, -1))
            .transpose(1, 2)
            .repeat_interleave(self.num_heads // self.num_kv_heads, 1)
            for project in (self.k_proj, self.v_proj)
        )
        logits = query @ key.transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
        return self.o_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Conv1D(nn.Module):
    """A linear layer whose weight has its inputs first, as in GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class CausalSelfAttention(nn.Module):
    """One projection for query, key and value, transposed or not; named as in nanoGPT."""

    def __init__(self, width: int = 12, heads: int = 3, conv: bool = True) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn = Conv1D(3 * width, width) if conv else nn.Linear(width, 3 * width)
        self.c_proj = Conv1D(width, width) if conv else nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(context.transpose(1, 2).flatten(2))


class Classifier(nn.Module):
    """Attention layers with residuals, then the mean over tokens, then class scores."""

    def __init__(
        self, attentions: list[nn.Module], width: int, classes: int = 5, vocabulary: int = 11
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(attentions)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(x + (layer(x) if mask is None else layer(x, mask)))
        if mask is None:
            return self.head(x.mean(dim=1))
        return self.head((x * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True))


def projections_of(
    module_name: str, heads: int, kv_heads: int, size: int, value_size: int, layer: int = 0
) -> list[Projection]:
    """Head map of a ``GroupedAttention``, written down by hand."""
    maps = {
        "Q": ("q_proj", contiguous_heads(heads, size), 1),
        "K": ("k_proj", contiguous_heads(kv_heads, size), heads // kv_heads),
        "V": ("v_proj", contiguous_heads(kv_heads, value_size), heads // kv_heads),
        "O": ("o_proj", contiguous_heads(heads, value_size), 1),
    }
    return [
        Projection(
            f"{module_name}.{maps[block][0]}", layer, module_name, block, maps[block][1], maps[block][2]
        )
        for block in BLOCKS
    ]
