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
    took a third of an update (bench/LOG.md). The most that a process holds at once stays what it was. Does nothing without
    glibc, and where ``MALLOC_TRIM_THRESHOLD_`` or ``GLIBC_TUNABLES`` say what the user wants.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never
