"""Ids that sort by time and can be told apart by eye: ``job_`` and a UUIDv7 in Crockford's base 32, lower case.

RFC 9562: 48 bits of milliseconds, then (method 3) 12 bits of a fraction of a millisecond, then 62 random bits.
"""

from __future__ import annotations

import os
import time

from jobs.errors import JobNotFound

_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
_LENGTH = 26
"""Letters that hold 128 bits, 5 at a time."""
PREFIX = "job_"


def new_job_id() -> str:
    """Return a fresh id of a job; later ids sort after earlier ones."""
    return new_id(PREFIX)


def new_id(prefix: str) -> str:
    """Return a fresh id with another prefix."""
    milliseconds, rest_ns = divmod(time.time_ns(), 1_000_000)
    fraction = rest_ns * 4096 // 1_000_000
    random = int.from_bytes(os.urandom(8)) >> 2
    value = milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | random
    return prefix + "".join(_LETTERS[value >> 5 * place & 31] for place in reversed(range(_LENGTH)))


def parse_job_id(text: str) -> str:
    """Return the id if it is well-formed; raise ``JobNotFound`` otherwise, since no job can have it."""
    letters = text.removeprefix(PREFIX)
    if text.startswith(PREFIX) and len(letters) == _LENGTH and set(letters) <= set(_LETTERS):
        return text
    raise JobNotFound(f"there is no job {text[:64]!r}")
