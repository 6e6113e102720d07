"""Keep a run's memory as flat as the sweep makes it: bounded kernel caches, and freed pages handed back.

Two things grew with the number of blocks although no tensor did. glibc keeps freed pages in its arenas, where a block's
tensors of a few megabytes leave holes. And oneDNN keeps a compiled kernel for every shape it has met, 1024 of them by
default, while experts see another number of tokens in every micro-batch of every block, so hardly one is used again.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_KERNELS_KEPT = "16"


def bound_kernel_caches() -> None:
    """Let the matrix library keep few compiled kernels; works if called before the process's first product on the CPU."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
    os.environ.setdefault("LRU_CACHE_CAPACITY", _KERNELS_KEPT)  # the same cache once more, in torch's own layer above


def give_back() -> None:
    """Return freed pages to the system where the C library can; do nothing elsewhere. Costs milliseconds."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None
