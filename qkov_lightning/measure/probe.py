"""Interference of fixed samples at the current weights, outside of training.

Nothing of the run is touched: not its random numbers, parameters, gradients, buffers, modes or logged values.
Two measurements of one checkpoint on one machine are bit-identical.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from qkov_lightning.capture.factors import CapturedStep
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.rehearsal import Loss, rehearsing, to_device, training_loss
from qkov_lightning.capture.samples import Labels, read_labels
from qkov_lightning.capture.taps import GradientCapture
from qkov_lightning.heads.finding import find_projections
from qkov_lightning.heads.maps import find_map
from qkov_lightning.heads.projections import Projection
from qkov_lightning.measure.certainty import jackknife_error
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.jackknife import jackknife_replicates, num_groups_of
from qkov_lightning.measure.measurement import measure_interference
from qkov_lightning.scores.settings import ScoreSettings
from qkov_lightning.store.cache import GradientCache
from qkov_lightning.store.files import CacheError
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.stored import StoredGradients

NO_LIMIT = 2**62
"""The cache of a probe is as large as the probe."""

MAX_GROUPS = 16
"""Groups of samples that the standard errors are made of."""

FISHER = "mean over the probe"
"""What the heatmap's notes say of its Fisher."""

Probe = DataLoader[Any] | Sequence[Any]
"""A DataLoader, several of them, or batches in a list."""


def probe_interference(
    model: nn.Module,
    probe: Probe,
    *,
    loss: Loss | None = None,
    loss_reduction: ReductionChoice = "auto",
    task_of: str | Callable[[Any], Any] = "task",
    sample_id_of: str | Callable[[Any], Any] = "sample_id",
    num_target_tokens_of: str | Callable[[Any], Any] = "num_target_tokens",
    group_of: str | Callable[[Any], Any] = "group",
    sample_text_of: str | Callable[[Any], Any] | None = None,
    projections: Sequence[Projection] | None = None,
    settings: ScoreSettings = ScoreSettings(),
    processes: Processes = Processes(),
) -> InterferenceHeatmap:
    """Measure the interference of the probe's samples, in evaluation mode, without any change to the model.

    The Fisher is the plain mean over the probe's samples of each task, then the mean over the tasks.
    Gradients wait in a temporary folder, so that the probe need not fit into memory. Standard errors come
    from leaving groups of samples out, so that they hold for heavy-tailed gradients, too. The notes hold a
    fingerprint of the batches: two heatmaps of the same samples are compared group by group.

    Args:
        model: Holds the attention layers.
        probe: Batches of the same samples each time; every process reads all of them.
        loss: Loss of the model on a batch; the ``training_step`` of a LightningModule without it.
        loss_reduction: How the loss joins the samples of a batch.
        task_of: Batch key, or function of the batch, that gives the task of each sample.
        sample_id_of: The same for sample identifiers.
        num_target_tokens_of: The same for target tokens, where the loss does not show them.
        group_of: The same for the group of each sample (its document, its user), which is left out as a
            whole.
        sample_text_of: The same for a text of each sample, whose beginning is shown beside its identifier.
        projections: Head map; found by ``find_projections`` by default.
        settings: What the scores depend on; the Fisher of a probe is a plain mean and has no decay.
        processes: Those that measure together, each some layers.

    Returns:
        The heatmap.

    Raises:
        ValueError: If the probe shuffles, is empty or repeats a sample, if there is no loss, or if a gradient
            is not finite.
    """
    step_loss = loss or training_loss(model)
    projections = list(projections or find_projections(model))
    maps = {p.module_name: find_map(model, p) for p in projections}
    weights = [p for one in maps.values() for p in one.parameters if p.requires_grad]
    device = next(model.parameters()).device

    def labels(batch: Any) -> Labels:
        sources = (task_of, sample_id_of, num_target_tokens_of, "token_samples", group_of, sample_text_of)
        return replace(read_labels(batch, *sources), numbered=True)

    seen: Counter[tuple[str, str]] = Counter()
    failure: CacheError | None = None
    fingerprint = hashlib.sha256()
    with (
        tempfile.TemporaryDirectory(prefix="qkov-probe-") as directory,
        rehearsing(model, evaluation=True),
    ):
        cache = GradientCache(directory, max_samples_per_task=NO_LIMIT, max_bytes=NO_LIMIT)
        with GradientCapture(model, projections, loss_reduction) as capture, torch.enable_grad():
            for index, batch in enumerate(_batches(probe)):
                _fingerprint(batch, fingerprint.update)
                batch = to_device(model, batch, device)
                capture.start()
                value = step_loss(model, batch)
                _check_loss(value, index)
                capture.note_loss(value)
                # Not `backward()`: it would add to `.grad`, and run optimisers that hang on it.
                torch.autograd.grad(value, weights, allow_unused=True)
                captured = capture.finish(partial(labels, batch))
                _check_captured(captured, index, seen)
                try:
                    cache.append(0, captured)
                except CacheError as error:
                    failure = error
        processes.agree(failure)
        with torch.no_grad():
            stored = StoredGradients(cache, Path(directory) / "fisher")
            plain_mean = replace(settings, fisher_decay=0.0)
            notes: dict[str, Any] = {"fisher": FISHER, "damping": settings.damping}
            groups = min(MAX_GROUPS, num_groups_of(record.samples for record, _ in cache.records()))

            def leave_out(heatmap: InterferenceHeatmap) -> InterferenceHeatmap:
                if groups < 2:
                    return replace(heatmap, notes=notes)
                replicates = jackknife_replicates(
                    cache, projections, heatmap.tasks, groups, settings, processes, device
                )
                return replace(
                    heatmap,
                    standard_errors={score: jackknife_error(values) for score, values in replicates.items()},
                    replicates=replicates,
                    notes={
                        **notes,
                        "degrees_of_freedom": groups - 1,
                        "samples": fingerprint.hexdigest()[:16],
                    },
                )

            heatmap = measure_interference(
                stored, projections, model, plain_mean, processes, refined=leave_out
            )
            if heatmap is None:
                raise ValueError("The probe holds no batch, expected at least two samples of each task.")
    return heatmap


