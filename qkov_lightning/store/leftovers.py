"""Caches that trainings left behind: which there are, how large, and whether their training still runs."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

SIGNATURE = "qkov-cache"
MARKER = "shared"
"""File in the cache of a run: that all processes see it, and whose training it is."""


def owner_note() -> str:
    """What the marker says of the process that writes it."""
    return f"{SIGNATURE} {socket.gethostname()} {os.getpid()}"


@dataclass(frozen=True)
class Leftover:
    """The cache of one run.

    Attributes:
        directory: Where it is.
        num_bytes: Its size.
        in_use: Whether the process that wrote it still runs on this machine.
    """

    directory: Path
    num_bytes: int
    in_use: bool


def find_leftovers(root: Path) -> list[Leftover]:
    """Every cache of a run in a folder or below.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"No folder {root}: expected the folder of a run, or one above.")
    found = []
    for marker in sorted(root.rglob(MARKER)):
        if not marker.is_file():
            continue
        signature, _, owner = marker.read_text("utf-8", errors="replace").partition(" ")
        if signature == SIGNATURE:
            size = sum(path.stat().st_size for path in marker.parent.rglob("*") if path.is_file())
            found.append(Leftover(marker.parent, size, _runs(owner)))
    return found


def remove_cache(directory: Path) -> None:
    """Remove the cache of a run, and the folder around it if that is empty then.

    Raises:
        OSError: If the disk refuses.
    """
    shutil.rmtree(directory)
    if not any(directory.parent.iterdir()):
        directory.parent.rmdir()


def _runs(owner: str) -> bool:
    """Whether a process of this machine still runs; one of another machine is taken for ended."""
    host, _, process = owner.partition(" ")
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True
