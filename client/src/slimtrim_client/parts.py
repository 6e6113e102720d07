"""A file on its way, on disk: its first bytes, their running sha256, and a note of what they belong to.

A part goes on only where its note names the file that is wanted now; its bytes are hashed again first, so what a crash or another
hand left in it cannot slip through. The file gets its own name when its sha256 is right, not before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from slimtrim_client.artifacts import NOTE, PART, WantedFile
from slimtrim_client.errors import CannotWrite, DiskFull, UnsafeManifest

_CHUNK = 2**20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Part:
    """The part of one file."""

    def __init__(self, folder: Path, file: WantedFile) -> None:
        """``folder``: resolved, and there."""
        self.file = file
        self.target = folder / file.path
        self.offset = 0
        """How many bytes are there."""
        self.tag: str | None = None
        """The ETag under which they were served."""
        self._folder = folder
        self._part = self.target.with_name(self.target.name + PART)
        self._note = self.target.with_name(self.target.name + NOTE)
        self._hash = hashlib.sha256()
        self._out: BinaryIO | None = None

    def is_there(self) -> bool:
        """Say whether the whole file lies there already, byte for byte."""
        with _told(self.target):
            self._check_place()
            if self.target.is_symlink() or not self.target.is_file() or self.target.stat().st_size != self.file.bytes:
                return False
            with self.target.open("rb") as stream:
                return _hashed(stream).hexdigest() == self.file.sha256

    def bytes_on_disk(self) -> int:
        """Return how many bytes of the file an earlier download left, if they are of use."""
        try:
            size = self._part.lstat().st_size
        except OSError:
            return 0
        return size if self._read_note().get("sha256") == self.file.sha256 and size <= self.file.bytes else 0

    def open(self) -> None:
        """Take up what an earlier download left, or begin."""
        with _told(self._part):
            self._check_place()
            self.target.parent.mkdir(parents=True, exist_ok=True)
            note = self._read_note()
            # Never through a link that somebody laid here.
            descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            self._out = os.fdopen(descriptor, "r+b")
            self._lock(descriptor)
            size = os.fstat(descriptor).st_size
        if note.get("sha256") != self.file.sha256 or size > self.file.bytes:
            self.restart(None)
            return
        with _told(self._part):
            self._hash, self.offset = _hashed(self._out), size
        tag = note.get("etag")
        self.tag = tag if isinstance(tag, str) else None

    def restart(self, tag: str | None) -> None:
        """Forget all bytes; those that come now are served under this tag."""
        assert self._out is not None
        with _told(self._part):
            self._out.seek(0)
            self._out.truncate()
            self._note.write_text(json.dumps({"sha256": self.file.sha256, "etag": tag}), encoding="utf-8")
        self._hash, self.offset, self.tag = hashlib.sha256(), 0, tag

    def write(self, chunk: bytes) -> None:
        """Append."""
        assert self._out is not None
        with _told(self._part):
            self._out.write(chunk)
            self._out.flush()
        self._hash.update(chunk)
        self.offset += len(chunk)

    def sha256(self) -> str:
        """Return the hash of the bytes that are there."""
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Give the file its name."""
        self.close()
        with _told(self.target):
            os.replace(self._part, self.target)
            self._note.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing of it."""
        self.close()
        with _told(self._part):
            self._part.unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the part for the next download."""
        if self._out is not None:
            out, self._out = self._out, None
            with _told(self._part):
                out.close()

    def _lock(self, descriptor: int) -> None:
        """Keep other downloads away until this one is closed."""
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise CannotWrite(f"another download is writing {self._part}; wait for its end, or name another folder") from held

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return cast("dict[str, Any]", note) if isinstance(note, dict) else {}

    def _check_place(self) -> None:
        """Refuse a folder that a link leads away from the target."""
        if not self.target.parent.resolve().is_relative_to(self._folder):
            raise UnsafeManifest(f"{self.target.parent} leads out of {self._folder} by a link; {self.file.path!r} is not written")


def make_folder(folder: Path) -> Path:
    """Make the target folder and return its real path."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()


def require_room(folder: Path, parts: list[Part]) -> None:
    """Refuse to begin what cannot end: what is not there yet must fit the disk."""
    needed = sum(part.file.bytes - part.bytes_on_disk() for part in parts)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(f"{folder} needs {needed:,} bytes more and its disk has {free:,}; make room, or name another folder")


def _hashed(stream: BinaryIO) -> Any:
    found = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        found.update(chunk)
    return found


@contextmanager
def _told(path: Path) -> Generator[None]:
    """Turn what the disk says into an error with the path in it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
            raise DiskFull(
                f"no room for {path}: its disk has {free:,} bytes free; make room and start the download again, it goes on"
            ) from error
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