def find_probe(probe: str | Probe, *owners: object) -> Probe:
    """A probe itself, or what the hook of that name returns, from the first owner that has it.

    Args:
        probe: The probe, or the name of a method.
        owners: Data module and module.

    Returns:
        The probe.

    Raises:
        ValueError: If nobody has such a method.
    """
    if not isinstance(probe, str):
        return probe
    for owner in owners:
        hook = getattr(owner, probe, None)
        if callable(hook):
            found: Probe = hook()
            return found
    names = ", ".join(type(owner).__name__ for owner in owners if owner is not None)
    raise ValueError(
        f"No method `{probe}` in {names or 'the run'}: expected one that returns the DataLoader of the probe's samples. "
        "Add it to the data module, or pass the DataLoader itself."
    )


def load_weights(model: LightningModule, checkpoint: Path) -> tuple[int, int]:
    """Give a module the weights of a checkpoint that Lightning wrote.

    Args:
        model: Made with the arguments that it was trained with.
        checkpoint: The file. Only tensors and plain values are read from it, no code.

    Returns:
        Optimiser steps and epochs that the checkpoint has seen.

    Raises:
        ValueError: If the file is no such checkpoint, or its weights do not fit the module.
        FileNotFoundError: If there is no such file.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.configure_model()
        model.on_load_checkpoint(state)
        model.load_state_dict(state["state_dict"])
        return int(state["global_step"]), int(state["epoch"])
    except (pickle.UnpicklingError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint} cannot be loaded into {type(model).__name__}: {error}. Expected a checkpoint that Lightning wrote "
            "for this class, made with the same arguments."
        ) from error


def _batches(probe: Probe) -> Iterator[Any]:
    """The batches of all loaders, whose own generators are left as they were.

    Raises:
        ValueError: If a loader draws its samples at random.
    """
    loaders: list[Any] = [probe]
    if isinstance(probe, Sequence) and any(isinstance(one, DataLoader) for one in probe):
        loaders = list(probe)
    for loader in loaders:
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            raise ValueError(
                f"The probe draws its samples at random ({type(sampler).__name__}), expected the same samples each time: "
                "build its DataLoader with shuffle=False."
            )
        generator = getattr(loader, "generator", None)
        state = None if generator is None else generator.get_state()
        try:
            yield from loader
        finally:
            if generator is not None:
                generator.set_state(state)


def _fingerprint(value: Any, update: Callable[[bytes], None]) -> None:
    """Feed a hash with every tensor, array, text and number of a batch, and where it lies."""
    if isinstance(value, Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(repr(key).encode())
            _fingerprint(item, update)
    elif isinstance(value, (list, tuple)):
        update(f"{len(value)}".encode())
        for item in value:
            _fingerprint(item, update)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        update(repr(value).encode())
    else:
        _fingerprint(getattr(value, "__dict__", None), update)


def _check_loss(value: object, index: int) -> None:
    where = f"The loss of batch {index} of the probe"
    if not isinstance(value, Tensor) or not value.requires_grad:
        kind = "has no gradient" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
        raise ValueError(f"{where} {kind}, expected a tensor that depends on the parameters.")
    if value.numel() != 1 or not bool(value.isfinite()):
        raise ValueError(f"{where} is {value.detach().tolist()}, expected one finite number.")


def _check_captured(captured: Sequence[CapturedStep], index: int, seen: Counter[tuple[str, str]]) -> None:
    if not captured:
        raise ValueError(f"No attention projection took part in the loss of batch {index} of the probe.")
    for one in captured:
        if not one.is_finite:
            raise ValueError(
                f"Batch {index} of the probe has a gradient that is not finite. A measurement without it would pass "
                "over what broke."
            )
        seen.update(zip(one.samples.tasks, one.samples.ids, strict=True))
    (task, sample), count = seen.most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"Sample {sample!r} of task {task!r} is in the probe {count} times (again in batch {index}), expected every "
            "sample once with an identifier of its own."
        )
