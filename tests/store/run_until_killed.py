"""Started by test_interruption.py in a fresh process: trains in children that are killed at random moments.

Children are forked, so that a restart costs no second of imports.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Module, loader, trainer
from versions import WHOLE_CHECKPOINT

import qkov_lightning.views.loggers
from qkov_lightning import GradientCache, InterferenceMonitor
from qkov_lightning.store.run import Storage

EPOCHS = 12


def train(root: Path, cache: Path, storage: Storage) -> None:
    """Go on from the newest checkpoint that is whole."""
    checkpoints = sorted((root / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    while checkpoints and not _is_whole(checkpoints[-1]):
        checkpoints.pop().unlink()
    monitor = InterferenceMonitor(every_n_steps=1, max_samples_per_task=9, cache_dir=cache, storage=storage)
    keep = ModelCheckpoint(root / "checkpoints", filename="{epoch}", save_top_k=-1)
    fit = trainer(root, monitor, keep, max_epochs=EPOCHS, enable_checkpointing=True)
    torch.manual_seed(0)
    fit.fit(
        Module(),
        loader(24, ids=False),
        loader(4),
        ckpt_path=checkpoints[-1] if checkpoints else None,
        **WHOLE_CHECKPOINT,
    )


def _is_whole(path: Path) -> bool:
    try:
        torch.load(path, weights_only=False)
    except Exception:  # whatever a half-written file raises
        return False
    return True


def main(root: Path, kills: int, storage: Storage) -> None:
    warnings.simplefilter("ignore")
    # Drawing is not what is tested here, and takes most of the time.
    qkov_lightning.views.loggers.render = lambda _: np.zeros((4, 4, 3), dtype=np.uint8)
    qkov_lightning.views.loggers.heatmap_figure = lambda *_: None
    generator, killed, finished = random.Random(0), 0, 0
    while killed < kills or not finished:
        run = root / f"run-{finished}"
        child = os.fork()
        if child == 0:
            train(run, run / "cache", storage)
            os._exit(0)
        if killed < kills:
            time.sleep(generator.uniform(0.0, 0.7))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status) == 0:
            finished += 1
        else:
            sys.exit("a restart failed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a record that is not whole would warn
            for directory in (run / "cache").glob("*"):
                for record, _ in GradientCache(directory, max_samples_per_task=9, rank=999).records():
                    for name in record.modules:
                        record.read(name)
    print(f"killed {killed}, finished {finished}")


if __name__ == "__main__":
    if sys.argv[2] == "0":
        warnings.simplefilter("ignore")
        train(Path(sys.argv[1]), Path(sys.argv[1]) / "cache", sys.argv[3])  # type: ignore[arg-type]
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]
