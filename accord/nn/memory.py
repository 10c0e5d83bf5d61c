"""How freed memory is treated on a CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next tensor of that size, instead of giving it back to the system.

    A tensor of many megabytes is otherwise mapped, filled with zeros a page at a time and unmapped again at every use, which
    took an eighth of an update of every layer (bench/LOG.md, also for peak memory). Does nothing without glibc, and where the
    environment says what the user wants of it (``MALLOC_*_``, ``GLIBC_TUNABLES``).
    """
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never
