"""Randomly initialised models in the shapes of known ones, with a small vocabulary by default.

Nothing is captured there.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 512
TASKS = ("math", "code")


def gpt2(num_layers: int = 12, vocabulary: int = VOCABULARY) -> nn.Module:
    """GPT-2 small, whose own vocabulary is 50,257."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_layer=num_layers, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def qwen3(
    num_layers: int = 4,
    hidden: int = 1024,
    intermediate: int = 3072,
    num_heads: int = 16,
    num_kv_heads: int = 8,
    head_dim: int = 128,
) -> nn.Module:
    """A slice of Qwen3-0.6B by default; hidden=2048 and intermediate=6144 are those of Qwen3-1.7B."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, num_hidden_layers=num_layers, hidden_size=hidden, intermediate_size=intermediate,
            num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim, tie_word_embeddings=True,
        )
    )  # fmt: skip


def batch_of(num_samples: int, num_tokens: int = 128) -> dict:
    """Random tokens; the tasks take turns."""
    return {
        "tokens": torch.randint(VOCABULARY, (num_samples, num_tokens + 1)),
        "task": [TASKS[index % len(TASKS)] for index in range(num_samples)],
    }


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class LanguageModel(LightningModule):
    """Next-token prediction with plain SGD, the shortest step that there is to compare with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch["tokens"])

    def on_train_batch_end(self, outputs: object, batch: dict, batch_idx: int) -> None:
        self.zero_grad()  # the models that train in turn need the memory

    def validation_step(self, batch: object, batch_idx: int) -> None:
        """Never called, but without it Lightning would drop the validation loader."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)
