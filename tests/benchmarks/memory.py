"""Peak resident memory of what ``peak_memory.py`` does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def peak_of(*arguments: str) -> int:
    """Bytes that ``python peak_memory.py`` with these arguments prints."""
    # A fixed threshold: glibc would raise it as it goes, and keep what was freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
