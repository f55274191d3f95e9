"""Interference of fixed samples at the current weights, outside of training.

Nothing of the run is touched: not its random numbers, parameters, gradients, buffers, modes or logged values.
Two measurements of one checkpoint on one machine are bit-identical.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qkov_lightning.capture.first_batch import VERIFY, Verify, proven_projections
from qkov_lightning.capture.reductions import ReductionChoice
from qkov_lightning.capture.rehearsal import Loss, rehearsing, to_device, training_loss
from qkov_lightning.capture.samples import Labels, read_labels
from qkov_lightning.heads.finding import find_projections
from qkov_lightning.heads.maps import find_map
from qkov_lightning.heads.projections import BLOCKS, BY_NAME, Projection, num_heads, num_layers
from qkov_lightning.measure.allotment import (
    Pass,
    Plan,
    Replicates,
    SweptHeads,
    heads_of,
    numbers_per_weight,
)
from qkov_lightning.measure.cells import SamplePair
from qkov_lightning.measure.certainty import jackknife_error
from qkov_lightning.measure.heatmap import InterferenceHeatmap
from qkov_lightning.measure.held import HeldGradients, HotHead, Key
from qkov_lightning.measure.jackknife import MAX_GROUPS, num_groups_of, rounded
from qkov_lightning.measure.measurement import check_size, described_layers
from qkov_lightning.measure.pairs import hot_cells
from qkov_lightning.measure.passes import OtherSamplesError, Probe, ProbePasses, ProbeSamples, first_batch
from qkov_lightning.measure.sweeps import Found, Measured, ProbeSweeps, same_layers
from qkov_lightning.scores.scores import SCORES
from qkov_lightning.scores.settings import ScoreSettings, check_values
from qkov_lightning.store.processes import Processes
from qkov_lightning.store.streaming import restricted

MAX_MEMORY_GB = 4.0
"""Memory for the sums of a probe, in GiB."""

FISHER = "mean over the probe"
"""What the heatmap's notes say of its Fisher."""

T = TypeVar("T")

ReplicateChoice = Literal["auto", "exact", "linear"]
"""How the replicates are made; "auto": exact ones where they fit into one sweep."""


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
    verify: Verify = "first_batch",
    settings: ScoreSettings = ScoreSettings(),
    processes: Processes = Processes(),
    max_memory_gb: float = MAX_MEMORY_GB,
    replicates: ReplicateChoice = "auto",
) -> InterferenceHeatmap:
    """Measure the interference of the probe's samples, in evaluation mode, without any change to the model.

    The samples stream: passes over them sum gradients per task, and compare each sample with the sums.
    Nothing goes to disk, and memory does not depend on the number of samples but for a few numbers per sample
    and head. The Fisher is the plain mean over the probe's samples of each task, then the mean over the
    tasks. Standard errors come from leaving groups of samples out. The notes hold a fingerprint of the
    batches: two heatmaps of the same samples are compared group by group.

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
        projections: Head map; by default the one that names give, or derivatives where names are wrong or
            unknown.
        verify: "first_batch" proves the head map on the first sample of the first batch, "off" leaves that
            out.
        settings: What the scores depend on; the Fisher of a probe is a plain mean and has no decay.
        processes: Those that measure together. Each runs all samples and takes the sums of some layers, so
            that the result is that of one process to the last bit; the more there are, the fewer sweeps.
        max_memory_gb: Memory of each process for sums, and for samples that wait to be summed together, in
            GiB. Where not all layers fit, they are swept some at a time, with passes over the samples for
            each sweep; scores do not depend on it.
        replicates: "exact" leaves each group out of all sums, which takes about 17 times their memory;
            "linear" sums up what each sample of the group moves the scores by; "auto" is exact where the
            sums of all groups fit into ``max_memory_gb``. The notes say which it was.

    Returns:
        The heatmap.

    Raises:
        ValueError: If the probe shuffles, is empty, repeats a sample or changes from pass to pass, if there
            is no loss, if a gradient is not finite, or if ``max_memory_gb`` does not hold even a few heads.
        ArchitectureError: If the heads cannot be placed, or are not where they are said to be.
    """
    check_values(
        "probe_interference",
        ("max_memory_gb", max_memory_gb, max_memory_gb > 0, "a positive number"),
        ("replicates", replicates, replicates in {"auto", "exact", "linear"}, "auto, exact or linear"),
        ("verify", verify, verify in VERIFY, "first_batch or off"),
    )
    step_loss = loss or training_loss(model)
    is_proven = projections is not None and all(one.placed != BY_NAME for one in projections)
    if verify == "off" or is_proven:
        projections = list(projections or find_projections(model))
    else:
        with rehearsing(model, evaluation=True):
            batch = to_device(model, first_batch(probe), next(model.parameters()).device)
            projections = proven_projections(model, partial(step_loss, model), batch, projections)

    def labels(batch: Any) -> Labels:
        sources = (task_of, sample_id_of, num_target_tokens_of, "token_samples", group_of, sample_text_of)
        return replace(read_labels(batch, *sources), numbered=True)

    passes = ProbePasses(model, probe, step_loss, loss_reduction, labels)
    measuring = _Measuring(
        passes, model, projections, settings, processes, int(max_memory_gb * 2**30), replicates
    )
    samples = measuring.in_all(passes.look)
    found = None if samples is None else measuring.in_all(partial(measuring.sweep, samples))
    if not processes.all(found is not None):
        samples = measuring.in_all(partial(passes.learn, projections))
        found = measuring.in_all(partial(measuring.sweep, samples))
    if samples is None or found is None:
        raise ValueError(
            "The forward passes hold other samples from pass to pass, expected the same each time."
        )
    measuring.check_seen(found.unseen)
    heatmap = measuring.heatmap(samples, processes.gather(found.found))
    pairs = processes.gather(measuring.in_all(partial(measuring.pairs, samples, heatmap, found.held)))
    pairs.sort(key=lambda pair: -(pair.harm or 0.0))
    return replace(heatmap, pairs=tuple(pairs))


