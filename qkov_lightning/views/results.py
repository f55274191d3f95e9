"""Where the results of a run go: a folder, or an URL that fsspec knows, as for Lightning's checkpoints."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
from lightning.pytorch import Trainer


def is_remote(path: str | Path) -> bool:
    """Whether a path is one of another file system than the machine's own, such as ``s3://`` or ``memory://``."""
    protocol = re.match(
        r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path)
    )  # a drive has one letter, and a Path one slash
    return protocol is not None and protocol[1] not in {"file", "local"}


def results_folder(trainer: Trainer, name: str) -> str:
    """Folder of the results: below that of the first logger's run, as ModelCheckpoint's is."""
    parts = [str(trainer.default_root_dir)]
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version
        parts = [str(logger.save_dir or trainer.default_root_dir), str(logger.name)]
        if version is not None:
            parts.append(version if isinstance(version, str) else f"version_{version}")
    root = parts[0].rstrip("/") if is_remote(parts[0]) else str(Path(parts[0]).expanduser())
    return "/".join([root, *(part for part in parts[1:] if part not in {"", "None"}), name])


class Results:
    """The folder of the results of a run.

    Args:
        folder: A path, or an URL that fsspec knows.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @property
    def is_remote(self) -> bool:
        """Whether it is on another file system."""
        return is_remote(self.folder)

    def write(self, writer: Callable[[Path], None]) -> None:
        """Let a function write files into the folder.

        Args:
            writer: Takes a local folder. What it writes is copied to a remote one.

        Raises:
            OSError: If the disk, or the other file system, refuses.
        """
        if not self.is_remote:
            writer(Path(self.folder))
            return
        with tempfile.TemporaryDirectory(prefix="qkov-results-") as directory:
            writer(Path(directory))
            system, root = fsspec.core.url_to_fs(self.folder)
            for path in sorted(Path(directory).rglob("*")):
                if path.is_file():
                    target = f"{root}/{path.relative_to(directory).as_posix()}"
                    system.makedirs(target.rpartition("/")[0], exist_ok=True)
                    system.put_file(str(path), target)
