"""The sums of all processes on disk: what is written, taken over at a restart, and removed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from qkov_lightning.store.files import CacheError, adopt_directory
from qkov_lightning.store.generations import Generation, read_manifest, sums_path, write_manifest, write_sums

MANIFEST = re.compile(r"(?P<step>\d{10})-(?P<rank>\d{5})\.json")
FOLDER = re.compile(r"\d{10}-\d{10}-\d+-(?P<rank>\d{5})-[0-9a-f]+")


class SumsOnDisk:
    """The folder of the sums of all processes: a folder for each generation, and a list for each moment.

    Args:
        directory: The folder.
        rank: This process; it writes and removes its own files only.
        world_size: How many there are; this one stands for those that are no more.
    """

    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        self.directory = directory
        self._rank, self._world_size = rank, world_size

    def manifest(self, step: int) -> Path:
        """Where the generations of this process before a step are listed."""
        return self.directory / f"{step:010d}-{self._rank:05d}.json"

    def write(self, one: Generation, sums: Mapping[str, Float[Tensor, "3 head weight"]]) -> str:
        """Write the sums of a generation, as far as they are not written yet.

        Returns:
            Its folder, named after all that makes it this one.

        Raises:
            CacheError: If the disk refuses.
        """
        # A task may be named as no file can.
        token = hashlib.sha256(one.task.encode()).hexdigest()[:16]
        folder = f"{one.first_step:010d}-{one.last_step:010d}-{one.count}-{self._rank:05d}-{token}"
        for name, count in one.counts.items():
            if count and not sums_path(self.directory / folder, name).exists():
                write_sums(self.directory / folder, name, sums[name])
        return folder

    def adopt(self, step: int, source: Path) -> list[tuple[list[Generation], list[Generation]]]:
        """What this process, and those that it stands for, had before a step, perhaps in another directory.

        Raises:
            CacheError: If nothing is listed there, or something cannot be read or written.
        """
        found = [(path, MANIFEST.fullmatch(path.name)) for path in sorted(source.glob(f"{step:010d}-*.json"))]
        if not found:
            raise CacheError(f"The sums of the checkpoint are gone from {source}.")
        adopted = []
        for path in [path for path, match in found if match and self._owns(match)]:
            closed, current = read_manifest(path)
            if source != self.directory:
                for one in [one for one in (*closed, *current) if one.folder]:
                    adopt_directory(source / one.folder, self.directory / one.folder)
                write_manifest(self.directory / path.name, closed, current)
            adopted.append((closed, current))
        return adopted

    def remove_all_but(self, folders: Collection[str], steps: Collection[int]) -> None:
        """Remove the folders of other generations, and the lists of other steps.

        Raises:
            CacheError: If the disk refuses.
        """
        try:
            for path in self.directory.iterdir() if self.directory.is_dir() else ():
                listed, folder = MANIFEST.fullmatch(path.name), FOLDER.fullmatch(path.name)
                if listed and self._owns(listed) and int(listed["step"]) not in steps:
                    path.unlink(missing_ok=True)
                elif folder and self._owns(folder) and path.name not in folders:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            raise CacheError(f"{self.directory} cannot be tidied up: {error}") from error

    def _owns(self, found: re.Match[str]) -> bool:
        return int(found["rank"]) % self._world_size == self._rank
