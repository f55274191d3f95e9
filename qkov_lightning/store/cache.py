"""The contribution cache: one append-only safetensors file per process and captured step."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qkov_lightning.capture.gradients import DenseGradients, dense_gradients
from qkov_lightning.capture.samples import Samples
from qkov_lightning.capture.taps import CapturedStep, GradientFactors
from qkov_lightning.store.files import whole_file
from qkov_lightning.store.sampling import SampledStep

SCHEMA_VERSION = 1


class CacheError(RuntimeError):
    """The cache cannot be written or read."""


@dataclass(frozen=True, eq=False)
class CacheRecord:
    """One file of the cache, opened as far as its header.

    Attributes:
        path: The file.
        step: Training batch that it was captured from, counted from 0 over the whole run.
        rank: Process that captured it.
        samples: Who the samples are.
        scales: Factor per sample that turns its gradient into that of its own loss.
        modules: For each module, the names of its tensors in the file.
        checksums: CRC-32 of each tensor.
        fingerprint: Of the coordinates that its gradients were kept at; None if they are exact.
        num_bytes: Size of the file.
    """

    path: Path
    step: int
    rank: int
    samples: Samples
    scales: Float[Tensor, sample]
    modules: dict[str, dict[str, str]]
    checksums: dict[str, int]
    fingerprint: int | None
    num_bytes: int

    def read(
        self, module_name: str, verified: set[tuple[Path, str]] | None = None
    ) -> GradientFactors | DenseGradients:
        """Gradients of one module, from disk.

        Args:
            module_name: The module.
            verified: Tensors whose checksums were right before and are not computed again. Those of this
                call are added.

        Returns:
            Factors or gradients, mapped from the file rather than copied into memory.

        Raises:
            CacheError: If the file is gone, truncated, or its contents do not match their checksum.
        """
        parts = {}
        verified = set() if verified is None else verified
        try:
            with safe_open(self.path, framework="pt") as file:
                for part, key in self.modules[module_name].items():
                    parts[part] = file.get_tensor(key)
                    if (self.path, key) in verified:
                        continue
                    if _checksum(parts[part]) != self.checksums[key]:
                        raise CacheError(f"Cache file {self.path}: tensor {key} does not match its checksum.")
                    verified.add((self.path, key))
        except (OSError, SafetensorError) as error:
            raise CacheError(f"Cache file {self.path} cannot be read: {error}") from error
        if not _fits(parts, len(self.samples)):
            raise CacheError(
                f"Cache file {self.path}: the tensors of {module_name!r} do not fit its {len(self.samples)} samples."
            )
        return DenseGradients(**parts) if "gradient" in parts else GradientFactors(**parts)


class GradientCache:
    """Captured steps on disk, within a budget of samples and bytes that keeps the newest.

    A file is written under a temporary name, synced and renamed: a file that exists is complete. Nothing
    is ever unpickled.

    Args:
        directory: Holds the files of all processes of a run, and of no other run.
        rank: This process; it writes and removes its own files only.
        world_size: Processes that share the directory and its byte budget.
        max_samples_per_task: Samples of each task that stay readable, the newest ones. A sample that is
            captured again replaces its earlier self.
        max_bytes: Disk space for all processes. Half holds the newest samples, half those that a
            restart from the last checkpoint would need.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        max_samples_per_task: int = 128,
        max_bytes: int = 10 * 2**30,
    ) -> None:
        self.directory = Path(directory)
        self._rank, self._world_size = rank, world_size
        self._max_samples_per_task = max_samples_per_task
        self._window_bytes = max_bytes // world_size // 2
        self._checkpoint_steps: list[int] = []
        self._unreadable: set[Path] = set()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f".*-{rank:05d}-*.tmp"):
                leftover.unlink()
        except OSError as error:
            raise CacheError(f"The cache directory {self.directory} cannot be written: {error}") from error
        self._own = self._scan_own()

    def append(self, step: int, captured: Sequence[CapturedStep | SampledStep]) -> None:
        """Add one training step, or more samples of it, then drop what the budget no longer covers.

        Args:
            step: Training batch, counted from 0 over the whole run.
            captured: What was captured from it.

        Raises:
            CacheError: If the file cannot be written, or is larger than the whole budget.
        """
        earlier_parts = sum(record.step == step for record in self._own)
        for part, one in enumerate(captured, start=earlier_parts):
            path = self.directory / f"{step:010d}-{self._rank:05d}-{part:03d}.safetensors"
            tensors, header = _pack(one) if isinstance(one, CapturedStep) else _pack_sampled(one)
            header |= {"schema": SCHEMA_VERSION, "step": step, "rank": self._rank}
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            if size > self._window_bytes:
                raise CacheError(
                    f"One captured step takes {size / 2**30:.3g} GB, more than this process may keep "
                    f"({self._window_bytes / 2**30:.3g} GB: half of the budget, shared by all processes). "
                    "Raise max_cache_gb or make the batch smaller."
                )
            write_durably(path, tensors, {"qkov": json.dumps(header)})
            self._own.append(_open(path))
        self._evict()

    def records(self) -> list[tuple[CacheRecord, Bool[Tensor, sample]]]:
        """Readable records of all processes, oldest first, with a mask of the samples within the budget."""
        by_rank: dict[int, list[CacheRecord]] = {}
        found = self._scan()
        self._tell_of_lost(found)
        for record in found:
            by_rank.setdefault(record.rank % self._world_size, []).append(record)
        within = [record for records in by_rank.values() for record in self._within_bytes(records)]
        return self._newest(sorted(within, key=lambda record: record.path.name))

    def note_checkpoint(self, step: int) -> None:
        """Keep what a restart at ``step`` needs, until two later checkpoints exist.

        Two, because the newest may still be on its way to disk.
        """
        self._checkpoint_steps = [*(s for s in self._checkpoint_steps if s != step), step][-2:]
        self._evict()

    def restart_at(self, step: int) -> None:
        """Forget the records of ``step`` and later: a run that restarts there captures them again."""
        for record in self._own:
            if record.step >= step:
                _remove(record)
        self._own = [record for record in self._own if record.step < step]
        self._checkpoint_steps = [step]

    def adopt(self, other: str | Path, before: int) -> None:
        """Take over this process' records up to a step from the directory of an earlier run, by hard link.

        Raises:
            CacheError: If a file can be neither linked nor copied.
        """
        for path in sorted(Path(other).glob("*.safetensors")):
            step, rank, _ = path.name.split("-")
            target = self.directory / path.name
            if int(step) < before and int(rank) % self._world_size == self._rank and not target.exists():
                _link_or_copy(path, target)
        self._own = self._scan_own()

    def _scan_own(self) -> list[CacheRecord]:
        """Records of this process, and of the processes that it stands for if there were more."""
        return [record for record in self._scan() if record.rank % self._world_size == self._rank]

    def _scan(self) -> list[CacheRecord]:
        records = []
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                records.append(_open(path))
            except CacheError as error:
                if path not in self._unreadable:
                    self._unreadable.add(path)
                    warnings.warn(f"{error} Its samples are left out.", stacklevel=3)
        return records

    def _tell_of_lost(self, found: Sequence[CacheRecord]) -> None:
        """Warn of own records that somebody else removed."""
        paths = {record.path for record in found} | self._unreadable
        lost = [record for record in self._own if record.path not in paths]
        if lost and found:  # an empty cache speaks for itself
            warnings.warn(
                f"{len(lost)} files of the cache {self.directory} are gone, {lost[0].path.name} the first of them: were they "
                "deleted? Their samples are left out.",
                stacklevel=3,
            )
            self._own = [record for record in self._own if record.path in paths]

    def _within_bytes(self, records: Sequence[CacheRecord]) -> list[CacheRecord]:
        """The newest records of one process that fit into its window."""
        kept, total = [], 0
        for record in sorted(records, key=lambda record: record.path.name, reverse=True):
            total += record.num_bytes
            if total > self._window_bytes:
                break
            kept.append(record)
        return kept[::-1]

    def _newest(self, records: Sequence[CacheRecord]) -> list[tuple[CacheRecord, Bool[Tensor, sample]]]:
        """Records that hold some of the newest samples of a task, each sample counted once."""
        counts: Counter[str] = Counter()
        seen: set[tuple[str, str]] = set()
        selected = []
        for record in reversed(records):
            mask = torch.zeros(len(record.samples), dtype=torch.bool)
            for index in reversed(range(len(record.samples))):
                key = (record.samples.tasks[index], record.samples.ids[index])
                if key not in seen and counts[key[0]] < self._max_samples_per_task:
                    seen.add(key)
                    counts[key[0]] += 1
                    mask[index] = True
            if bool(mask.any()):
                selected.append((record, mask))
        return selected[::-1]

    def _evict(self) -> None:
        needed: set[Path] = set()
        for until in (None, *self._checkpoint_steps):
            records = [record for record in self._own if until is None or record.step < until]
            needed |= {record.path for record, _ in self._newest(self._within_bytes(records))}
        for record in self._own:
            if record.path not in needed:
                _remove(record)
        self._own = [record for record in self._own if record.path in needed]


