"""What a store does, whichever it is. Keys are relative POSIX paths of plain names.

An artifact is a set of files under a prefix that belongs to one attempt of one job (``artifacts/<job>/a<fence>/``).
``manifest.json`` comes last, and an artifact without one does not exist. A prefix is written once. What a killed worker
leaves is found by ``list`` and ``sweep_uploads`` and removed, like everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from jobs.errors import StorageUnavailable
from jobs.storage.manifest import Manifest, ManifestFile, files_below, hash_file

NOTHING_KNOWN: Mapping[str, KnownObject] = {}
TEMPORARY = ".part-"
"""What the name of an unfinished file begins with."""


class ObjectNotFound(StorageUnavailable):
    """There is no object of that key; asking again does not help."""

    retryable = False


@dataclass(frozen=True, slots=True)
class KnownObject:
    """An object that is in the store already, as ``put_file`` said when it was stored."""

    key: str
    bytes: int
    sha256: str


class Storage(Protocol):
    """Where artifacts and finished blocks are kept."""

    def put_artifact(self, prefix: str, folder: Path, known: Mapping[str, KnownObject] = NOTHING_KNOWN) -> Manifest:
        """Store a folder's files under ``prefix``, the manifest last, and return the manifest.

        ``known`` tells by relative path which files are in the store already under another key. Where a file's bytes are
        still those, the store takes them from there and nothing is sent.
        """
        ...

    def put_file(self, key: str, path: Path) -> ManifestFile:
        """Store one file whole or not at all; storing equal bytes again changes nothing."""
        ...

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Make ``path`` a copy of an object, whole or not at all; other bytes than ``sha256`` says are StorageUnavailable."""
        ...

    def open(self, key: str, start: int = 0) -> BinaryIO:
        """Return an object's bytes as a stream that begins at ``start``."""
        ...

    def size(self, key: str) -> int:
        """Return the bytes in an object."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Return every key below ``prefix``, sorted, those of unfinished artifacts included."""
        ...

    def delete(self, prefix: str) -> None:
        """Remove everything below ``prefix``, or the one object of that key; nothing there is fine too."""
        ...

    def link(self, key: str, expires_s: int, file_name: str, method: Literal["GET", "HEAD"] = "GET") -> str | None:
        """Return an address at which anyone may read the object for a while; None where the store serves no HTTP."""
        ...

    def sweep_uploads(self, older_than_s: float) -> int:
        """Remove what unfinished uploads left that began longer ago; return how many there were."""
        ...

    def free_bytes(self) -> int | None:
        """Return how many more bytes can be stored; None where nobody can tell."""
        ...

    def check(self) -> None:
        """Write, read back and remove a small object; raises StorageUnavailable when that fails."""
        ...


def known_among(folder: Path, stored: Iterable[KnownObject]) -> dict[str, KnownObject]:
    """Return which of a folder's files are in the store already, by relative path: those with the bytes of a stored object."""
    by_content = {(known.bytes, known.sha256): known for known in stored}
    sizes = {size for size, _ in by_content}
    files = [(name, path) for name, path in files_below(folder) if path.stat().st_size in sizes]
    found = {name: by_content.get(hash_file(path)) for name, path in files}
    return {name: known for name, known in found.items() if known is not None}


def checked_parts(key: str) -> list[str]:
    """Split a key into its names; a key is our own, but it ends up in paths and addresses, so it is checked."""
    parts = key.removesuffix("/").split("/")
    if not all(part.isprintable() and part not in ("", ".", "..") and "\\" not in part for part in parts):
        raise ObjectNotFound(f"{key!r} is not the key of an object")
    return parts
