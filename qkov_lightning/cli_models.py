"""Commands that load a model: inspect, verify, probe, protect."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from torch import nn

from qkov_lightning.capture.capture_check import verify_capture
from qkov_lightning.capture.first_batch import first_sample
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.rehearsal import forward_pass, to_device
from qkov_lightning.heads.finding import find_projections
from qkov_lightning.heads.inspection import describe, load_model, random_batch
from qkov_lightning.heads.verification import verify_projections
from qkov_lightning.measure.costs import Samples, Speed, cost_table, costs_of
from qkov_lightning.measure.passes import Probe
from qkov_lightning.measure.probe import (
    MAX_MEMORY_GB,
    ReplicateChoice,
    find_probe,
    load_weights,
    probe_interference,
)
from qkov_lightning.measure.subspace import Rest, measure_subspace
from qkov_lightning.views.screen import epoch_lines


def inspect(
    model: str,
    verify: bool = False,
    discover: bool = False,
    data: LightningDataModule | None = None,
    num_tokens: int = 512,
    num_samples: int = 128,
    num_tasks: int = 2,
    max_cache_gb: float = 10.0,
    max_memory_gb: float = MAX_MEMORY_GB,
) -> None:
    """Show which features of which module belong to each head of a model, and what a heatmap of it costs.

    Args:
        model: Import path ``package.module:function`` to a function that returns the model, or a local
            ``from_pretrained`` folder.
        verify: Also prove on a sample that each slice is the head that the model computes.
        discover: Find the heads from derivatives on a sample, without any name, instead of by names.
        data: LightningDataModule whose first training sample is taken, for a LightningModule; random tokens
            or images without it.
        num_tokens: Tokens of a sample, for the estimate of costs.
        num_samples: Samples of each task.
        num_tasks: Tasks.
        max_cache_gb: Disk for the cache, in GiB.
        max_memory_gb: Memory for the sums of a probe, in GiB.

    Raises:
        ValueError: If a slice is not the head that it is said to be.
    """
    loaded = load_model(model)
    samples = Samples(num_samples, num_tasks, num_tokens)
    batch = _sample_of(loaded, data) if verify or discover else None
    forward = (
        partial(forward_pass, loaded) if data is not None and isinstance(loaded, LightningModule) else None
    )
    projections = find_projections(loaded, batch, forward=forward) if discover else find_projections(loaded)
    Console().print(describe(loaded, num_tokens, projections))
    speed = Speed.of(next(loaded.parameters()).device)
    costs = costs_of(loaded, projections, samples, speed, max_cache_gb, max_memory_gb)
    Console().print(cost_table(loaded, costs, samples))
    if verify:
        verification = verify_projections(loaded, batch, projections, forward=forward)
        if not verification.passed:
            raise ValueError(str(verification))
        Console().print(str(verification))


def _sample_of(model: nn.Module, data: LightningDataModule | None) -> Any:
    """The first training sample, or random ones.

    Raises:
        ValueError: If the data is for a LightningModule, and the model is none.
    """
    if data is None:
        return random_batch(model)
    if not isinstance(model, LightningModule):
        raise ValueError(
            f"{type(model).__name__} is no LightningModule, expected one with `--data`, whose training step takes the batch."
        )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(find_probe("train_dataloader", data, model)))
    return first_sample(to_device(model, batch, next(model.parameters()).device))


def probe(
    checkpoint: Path,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    hook: str = "probe_dataloader",
    loss: Callable[..., Any] | None = None,
    loss_reduction: ReductionChoice = "auto",
    task_of: str = "task",
    output: Path = Path("interference-probe.json"),
    max_memory_gb: float = MAX_MEMORY_GB,
    replicates: ReplicateChoice = "auto",
) -> None:
    """Measure the interference of fixed samples at the weights of a checkpoint.

    Args:
        checkpoint: Checkpoint that Lightning wrote.
        model: LightningModule with the arguments it was trained with (`--model my_module.MyModel
            --model.width 64`).
        data: LightningDataModule that has the samples.
        hook: Method of the data module (or the model) that returns their DataLoader.
        loss: Function of the model and a batch, as an import path; the model's `training_step` without it.
        loss_reduction: How the loss joins the samples of a batch: mean, token_mean or sum; auto reads it from
            the loss.
        task_of: Batch key that gives the task of each sample.
        output: File to write.
        max_memory_gb: Memory for the sums, in GiB; with less than all layers need, the samples are passed
            over several times.
        replicates: How samples are left out for the standard errors: exact, linear (less memory), or auto.
    """
    loaded, batches, (step, epoch) = _load(model, data, checkpoint, hook)
    heatmap = probe_interference(
        loaded,
        batches,
        loss=loss,
        loss_reduction=loss_reduction,
        task_of=task_of,
        max_memory_gb=max_memory_gb,
        replicates=replicates,
    )
    heatmap = replace(heatmap, step=step, epoch=epoch)
    heatmap.save(output)
    Console().print(epoch_lines(heatmap, str(output)))


def protect(
    checkpoint: Path,
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    hook: str = "probe_dataloader",
    rank: int | float = 0.5,
    rest: Rest = "leave",
    output: Path = Path("protected.safetensors"),
) -> None:
    """Measure which directions of its weights the samples use, for HeadProjector to keep them.

    Args:
        checkpoint: Checkpoint that Lightning wrote.
        model: LightningModule with the arguments it was trained with (`--model my_module.MyModel
            --model.width 64`).
        data: LightningDataModule that has the samples of the tasks to protect.
        hook: Method of the data module (or the model) that returns their DataLoader.
        rank: Directions of each module's inputs: a number of them, or their share of the inputs.
        rest: "tensors" also measures the weights outside of the heads, for full fine-tuning.
        output: File to write.
    """
    loaded, batches, _ = _load(model, data, checkpoint, hook)
    subspace = measure_subspace(loaded, batches, rank=rank, rest=rest)
    subspace.save(output)
    size = f"{subspace.num_bytes / 2**20:.3g} MiB"
    sys.stdout.write(f"{output}: {len(subspace.bases)} modules, {subspace.num_samples} samples, {size}\n")


def verify(
    model: LightningModule | None = None,
    data: LightningDataModule | None = None,
    checkpoint: Path | None = None,
    hook: str = "train_dataloader",
    loss: Callable[..., Any] | None = None,
    loss_reduction: ReductionChoice = "auto",
) -> None:
    """Compare the captured gradients of a batch with those of each of its samples alone.

    Args:
        model: LightningModule with the arguments it is trained with (`--model my_module.MyModel --model.width
            64`).
        data: LightningDataModule whose first batch is taken; a few samples are enough.
        checkpoint: Checkpoint that Lightning wrote; the weights that the model starts with without it.
        hook: Method of the data module (or the model) that returns the DataLoader.
        loss: Function of the model and a batch, as an import path; the model's `training_step` without it.
        loss_reduction: How the loss joins the samples of a batch: mean, token_mean or sum; auto reads it from
            the loss.

    Raises:
        ValueError: If a gradient is not the one of the sample alone.
    """
    loaded, batches, _ = _load(model, data, checkpoint, hook)
    verification = verify_capture(loaded, next(iter(batches)), loss=loss, loss_reduction=loss_reduction)
    Console().print(verification)
    if not verification.passed:
        raise ValueError(verification.summary)


def _load(
    model: LightningModule | None, data: LightningDataModule | None, checkpoint: Path | None, hook: str
) -> tuple[LightningModule, Probe, tuple[int, int]]:
    """A model with the weights of a checkpoint, the batches to run it on, and its steps and epochs so far.

    Raises:
        ValueError: If the model or the data is missing.
    """
    if model is None or data is None:
        raise ValueError("Say what to load: `--model <class path>` and `--data <class path>`.")
    done = (0, 0) if checkpoint is None else load_weights(model, checkpoint)
    data.prepare_data()
    data.setup("fit")
    return model, find_probe(hook, data, model), done
