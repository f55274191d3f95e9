"""A model in the exact shape of Qwen3-0.6B, randomly initialised, trains on two texts and shows its heatmap.

28 layers, 16 query heads and 8 key/value heads of 128 features, 176 million attention weights. Needs
transformers, and about 6 GB of memory: python examples/full_size.py

With --probe (on Linux), fixed samples are measured at the initial weights instead, and the time is compared
with that of forward and backward passes over the same samples. In 12 GiB, all layers are swept at once, the
upper ones in four passes; with less, some layers at a time; with 14.5, all in three passes:
python examples/full_size.py --probe --replicates linear --max-memory-gb 12
"""

import argparse
import itertools
import logging
import random
import resource
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from byte_model import code, prose
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM

from qkov_lightning import InterferenceMonitor, ScoreSettings, probe_interference
from qkov_lightning.views.figures import heatmap_figure

SHAPE = Qwen3Config(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


def qwen3_8b() -> Qwen3ForCausalLM:
    """The shape of Qwen3-8B without weights, to be costed: qkov inspect full_size:qwen3_8b."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


class LanguageModel(LightningModule):
    """Next-token prediction; bytes serve as tokens."""

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = Qwen3ForCausalLM(SHAPE)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        text = batch["bytes"]
        logits = self.model(input_ids=text[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)  # no state: memory is for the model


class Stopwatch(Callback):
    """Seconds of every training step and of the measurement. Comes after the monitor."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self._elapsed())
        self._start()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.measurement = self._elapsed()

    def _start(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def _elapsed(self) -> str:
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        return f"{wall:.1f} s ({processor:.1f} s of processor time)"


def samples(num_samples: int, num_tokens: int) -> list[dict]:
    """Windows of prose and code, in turn."""
    generator = random.Random(0)
    texts = {"prose": prose(), "code": code()}
    result = []
    for _, task in zip(range(num_samples), itertools.cycle(texts), strict=False):
        name, text = generator.choice(list(texts[task].items()))
        start = generator.randrange(len(text) - num_tokens - 1)
        window = text.encode()[start : start + num_tokens + 1]
        result.append({"bytes": torch.tensor(list(window)), "task": task, "sample_id": f"{name}@{start}"})
    return result


def probe(arguments: argparse.Namespace) -> None:
    """Measure a probe, and compare its time with that of forward and backward passes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if arguments.precision == "bf16-true" else torch.float32)
    model = LanguageModel()
    model.configure_model()
    torch.set_default_dtype(before)
    windows = samples(2 * arguments.samples, arguments.tokens)
    loader = DataLoader(windows, arguments.batch_size)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)

    def passes(batches: Iterable[dict]) -> tuple[float, float]:
        """Seconds of forward and backward passes."""
        watch = time.perf_counter(), time.process_time()
        for batch in batches:
            model.training_step(batch, 0).backward()
            model.zero_grad()
        return time.perf_counter() - watch[0], time.process_time() - watch[1]

    before = passes(loader)
    print(f"forward and backward over {len(windows)} x {arguments.tokens} tokens: {before[0]:.1f} s "
          f"({before[1]:.1f} s of processor time)", flush=True)  # fmt: skip
    # Linux counts the peak of memory anew.
    Path("/proc/self/clear_refs").write_text("5")
    watch = time.perf_counter(), time.process_time()
    heatmap = probe_interference(
        model,
        loader,
        settings=ScoreSettings(num_hot_cells=arguments.num_hot_cells),
        max_memory_gb=arguments.max_memory_gb,
        replicates=arguments.replicates,
    )
    took = time.perf_counter() - watch[0], time.process_time() - watch[1]
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    print(f"streamed probe: {took[0]:.1f} s ({took[1]:.1f} s of processor time), {took[0] / before[0]:.2f} "
          f"({took[1] / before[1]:.2f}) times as long; peak memory {int(line.split()[1]) / 2**20:.1f} GiB; "
          f"{heatmap.notes['replicates']} replicates, {len(heatmap.pairs)} sample pairs", flush=True)  # fmt: skip
    some = list(itertools.islice(loader, max(1, len(loader) // 8)))
    after = passes(some)
    share = len(some) / len(loader)
    print(f"forward and backward in memory that the allocator kept of the probe, from an eighth of the samples: "
          f"{after[0] / share:.1f} s ({after[1] / share:.1f} s)")  # fmt: skip
    for a, b in heatmap.task_pairs:
        worst = heatmap.cells(a, b, "loss_rise")[0]
        print(f"{b} on {a}: loss_rise of {worst.name} {worst.value:.2e} ± {worst.standard_error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="samples of each task")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--storage", choices=["factors", "summed", "sampled"], default="factors")
    parser.add_argument(
        "--precision", default="bf16-true", help="of the weights, as in Trainer(precision=...)"
    )
    parser.add_argument("--probe", action="store_true", help="measure fixed samples, without training")
    parser.add_argument("--layers", type=int, default=28, help="of the model")
    parser.add_argument("--vocabulary", type=int, default=SHAPE.vocab_size, help="of the model")
    parser.add_argument("--max-memory-gb", type=float, default=4.0, help="for sums")
    parser.add_argument(
        "--replicates", choices=["auto", "exact", "linear"], default="auto", help="of the probe"
    )
    parser.add_argument("--num-hot-cells", type=int, default=3, help="whose sample pairs are searched")
    parser.add_argument("--figure", type=Path, help="where to save the heatmap")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    SHAPE.num_hidden_layers, SHAPE.vocab_size = arguments.layers, arguments.vocabulary
    SHAPE.layer_types = SHAPE.layer_types[: arguments.layers]
    seed_everything(0, verbose=False)
    if arguments.probe:
        probe(arguments)
        return
    monitor = InterferenceMonitor(
        every_n_steps=1,
        num_hot_cells=3,
        storage=arguments.storage,
        max_memory_gb=arguments.max_memory_gb,
        max_cache_gb=64,
    )
    stopwatch = Stopwatch()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", precision=arguments.precision, logger=False, callbacks=[monitor, stopwatch],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir="runs/full_size",
    )  # fmt: skip
    model = LanguageModel()
    windows = samples(2 * arguments.samples, arguments.tokens)
    trainer.fit(model, DataLoader(windows, arguments.batch_size))

    heatmap = monitor.heatmap
    files = list(Path(monitor.state_dict()["cache"]).glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million weights, {arguments.precision}, storage: {arguments.storage}"
    )
    print(f"last of {len(stopwatch.steps)} training steps, {arguments.batch_size} x {arguments.tokens} tokens, captured: "
          f"{stopwatch.steps[-1]}")  # fmt: skip
    print(f"heatmap over {len(windows)} samples, drawn and saved: {stopwatch.measurement}")
    print(f"cache: {num_bytes / len(windows) / 1e6:.2f} MB a sample")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    for a, b in heatmap.task_pairs:
        summary = heatmap.summary(a, b, "relative")
        values, errors = heatmap.values(a, b, "relative"), heatmap.errors(a, b, "relative")
        means = ", ".join(f"{block} {mean:.3f}" for block, mean in summary["block_means"].items())
        hottest = heatmap.cells(a, b, "relative")[0]
        print(f"{b} pushes on {a}: {summary['heatmap_shape']['Q']} x 4 cells, mean relative score {means}; "
              f"hottest {hottest.name} {hottest.value:.2f} ± {hottest.standard_error:.2f}; "
              f"median standard error {(errors / values).nanmedian():.0%} of the value")  # fmt: skip
    print(f"strongest pair: {heatmap.pairs[0]}")
    if arguments.figure:
        heatmap_figure(heatmap, *heatmap.task_pairs[0], "relative").savefig(arguments.figure, dpi=100)


if __name__ == "__main__":
    main()
