"""Generations of samples: which samples of a task were summed together, and their sums on disk.

A sum forgets who is in it, so samples leave it a generation at a time: those of a task are in the generation
that is being summed, and in the one before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkov_lightning.store.files import CacheError, whole_file, write_durably
from qkov_lightning.store.records import checksum

KINDS = ("gradient", "magnitude", "square")
"""What is summed at every weight, in this order."""

Member = tuple[int, int]
"""A captured step, and the process that captured it."""


@dataclass(eq=False)
class Generation:
    """Samples of one task that are summed together, each of them once.

    Attributes:
        task: The task.
        members: Identifiers of the samples of each captured step.
        counts: Samples that were summed at each projection, by ``stored_name``.
        num_seen: Samples that came while it lasted, with those that were in it already.
        folder: Where the sums are on disk; empty while they are in memory alone.
    """

    task: str
    members: dict[Member, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    num_seen: int = 0
    folder: str = ""

    @property
    def ids(self) -> set[str]:
        """Identifiers of all samples."""
        return {name for names in self.members.values() for name in names}

    @property
    def count(self) -> int:
        """Samples of all steps."""
        return sum(map(len, self.members.values()))

    @property
    def first_step(self) -> int:
        """The oldest step."""
        return min(step for step, _ in self.members)

    @property
    def last_step(self) -> int:
        """The newest step."""
        return max(step for step, _ in self.members)

    def take(self, member: Member, ids: Sequence[str], counts: Mapping[str, int]) -> None:
        """Take the samples of a step.

        Args:
            member: The step.
            ids: Their identifiers.
            counts: How many of them were summed at each projection.
        """
        self.folder = ""
        self.members[member] = [*self.members.get(member, ()), *ids]
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def copy(self, folder: str) -> Generation:
        """The same at this moment, with its sums in a folder."""
        members = {member: list(ids) for member, ids in self.members.items()}
        return replace(self, members=members, counts=dict(self.counts), folder=folder)

    def to_json(self) -> dict[str, object]:
        """For a manifest."""
        members = [[*member, ids] for member, ids in self.members.items()]
        return {**vars(self), "members": members}

    @classmethod
    def from_json(cls, entry: Mapping[str, object]) -> Generation:
        """Inverse of ``to_json``.

        Raises:
            ValueError: If it is no entry of a manifest.
        """
        members, counts = entry["members"], entry["counts"]
        if not isinstance(members, list) or not isinstance(counts, dict):
            raise ValueError(f"{entry} describes no sums.")
        return cls(
            str(entry["task"]),
            {(int(step), int(rank)): [str(name) for name in ids] for step, rank, ids in members},
            {str(name): int(count) for name, count in counts.items()},
            int(str(entry["num_seen"])),
            str(entry["folder"]),
        )


def sums_path(folder: Path, name: str) -> Path:
    """Where the sums of a projection are, in the folder of a generation."""
    return folder / f"{name}.safetensors"


def write_sums(folder: Path, name: str, sums: Float[Tensor, "3 head weight"]) -> None:
    """Write the sums of one projection, completely or not at all.

    Raises:
        CacheError: If the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{folder} cannot be written: {error}") from error
    host = sums.detach().cpu().contiguous()
    write_durably(sums_path(folder, name), {"sums": host}, {"qkov_sums": str(checksum(host))})


def read_sums(folder: Path, name: str) -> Float[Tensor, "3 head weight"]:
    """Read what ``write_sums`` wrote.

    Raises:
        CacheError: If it is gone or damaged.
    """
    path = sums_path(folder, name)
    try:
        with safe_open(path, framework="pt") as file:
            sums, expected = file.get_tensor("sums"), int(file.metadata()["qkov_sums"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"The sums in {path} cannot be read: {error}") from error
    if sums.ndim != 3 or len(sums) != len(KINDS) or checksum(sums) != expected:
        raise CacheError(f"The sums in {path} do not match their checksum.")
    return sums


def write_manifest(path: Path, closed: Sequence[Generation], current: Sequence[Generation]) -> None:
    """Write which generations there are at a moment.

    Args:
        path: The file.
        closed: Those that take no more samples.
        current: Those that do.

    Raises:
        CacheError: If the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump([[one.to_json() for one in some] for some in (closed, current)], file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error}") from error


def read_manifest(path: Path) -> tuple[list[Generation], list[Generation]]:
    """Read what ``write_manifest`` wrote.

    Raises:
        CacheError: If it is gone or damaged.
    """
    try:
        closed, current = json.loads(path.read_text("utf-8"))
        return [Generation.from_json(one) for one in closed], [Generation.from_json(one) for one in current]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}") from error
