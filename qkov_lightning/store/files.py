"""Files that exist completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

ABANDONED_SECONDS = 3600
"""Age at which a temporary file belongs to no run that is alive: one file takes seconds."""


class CacheError(RuntimeError):
    """The cache cannot be written or read."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to: it becomes ``path`` in the end, and nothing of it stays after an error or Ctrl-C.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("a")
    ...     [path.name for path in Path(folder).iterdir()]
    ['a.txt']

    Args:
        path: The file; replaced if it exists.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sweep(directory: Path) -> None:
    """Remove what killed runs left half-written below a folder."""
    limit = time.time() - ABANDONED_SECONDS
    for path in directory.glob("**/.*.tmp"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < limit:
                path.unlink()


def adopt_directory(source: Path, target: Path) -> None:
    """Give the files of ``source`` second names in ``target``, or copy them.

    Raises:
        CacheError: If neither works.
    """
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if not (target / path.name).exists():
                link_or_copy(path, target / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk has no links.

    Raises:
        CacheError: If neither works.
    """
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