@dataclass(frozen=True, eq=False)
class _Measuring:
    """One measurement of a probe: how many heads at a time, and what becomes of their scores."""

    passes: ProbePasses
    model: nn.Module
    projections: Sequence[Projection]
    settings: ScoreSettings
    processes: Processes
    max_bytes: int
    replicates: ReplicateChoice

    @cached_property
    def trained(self) -> list[Projection]:
        """Those that have gradients."""
        return [one for one in self.projections if find_map(self.model, one).is_trainable]

    def in_all(self, work: Callable[[], T]) -> T:
        """Do something in all processes, or fail in all: who stopped alone would leave the others waiting.

        Raises:
            ValueError: If one fails.
        """
        result: list[T] = []
        failure: ValueError | None = None
        try:
            result.append(work())
        except ValueError as error:
            failure = error
        if not self.processes.all(failure is None):
            raise failure or ValueError("Another process cannot measure the probe, and says why.")
        return result[0]

    def sweep(self, samples: ProbeSamples) -> Measured | None:
        """Scores of the heads of this process; None if the samples turn out to be others."""
        check_size(sorted(set(samples.tasks)), self.projections)
        groups, kind = self._kind(samples)
        own = self._heads([one for one in self.projections if self.processes.takes(one.layer)])
        max_numbers = self.max_bytes // self._itemsize
        plan = Plan.of(own, len(set(samples.tasks)), kind or "linear", groups, max_numbers)
        if len(plan.sweeps) > 1 or (kind == "linear" and self.replicates == "auto"):
            rank_zero_info(
                f"Probe: {len(samples)} samples, {plan} over them, with the sums of as many heads as fit into "
                f"{self.max_bytes / 2**30:.3g} GiB; {kind} replicates."
            )
        # Other processes know of cells that may be hotter.
        alone = self.processes.count == 1 and self.settings.num_hot_cells > 0
        choose = partial(self._likely, samples) if alone else None
        try:
            sweeps = ProbeSweeps(self.passes, self.trained, samples, self.settings, kind, groups)
            return sweeps.measure(plan, choose)
        except OtherSamplesError:
            return None

    def check_seen(self, unseen: set[int]) -> None:
        """Refuse batches that tell nothing.

        Raises:
            ValueError: If no projection took part in a batch, in any process.
        """
        lost = set.intersection(*self.processes.gather([unseen]))
        if lost:
            raise ValueError(
                f"No attention projection took part in the loss of batch {min(lost)} of the probe."
            )

    def heatmap(self, samples: ProbeSamples, own: list[Found]) -> InterferenceHeatmap:
        """Everything but the sample pairs, the same in every process."""
        tasks = sorted(set(samples.tasks))
        groups, kind = self._kind(samples)
        cells = (len(tasks), num_layers(self.projections), num_heads(self.projections), len(BLOCKS))
        num_samples = torch.zeros(cells, dtype=torch.float64)
        shape = (len(tasks), *cells)
        scores, variances = ({name: _unknown(shape) for name in SCORES} for _ in range(2))
        replicates = {name: _unknown((groups, *shape)) for name in SCORES if kind}
        for found in own:
            heads = slice(found.first_head, found.first_head + len(next(iter(found.values.values()))[0, 0]))
            num_samples[:, found.layer, heads, found.block] = found.num_samples[:, None]
            for target, values in (
                (scores, found.values), (variances, found.variances), (replicates, found.replicates)
            ):  # fmt: skip
                for name, value in values.items():
                    target[name][..., found.layer, heads, found.block] = value
        replicates = {name: rounded(values) for name, values in replicates.items()}
        notes: dict[str, Any] = {"fisher": FISHER, "damping": self.settings.damping}
        if kind:
            notes |= {"degrees_of_freedom": groups - 1, "samples": samples.fingerprint, "replicates": kind}
        return InterferenceHeatmap(
            tasks=tuple(tasks),
            layers=described_layers(self.projections, self.model, num_samples),
            scores=scores,
            standard_errors={
                name: jackknife_error(replicates[name]) if kind else variances[name].sqrt() for name in SCORES
            },
            num_samples=num_samples,
            replicates=replicates,
            notes=notes,
        )

    def pairs(
        self, samples: ProbeSamples, heatmap: InterferenceHeatmap, held: HeldGradients | None
    ) -> list[SamplePair]:
        """The sample pairs of the most harm, with one more pass for heads whose gradients are not held."""
        hot = self._hot_heads(heatmap)
        pairs: dict[Key, list[SamplePair]] = {}
        if held is not None:
            for one in hot:
                if one in held:
                    pairs[one.key] = held.pairs(one, samples, self.settings)
            held.forget()
        others = [one for one in hot if one.key not in pairs]
        while others:
            # The gradients of all samples, those of each task, their contributions, and their magnitudes.
            together = max(1, self.max_bytes // (4 * self._held_bytes(samples, others[0])))
            some, others = others[:together], others[together:]
            held = HeldGradients(some, len(samples), self.passes.summing_device)
            self.passes.run(same_layers(self.trained, held.heads), held.take)
            for one in some:
                pairs[one.key] = held.pairs(one, samples, self.settings)
        return [pair for one in hot for pair in pairs[one.key]]

    def _hot_heads(self, heatmap: InterferenceHeatmap) -> list[HotHead]:
        """The heads of this process whose sample pairs are wanted."""
        hot = hot_cells(heatmap, self.settings.num_hot_cells)
        wanted = []
        for one in self.projections:
            cells = hot.get((one.layer, one.block), []) if self.processes.takes(one.layer) else []
            for head in sorted({cell.head for cell in cells}):
                alone = restricted(one, slice(head, head + 1))
                (heads,) = heads_of(self.model, [alone], self._itemsize)
                wanted.append(HotHead(heads, head, [cell for cell in cells if cell.head == head]))
        return wanted

    def _likely(self, samples: ProbeSamples, found: list[Found], one: Pass) -> list[HotHead]:
        """The same before a pass, as far as it leaves memory: with errors that miss what only it tells."""
        wanted = self._hot_heads(self.heatmap(samples, found))
        left = self.max_bytes - one.numbers * self._itemsize
        return wanted[: left // self._held_bytes(samples, wanted[0])] if wanted else []

    def _held_bytes(self, samples: ProbeSamples, head: HotHead) -> int:
        return len(samples) * head.heads.num_weights * self._itemsize

    def _kind(self, samples: ProbeSamples) -> tuple[int, Replicates | None]:
        """Groups that replicates leave out, and how: the same for any number of processes."""
        groups = min(MAX_GROUPS, num_groups_of(samples.all))
        if groups < 2:
            return 0, None
        if self.replicates != "auto":
            return groups, self.replicates
        num_weights = sum(heads.size for heads in self._heads(self.projections))
        numbers = numbers_per_weight(len(set(samples.tasks)), ("compare",), groups)
        return groups, "exact" if numbers * num_weights * self._itemsize <= self.max_bytes else "linear"

    def _heads(self, projections: Sequence[Projection]) -> list[SweptHeads]:
        return heads_of(self.model, [one for one in projections if one in self.trained], self._itemsize)

    @property
    def _itemsize(self) -> int:
        """Bytes of a number in a sum: float32, or float64 where the model has that."""
        dtypes = [one.dtype for one in self.model.parameters() if one.is_floating_point()]
        return 8 if torch.float64 in dtypes else 4


def _unknown(shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


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
