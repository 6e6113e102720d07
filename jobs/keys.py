"""Keys that callers show: 256 random bits with a prefix, of which only the SHA-256 is kept.

A key's entropy is so high that a plain hash is enough; slow hashes are for passwords. ``python -m jobs.keys`` makes
them: ``entry`` for ``SLIMTRIM_API_KEYS``, ``create`` in the database (``key_rows.py``).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass

SCOPES = ("jobs:read", "jobs:write", "jobs:delete", "artifacts:read", "reports:read", "metrics:read")
PREFIX = "slim_"
_ENTRY = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<scopes>all|[a-z:+]+):(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One caller: a name that owns jobs, what it may do, and the hash of its key."""

    name: str
    scopes: frozenset[str]
    sha256: str

    @classmethod
    def parse(cls, entry: str) -> ApiKey:
        """Read ``name:scope+scope:sha256`` or ``name:all:sha256``."""
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise ValueError(
                "an API key entry reads name:scope+scope:sha256 (or name:all:sha256); python -m jobs.keys entry NAME makes one"
            )
        scopes = frozenset(SCOPES if match["scopes"] == "all" else match["scopes"].split("+"))
        if unknown := sorted(scopes - set(SCOPES)):
            raise ValueError(f"API key {match['name']!r} names unknown scopes {unknown}; known are {', '.join(SCOPES)}")
        return cls(match["name"], scopes, match["digest"])

    def matches(self, presented: str) -> bool:
        """Say whether the presented key is this one, in a time that does not depend on where they differ."""
        return hmac.compare_digest(self.sha256, digest(presented))


def digest(key: str) -> str:
    """Return the form in which a key is kept."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(name: str, scopes: Iterable[str] = SCOPES) -> tuple[str, str]:
    """Return a fresh key and its entry for ``SLIMTRIM_API_KEYS``; the key itself is kept nowhere."""
    key = PREFIX + secrets.token_urlsafe(32)
    entry = f"{name}:{'+'.join(scopes)}:{digest(key)}"
    ApiKey.parse(entry)
    return key, entry


if __name__ == "__main__":
    from jobs.key_commands import main  # here, because the settings read this module

    raise SystemExit(main(sys.argv[1:]))
