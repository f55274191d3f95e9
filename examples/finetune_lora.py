"""Fine-tune a causal language model with LoRA on prose and code, and see in which heads the two interfere.

Needs transformers and peft: python examples/finetune_lora.py --model Qwen/Qwen3-0.6B
"""

from byte_model import code, prose
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, optim
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from qkov_lightning import InterferenceMonitor
from qkov_lightning.views.screen import screen


class LoraFinetuning(LightningModule):
    """Adapters on all four attention projections; everything else stays frozen."""

    def __init__(self, model: str, learning_rate: float) -> None:
        super().__init__()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).train()
        self.learning_rate = learning_rate

    def loss(self, batch: dict) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        return self.model(**inputs).loss

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch["task"]))

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW((p for p in self.parameters() if p.requires_grad), self.learning_rate)


def cut(texts: dict[str, str], task: str, num_samples: int) -> list[dict]:
    """The beginning of each text in turn, then the next part of each, until there are enough samples."""
    parts = [
        {"text": text[at : at + 600], "task": task, "sample_id": f"{name}@{at}"}
        for at in range(0, max(map(len, texts.values())), 600)
        for name, text in texts.items()
        if at < len(text)
    ]
    return parts[:num_samples]


def collate(samples: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    """A padded batch, whose loss is a mean over tokens."""
    texts = [sample["text"] for sample in samples]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {
        **batch,
        "labels": labels,
        "num_target_tokens": (labels[:, 1:] != -100).sum(dim=1),
        "task": [sample["task"] for sample in samples],
        "sample_id": [sample["sample_id"] for sample in samples],
    }


def main(
    model: str = "Qwen/Qwen3-0.6B",
    samples_per_task: int = 400,
    max_length: int = 128,
    batch_size: int = 4,
    max_epochs: int = 2,
    learning_rate: float = 2e-4,
    precision: str = "bf16-mixed",
) -> None:
    """Fine-tune a model.

    Args:
        model: Name on the Hugging Face Hub, or a local folder.
        samples_per_task: Samples of each task, a tenth of them for validation.
        max_length: Tokens of a sample; the gradient cache grows with them.
        batch_size: Samples of a batch, both tasks mixed.
        max_epochs: Passes over the samples; a heatmap after each.
        learning_rate: Of the adapters.
        precision: As in the Trainer.
    """
    seed_everything(0, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    samples = [*cut(prose(), "prose", samples_per_task), *cut(code(), "code", samples_per_task)]

    def loader(part: list[dict], shuffle: bool) -> DataLoader:
        return DataLoader(
            part, batch_size, shuffle, collate_fn=lambda batch: collate(batch, tokenizer, max_length)
        )

    # At 128 tokens a sample of Qwen3-0.6B takes 56 MiB in bfloat16 (`qkov inspect` tells): 64 of them fit.
    monitor = InterferenceMonitor(loss_reduction="token_mean", max_samples_per_task=32)
    trainer = Trainer(max_epochs=max_epochs, precision=precision, callbacks=[monitor])
    trainer.fit(
        LoraFinetuning(model, learning_rate),
        loader([sample for i, sample in enumerate(samples) if i % 10], shuffle=True),
        loader(samples[::10], shuffle=False),
    )
    Console().print(screen(monitor.heatmap, str(monitor.results)))


if __name__ == "__main__":
    auto_cli(main)