def adopt_directory(source: Path, target: Path) -> None:
    """Give the files of ``source`` second names in ``target``, or copy them.

    Raises:
        CacheError: If neither works.
    """
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if not (target / path.name).exists():
                _link_or_copy(path, target / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        try:
            with whole_file(target) as temporary:
                shutil.copyfile(source, temporary)
        except OSError as error:
            raise CacheError(f"{source} cannot be copied to {target}: {error}") from error


def write_durably(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that either exists completely or not at all.

    Raises:
        CacheError: If the disk refuses.
    """
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be written: {error}") from error


def _remove(record: CacheRecord) -> None:
    try:
        record.path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"Cache file {record.path} cannot be removed: {error}") from error


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _fits(parts: Mapping[str, Tensor], num_samples: int) -> bool:
    """Whether tensors that someone else may have written are what they are said to be."""
    if set(parts) == {"gradient"}:
        return parts["gradient"].ndim == 3 and len(parts["gradient"]) == num_samples
    if set(parts) != {"activation", "grad_output", "offsets"}:
        return False
    activation, grad_output, offsets = (parts[part] for part in ("activation", "grad_output", "offsets"))
    return (
        activation.ndim == grad_output.ndim == 2
        and len(activation) == len(grad_output)
        and offsets.dtype == torch.int64
        and offsets.shape == (num_samples + 1,)
        and bool(offsets[0] == 0)
        and bool(offsets[-1] == len(activation))
        and bool((offsets.diff() >= 0).all())
    )


def _pack(step: CapturedStep) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and header of one record: per module factors or dense gradients, whichever is smaller."""
    sharing: dict[int, list[str]] = {}
    for name, factors in step.factors.items():
        sharing.setdefault(id(factors.activation), []).append(name)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, str]] = {}
    for group, names in enumerate(sharing.values()):
        members = [step.factors[name] for name in names]
        if _dense_is_smaller(members):
            for name, one in zip(names, members, strict=True):
                tensors[f"gradient/{name}"] = dense_gradients(one).gradient
                modules[name] = {"gradient": f"gradient/{name}"}
            continue
        tensors[f"activation/{group}"] = members[0].activation
        tensors[f"offsets/{group}"] = members[0].offsets
        for name, one in zip(names, members, strict=True):
            tensors[f"grad_output/{name}"] = one.grad_output
            modules[name] = {
                "activation": f"activation/{group}",
                "grad_output": f"grad_output/{name}",
                "offsets": f"offsets/{group}",
            }
    return _finished(step, tensors, modules)


