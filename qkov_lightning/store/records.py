"""One captured step as a safetensors file: what is written, and what is checked when it is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkov_lightning.capture.factors import CapturedStep, GradientFactors
from qkov_lightning.capture.gradients import DenseGradients, dense_gradients
from qkov_lightning.capture.samples import Samples
from qkov_lightning.heads.projections import Projection
from qkov_lightning.store.files import CacheError, write_durably
from qkov_lightning.store.sampling import SampledStep

SCHEMA_VERSION = 2


@dataclass(frozen=True, eq=False)
class CacheRecord:
    """One file of the cache, opened as far as its header.

    Attributes:
        path: The file.
        step: Training batch that it was captured from, counted from 0 over the whole run.
        rank: Process that captured it.
        samples: Who the samples are.
        scales: Factor per sample that turns its gradient into that of its own loss.
        num_terms: Terms that the own loss of each sample is the mean of.
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
    num_terms: Float[Tensor, sample]
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
                    if checksum(parts[part]) != self.checksums[key]:
                        raise CacheError(f"Cache file {self.path}: tensor {key} does not match its checksum.")
                    verified.add((self.path, key))
        except (OSError, SafetensorError) as error:
            raise CacheError(f"Cache file {self.path} cannot be read: {error}") from error
        if not _fits(parts, len(self.samples)):
            raise CacheError(
                f"Cache file {self.path}: the tensors of {module_name!r} do not fit its {len(self.samples)} samples."
            )
        return DenseGradients(**parts) if "gradient" in parts else GradientFactors(**parts)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor."""
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


def write_record(
    path: Path, captured: CapturedStep | SampledStep, step: int, rank: int, max_bytes: int
) -> CacheRecord:
    """Write a captured step, completely or not at all.

    Args:
        path: The file.
        captured: What was captured.
        step: Training batch, counted from 0 over the whole run.
        rank: Process that captured it.
        max_bytes: What it may take.

    Returns:
        The record.

    Raises:
        CacheError: If it takes more, or cannot be written.
    """
    tensors, header = _pack(captured) if isinstance(captured, CapturedStep) else _pack_sampled(captured)
    header |= {"schema": SCHEMA_VERSION, "step": step, "rank": rank}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > max_bytes:
        raise CacheError(
            f"One captured step takes {size / 2**30:.3g} GB, more than this process may keep "
            f"({max_bytes / 2**30:.3g} GB: half of the budget, shared by all processes). "
            "Raise max_cache_gb or make the batch smaller."
        )
    write_durably(path, tensors, {"qkov": json.dumps(header)})
    return open_record(path)


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
        "groups": step.samples.groups,
        "texts": step.samples.texts,
        "scales": step.scales.tolist(),
        "num_terms": step.num_terms.tolist(),
        "modules": modules,
        "crc32": {key: checksum(tensor) for key, tensor in tensors.items()},
    }
    return tensors, header


@dataclass(frozen=True)
class StepSize:
    """What a captured step would take on disk in exact storage, without its headers.

    Attributes:
        num_samples: Samples of the step.
        num_bytes: Bytes of all of them.
        num_weights: Weights of the projections that it holds gradients of.
        itemsize: Bytes of a number of a gradient.
        tasks: Tasks that were seen.
    """

    num_samples: int
    num_bytes: int
    num_weights: int
    itemsize: int
    tasks: frozenset[str]

    @classmethod
    def of(cls, captured: Sequence[CapturedStep], projections: Sequence[Projection]) -> StepSize:
        """Size of one process' share."""
        num_bytes = 0
        for step in captured:
            sharing: dict[int, list[GradientFactors]] = {}
            for factors in step.factors.values():
                sharing.setdefault(id(factors.activation), []).append(factors)
            num_bytes += sum(min(_dense_bytes(one), _factor_bytes(one)) for one in sharing.values())
        tasks = frozenset(task for step in captured for task in step.samples.tasks)
        weights: dict[tuple[int, str], int] = {}
        dtype = torch.float32
        for one in projections:
            for factors in (
                step.factors[one.module_name] for step in captured if one.module_name in step.factors
            ):
                other = factors.grad_output if one.block == "O" else factors.activation
                weights[one.layer, one.block] = one.head_features.numel() * other.shape[1]
                dtype = torch.promote_types(dtype, factors.grad_output.dtype)
        num_samples = sum(len(step.samples) for step in captured)
        return cls(num_samples, num_bytes, sum(weights.values()), dtype.itemsize, tasks)

    @classmethod
    def total(cls, sizes: Sequence[StepSize]) -> StepSize:
        """Of all processes."""
        tasks = frozenset[str]().union(*(size.tasks for size in sizes))
        return cls(
            sum(size.num_samples for size in sizes),
            sum(size.num_bytes for size in sizes),
            max((size.num_weights for size in sizes), default=0),
            max((size.itemsize for size in sizes), default=4),
            tasks,
        )

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


def _samples(header: Mapping[str, Any]) -> Samples:
    tasks, ids = (tuple(map(str, header[key])) for key in ("tasks", "ids"))
    groups, texts = (
        None if header.get(key) is None else tuple(map(str, header[key])) for key in ("groups", "texts")
    )
    return Samples(tasks, ids, groups=groups, texts=texts)


def open_record(path: Path) -> CacheRecord:
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
            samples=_samples(header),
            scales=torch.tensor(header["scales"], dtype=torch.float64),
            num_terms=torch.tensor(header["num_terms"], dtype=torch.float64),
            modules=header["modules"],
            checksums=header["crc32"],
            fingerprint=header.get("coordinates"),
            num_bytes=path.stat().st_size,
        )
        groups = record.samples.ids if record.samples.groups is None else record.samples.groups
        of_samples = (record.samples.tasks, record.samples.ids, groups, record.scales, record.num_terms)
        if {len(one) for one in of_samples} != {len(record.samples)} or not len(record.samples):
            raise CacheError(
                f"Cache file {path} is not a whole record: expected one task, identifier, scale and number of terms per sample."
            )
        if not all(key in record.checksums for parts in record.modules.values() for key in parts.values()):
            raise CacheError(f"Cache file {path} is not a whole record: a tensor has no checksum.")
        return record
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"Cache file {path} is not a whole record: {error}") from error
