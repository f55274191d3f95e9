"""Heads of a model of TransformerLens, found from one batch: no name and no config says where they are.

Up to TransformerLens 3, a ``HookedTransformer`` holds its weights as parameters,
``W_Q[head, d_model, d_head]``; from 3 on, a ``TransformerBridge`` wraps a model of Hugging Face. Both train
with the monitor like any other model:

    pip install transformer-lens
    python examples/transformer_lens_model.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformer_lens
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from qkov_lightning import InterferenceMonitor

VOCABULARY, TOKENS = 30, 12
TASKS = ("copy", "reverse")


def has_hooked() -> bool:
    """Whether this version has a HookedTransformer."""
    try:
        return transformer_lens.HookedTransformer is not None
    except (ImportError, AttributeError):
        return False


def hooked() -> nn.Module:
    """A small model of random weights, as TransformerLens up to 3 builds it."""
    return transformer_lens.HookedTransformer(
        transformer_lens.HookedTransformerConfig(
            n_layers=2,
            d_model=32,
            n_ctx=TOKENS,
            d_head=8,
            n_heads=4,
            d_vocab=VOCABULARY,
            act_fn="gelu",
            seed=0,
        )
    )


def bridged() -> nn.Module:
    """A small GPT-2 of random weights behind the interface of TransformerLens from 3 on."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=4, n_positions=TOKENS, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    folder = tempfile.mkdtemp()  # the bridge reads it once more
    special = {"bos_token": "0", "eos_token": "1", "pad_token": "1"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    return TransformerBridge.boot_transformers(
        "gpt2", hf_model=GPT2LMHeadModel(config), tokenizer=tokenizer, device="cpu"
    )


class Language(LightningModule):
    """Next-token prediction; a sample's own loss is the mean over its tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits = self.network(batch["tokens"][:, :-1])
        return functional.cross_entropy(logits.transpose(1, 2), batch["tokens"][:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def samples() -> list[dict[str, Any]]:
    """Half of the sequences repeat themselves, half of them come back in reverse."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(2, VOCABULARY, (64, TOKENS // 2), generator=generator)
    second = [half if i % 2 == 0 else half.flip(0) for i, half in enumerate(first)]
    return [
        {"tokens": torch.cat([a, b]), "task": TASKS[i % 2]}
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def main(folder: str = "runs/transformer_lens", network: nn.Module | None = None) -> InterferenceMonitor:
    monitor = InterferenceMonitor(every_n_steps=1)
    trainer = Trainer(
        max_epochs=2,
        callbacks=[monitor],
        default_root_dir=folder,
        accelerator="cpu",
        enable_checkpointing=False,
    )
    network = network or (hooked() if has_hooked() else bridged())
    trainer.fit(Language(network), DataLoader(samples(), batch_size=8))
    return monitor


if __name__ == "__main__":
    main()