def _pack_sampled(step: SampledStep) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {f"gradient/{name}": gradient for name, gradient in step.gradients.items()}
    modules = {name: {"gradient": f"gradient/{name}"} for name in step.gradients}
    tensors, header = _finished(step, tensors, modules)
    return tensors, {**header, "coordinates": step.fingerprint}


def _finished(
    step: CapturedStep | SampledStep, tensors: dict[str, Tensor], modules: dict[str, dict[str, str]]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = _apart({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    header: dict[str, object] = {
        "tasks": step.samples.tasks,
        "ids": step.samples.ids,
        "scales": step.scales.tolist(),
        "modules": modules,
        "crc32": {key: _checksum(tensor) for key, tensor in tensors.items()},
    }
    return tensors, header


@dataclass(frozen=True)
class StepSize:
    """What a captured step would take on disk in exact storage, without its headers.

    Attributes:
        num_samples: Samples of the step.
        num_bytes: Bytes of all of them.
        tasks: Tasks that were seen.
    """

    num_samples: int
    num_bytes: int
    tasks: frozenset[str]

    @classmethod
    def of(cls, captured: Sequence[CapturedStep]) -> StepSize:
        """Size of one process' share."""
        num_bytes = 0
        for step in captured:
            sharing: dict[int, list[GradientFactors]] = {}
            for factors in step.factors.values():
                sharing.setdefault(id(factors.activation), []).append(factors)
            num_bytes += sum(min(_dense_bytes(one), _factor_bytes(one)) for one in sharing.values())
        tasks = frozenset(task for step in captured for task in step.samples.tasks)
        return cls(sum(len(step.samples) for step in captured), num_bytes, tasks)

    @classmethod
    def total(cls, sizes: Sequence[StepSize]) -> StepSize:
        """Of all processes."""
        tasks = frozenset[str]().union(*(size.tasks for size in sizes))
        return cls(sum(size.num_samples for size in sizes), sum(size.num_bytes for size in sizes), tasks)

    @property
    def bytes_per_sample(self) -> float:
        """Mean over the samples."""
        return self.num_bytes / max(1, self.num_samples)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors refuses tensors that share memory: copy those."""
    owners: dict[int, str] = {}
    return {
        key: tensor if owners.setdefault(tensor.untyped_storage().data_ptr(), key) == key else tensor.clone()
        for key, tensor in tensors.items()
    }


def _dense_is_smaller(factors: Sequence[GradientFactors]) -> bool:
    return _dense_bytes(factors) < _factor_bytes(factors)


def _factor_bytes(factors: Sequence[GradientFactors]) -> int:
    """Of modules that share an activation."""
    return factors[0].activation.nbytes + sum(one.grad_output.nbytes for one in factors)


def _dense_bytes(factors: Sequence[GradientFactors]) -> int:
    """Dense gradients are kept in float32 or better."""
    num_samples = factors[0].offsets.numel() - 1
    item = max(4, factors[0].activation.element_size())
    weights = sum(one.activation.shape[1] * one.grad_output.shape[1] for one in factors)
    return num_samples * weights * item


def _open(path: Path) -> CacheRecord:
    """Read the header of a record.

    Raises:
        CacheError: If it is not a whole record of this schema.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["qkov"])
        if header["schema"] != SCHEMA_VERSION:
            raise CacheError(f"Cache file {path} has schema {header['schema']}, expected {SCHEMA_VERSION}.")
        record = CacheRecord(
            path=path,
            step=int(header["step"]),
            rank=int(header["rank"]),
            samples=Samples(tuple(map(str, header["tasks"])), tuple(map(str, header["ids"]))),
            scales=torch.tensor(header["scales"], dtype=torch.float64),
            modules=header["modules"],
            checksums=header["crc32"],
            fingerprint=header.get("coordinates"),
            num_bytes=path.stat().st_size,
        )
        if not len(record.samples.tasks) == len(record.samples.ids) == len(record.scales) > 0:
            raise CacheError(
                f"Cache file {path} is not a whole record: expected one task, identifier and scale per sample."
            )
        if not all(key in record.checksums for parts in record.modules.values() for key in parts.values()):
            raise CacheError(f"Cache file {path} is not a whole record: a tensor has no checksum.")
        return record
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"Cache file {path} is not a whole record: {error}") from error
