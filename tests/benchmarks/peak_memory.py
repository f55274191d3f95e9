"""Prints the peak of resident memory, in bytes, of a process that does one thing.

python peak_memory.py train EVERY_N_STEPS     (0: without the monitor)
python peak_memory.py beside PEER            (a key of peers.PEERS)
python peak_memory.py validate FOLDER NUM_SAMPLES STORAGE
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from caches import measured, written_cache
from lightning.pytorch import Callback
from peers import PEERS
from shapes import LanguageModel, batch_of, gpt2, qwen3
from trainees import Trainee

from qkov_lightning import InterferenceMonitor


def peak() -> int:
    # Not `getrusage`: that counts the process that this one was forked from.
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def train(every_n_steps: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        every = int(every_n_steps)
        return _trained(
            folder, *([InterferenceMonitor(every_n_steps=every, storage="exact")] if every else [])
        )


def beside(peer: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return _trained(folder, PEERS[peer][1](Path(folder) / "store"))


def _trained(folder: str, *callbacks: Callback) -> int:
    trainee = Trainee(LanguageModel(gpt2(vocabulary=50_257)), Path(folder), *callbacks)
    for _ in range(12):
        trainee.step(batch_of(2))
    trainee.stop()
    return peak()


def validate(folder: str, num_samples: str, storage: str) -> int:
    """What the pass adds to a process that has trained on the samples."""
    model = qwen3(num_layers=1, hidden=256, intermediate=256)
    cache = written_cache(model, [batch_of(8) for _ in range(int(num_samples) // 8)], Path(folder), storage)
    before = peak()
    measured(cache, model)
    return peak() - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    print({"train": train, "beside": beside, "validate": validate}[sys.argv[1]](*sys.argv[2:]))
