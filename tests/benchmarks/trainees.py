"""Lightning Trainers that take turns, step by step, in one process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset


class Trainee(IterableDataset):
    """A Trainer in a thread of its own, which trains only while ``step`` is running.

    It asks for its next batch through the data loader, and waits there: what ``step`` takes is one whole turn
    of Lightning's loop, with every callback.
    """

    def __init__(
        self, module: LightningModule, folder: Path, *callbacks: Callback, accelerator: str = "cpu"
    ) -> None:
        self._batches: queue.Queue[dict | None] = queue.Queue()
        self._asked = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._trainer = Trainer(
            max_epochs=1, check_val_every_n_epoch=2, num_sanity_val_steps=0, accelerator=accelerator, devices=1, logger=False,
            callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._fit, args=(module,), daemon=True)
        self._thread.start()
        self._wait()

    def __iter__(self) -> Iterator[dict]:
        while True:
            self._asked.release()
            batch = self._batches.get()
            if batch is None:
                return
            yield batch

    def step(self, batch: dict) -> None:
        self._batches.put(batch)
        self._wait()

    def stop(self) -> None:
        self._batches.put(None)
        self._thread.join()

    def _fit(self, module: LightningModule) -> None:
        try:
            # With validation loaders, though their turn never comes: without them the monitor would measure
            # at the end.
            self._trainer.fit(module, DataLoader(self, batch_size=None), DataLoader([0]))
        except BaseException as error:  # handed over to the thread that waits
            self._error = error
        finally:
            self._asked.release()

    def _wait(self) -> None:
        self._asked.acquire()
        if self._error:
            raise self._error
