"""Started by test_distributed.py in a fresh process.

Trains in forked groups of processes, and leaves heatmaps behind.

The processes are this script's own children, as an elastic launcher would start them: nobody ends one because
the other has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from models import Classifier, GroupedAttention
from modules import Module, Samples, trainer
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from qkov_lightning import HeadInterference, InterferenceMonitor

PATIENCE_SECONDS = 240
"""What a group may take before it counts as hanging; far more than the timeout of its process group."""


class InOrder(Module):
    """Deals 26 samples out in steps of four, each step to the processes in the given sizes."""

    def __init__(
        self, sizes: tuple[int, ...], layers: int = 2, sharded: bool = False, **settings: Any
    ) -> None:
        super().__init__(
            network=Classifier([GroupedAttention() for _ in range(layers)], width=10), **settings
        )
        self.sizes, self.sharded = sizes, sharded

    def configure_model(self) -> None:
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.network.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def train_dataloader(self) -> DataLoader:
        steps = [list(range(start, min(start + 4, 26))) for start in range(0, 26, 4)]
        own = []
        for step in steps:
            # Each process needs a sample in the short last step, too.
            sizes = self.sizes if len(step) == 4 else (len(step) // len(self.sizes),) * len(self.sizes)
            start = sum(sizes[: self.trainer.global_rank])
            own.append(step[start : start + sizes[self.trainer.global_rank]])
        return DataLoader(Samples(26), batch_sampler=own)


class At(Callback):
    """Does something in the second process: after its third batch, or when its epoch ends."""

    def __init__(self, when: str, action: Callable[[Trainer], object]) -> None:
        self.when, self.action = when, action

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if self.when == "batch" and arguments[-1] == 2 and trainer.global_rank == 1:
            self.action(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.when == "epoch" and trainer.global_rank == 1:
            self.action(trainer)


def fill_disk(_: Trainer) -> None:
    """As a full disk: the system refuses to let a file grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def die(_: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_while_measuring(_: Trainer) -> None:
    def compute(_self: HeadInterference) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    HeadInterference.compute = compute  # type: ignore[method-assign]


class OwnDirectory(Callback):
    """Each process gets a cache directory of its own, as without a shared file system."""

    def __init__(self, monitor: InterferenceMonitor, root: Path) -> None:
        self.monitor, self.root = monitor, root

    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        self.monitor.cache_dir = self.root / f"rank{trainer.global_rank}"


def no_directory(monitor: InterferenceMonitor, root: Path) -> Callback:
    """The first process alone cannot write its cache directory."""

    class Blocked(Callback):
        def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_rank == 0:
                root.mkdir(parents=True, exist_ok=True)
                (root / "file").write_text("")
                monitor.cache_dir = root / "file"

    return Blocked()


EVEN, ALL, UNEVEN = (2, 2), (4,), (3, 1)
MODES: dict[str, dict[str, Any]] = {
    "one process": {"sizes": ALL},
    "ddp": {"sizes": EVEN},
    "uneven": {"sizes": UNEVEN},
    "ddp, accumulating": {"sizes": EVEN, "accumulate": 4},
    "fsdp": {"sizes": EVEN, "sharded": True},
    "fsdp, uneven": {"sizes": UNEVEN, "sharded": True},
    "one layer, one process": {"sizes": ALL, "layers": 1},
    "one layer": {"sizes": EVEN, "layers": 1},
    "ddp, no monitor": {"sizes": EVEN, "learning_rate": 0.05, "monitor": False},
    "ddp, monitor": {"sizes": EVEN, "learning_rate": 0.05},
    "fsdp, no monitor": {"sizes": EVEN, "sharded": True, "learning_rate": 0.05, "monitor": False},
    "fsdp, monitor": {"sizes": EVEN, "sharded": True, "learning_rate": 0.05},
    "tensor parallel": {"sizes": EVEN, "sharded": True, "split": 2},
    "probe, one process": {"sizes": ALL, "probe": True},
    "probe": {"sizes": EVEN, "probe": True},
    "fsdp, probe": {"sizes": EVEN, "sharded": True, "probe": True},
    "sampled": {"sizes": EVEN, "storage": "sampled"},
    "summed": {"sizes": EVEN, "storage": "summed"},
    "summed, one process": {"sizes": ALL, "storage": "summed"},
    "not shared": {"sizes": EVEN, "meddler": OwnDirectory},
    "no directory": {"sizes": EVEN, "learning_rate": 0.05, "meddler": no_directory},
    "full while training": {
        "sizes": EVEN,
        "learning_rate": 0.05,
        "meddler": lambda *_: At("batch", fill_disk),
    },
    "full while measuring": {
        "sizes": EVEN,
        "learning_rate": 0.05,
        "meddler": lambda *_: At("epoch", fill_disk),
    },
    "dies": {"sizes": EVEN, "meddler": lambda *_: At("epoch", die)},
    "stops": {"sizes": EVEN, "seconds": 12, "meddler": lambda *_: At("epoch", stop_while_measuring)},
}


def fit(
    root: Path,
    sizes: tuple[int, ...],
    layers: int = 2,
    sharded: bool = False,
    split: int = 1,
    accumulate: int = 1,
    probe: bool = False,
    storage: Any = "auto",
    seconds: int = 120,
    learning_rate: float = 0.0,
    monitor: bool = True,
    meddler: Callable[[InterferenceMonitor, Path], Callback] | None = None,
) -> None:
    watching = InterferenceMonitor(
        keep_cache=True,
        every_n_steps=1,
        probe=DataLoader(Samples(8), 4) if probe else None,
        storage=storage,
    )
    callbacks: list[Callback] = [] if meddler is None else [meddler(watching, root)]
    callbacks += [watching] if monitor else []
    timeout = timedelta(seconds=seconds)
    strategy: Any = "auto" if len(sizes) == 1 else DDPStrategy(timeout=timeout)
    if sharded:
        sizes_of_mesh = {"data_parallel_size": 2 // split, "tensor_parallel_size": split}
        strategy = ModelParallelStrategy(**sizes_of_mesh, timeout=timeout)
    module = InOrder(sizes, layers, sharded, learning_rate=learning_rate)
    if storage != "auto":  # heads of more weights than are kept
        attention = GroupedAttention(width=64, heads=2, kv_heads=1, size=16, value_size=16)
        module.network = Classifier([attention, attention], width=64)
    fit = trainer(
        root,
        *callbacks,
        max_epochs=2,
        use_distributed_sampler=False,
        strategy=strategy,
        devices=len(sizes),
        accumulate_grad_batches=accumulate,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(module)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    parameters = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in module.parameters()]
    root.mkdir(parents=True, exist_ok=True)
    torch.save(parameters, root / f"parameters-{fit.global_rank}.pt")
    messages = [str(warning.message) for warning in caught if "switched itself off" in str(warning.message)]
    (root / f"warnings-{fit.global_rank}.json").write_text(json.dumps(messages))


@contextlib.contextmanager
def output_in(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def launch(root: Path, mode: str) -> list[object]:
    """Exit codes of the processes; "hangs" for one that had to be ended."""
    settings = MODES[mode]
    root.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    world_size = len(settings["sizes"])
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            if world_size > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
                sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
                os.environ.update({key: str(value) for key, value in (ranks | sizes | address).items()})
            code = 1
            with output_in(root / f"output-{rank}.txt"):
                try:
                    fit(root, **settings)
                    code = 0
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(code)
        children.append(child)
    return wait(children)


def wait(children: list[int]) -> list[object]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    ended: dict[int, object] = {}
    stopped: set[int] = set()
    while len(ended) + len(stopped) < len(children) and time.monotonic() < deadline:
        child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if child and os.WIFSTOPPED(status):
            stopped.add(child)
        elif child:
            ended[child] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    for child in set(children) - set(ended):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [ended.get(child, "stopped" if child in stopped else "hangs") for child in children]


def main(root: Path, modes: list[str]) -> None:
    codes = {mode: launch(root / mode, mode) for mode in modes or MODES}
    (root / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
