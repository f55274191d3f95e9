"""Memory that was freed, and that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def release() -> None:
    """Give freed memory back to the system, where the C library would keep it: glibc on Linux.

    It keeps what lies below memory in use, and takes new memory for large tensors all the same.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # not in musl
            trim(0)
