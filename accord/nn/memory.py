"""How memory is taken and given back on a CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's malloc.h
PRIMITIVES = 128
"""Products that oneDNN keeps compiled, and PyTorch descriptions of. Each shape is one of them, some 0.4 and 0.26 MB, and with no
padding nearly every micro-batch has shapes of its own: their default of 1,024 would fill with half a gigabyte of which little is
used again, and until then memory grows (bench/LOG.md)."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next tensor of that size, instead of giving it back to the system.

    A tensor of many megabytes is otherwise mapped, filled with zeros a page at a time and unmapped again at every use, which
    took an eighth of an update of every layer (bench/LOG.md, also for peak memory). Does nothing without glibc, and where the
    environment says what the user wants of it (``MALLOC_*_``, ``GLIBC_TUNABLES``).

    Also bounds what is kept of products (:data:`PRIMITIVES`), unless :data:`CACHES` are set. They are read at the first product.
    """
    for name in CACHES:
        os.environ.setdefault(name, str(PRIMITIVES))
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if told or not keeps():
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)  # never


def give_back_freed_memory() -> None:
    """Give it back now: between stages, whose tensors have other sizes. Does nothing without glibc."""
    if keeps():
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def keeps() -> bool:
    """Whether the C library is one that can be told."""
    return platform.libc_ver()[0] == "glibc"
