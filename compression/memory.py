"""Hand freed memory back to the system at the end of every block.

glibc keeps freed pages in its arenas, and a block's tensors of a few megabytes each leave holes there: without a trim the
resident size of a run grew by a tenth of a block per block. One call per block costs milliseconds.
"""

from __future__ import annotations

import ctypes
from functools import cache


def give_back() -> None:
    """Return freed pages to the system where the C library can; do nothing elsewhere."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None
