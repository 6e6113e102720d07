"""The store on a local disk: a folder.

Every file is written beside its place, hashed, forced to disk and renamed. A file on the same disk gets a second name
instead of a copy. The API serves what lies here itself, under links that it signs.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from compression.errors import DiskFull, SlimtrimError
from jobs.errors import StorageUnavailable
from jobs.storage.interface import NOTHING_KNOWN, TEMPORARY, KnownObject, ObjectNotFound, checked_parts
from jobs.storage.manifest import (
    MANIFEST,
    Manifest,
    ManifestFile,
    files_below,
    hash_file,
    manifest_bytes,
    manifest_of,
    media_type,
)

_CHUNK = 2**20
_TRIES = 100


class FolderStorage:
    """A folder on a local disk."""

    def __init__(self, root: Path) -> None:
        """``root`` is created when missing, readable by its owner alone."""
        with _named_errors("the store"):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._root = root.resolve()

    def put_artifact(self, prefix: str, folder: Path, known: Mapping[str, KnownObject] = NOTHING_KNOWN) -> Manifest:
        """Store a folder's files under ``prefix``, the manifest last; ``known`` ones as second names of stored objects."""
        target = self._path(prefix)
        self._check_root()
        if target.exists():
            raise StorageUnavailable(f"{prefix!r} is already written, and a prefix is written once")
        try:
            with _named_errors(prefix):
                files = [
                    _put(self._known(known.get(name), source) or source, target / name, name)
                    for name, source in files_below(folder)
                ]
                manifest = manifest_of(files)
                _write_bytes(manifest_bytes(manifest), target / MANIFEST)
                self._sync_parents(target)
        except SlimtrimError:
            self.delete(prefix)  # a full disk must not stay full of half an artifact
            raise
        return manifest

    def put_file(self, key: str, path: Path) -> ManifestFile:
        """Store one file whole or not at all; storing equal bytes again changes nothing."""
        place = self._path(key)
        self._check_root()
        with _named_errors(key):
            if path.is_symlink() or not path.is_file():
                raise StorageUnavailable(f"{path.name!r} is not a file, so it is not stored")
            stored = _put(path, place, path.name)
            self._sync_parents(place.parent)
        return stored

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Make ``path`` a copy of an object, whole or not at all.

        Never a second name of it: what is written to the copy later must not change the object.
        """
        with _named_errors(key), beside(path) as temporary:
            with self.open(key) as stream, temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, _CHUNK)
            if sha256 is not None and hash_file(temporary)[1] != sha256:
                raise StorageUnavailable(f"{key!r} does not hold the bytes that were stored")
            temporary.rename(path)

    def open(self, key: str, start: int = 0) -> BinaryIO:
        """Return an object's bytes as a stream that begins at ``start``."""
        with _named_errors(key):
            file = os.fdopen(self._open(key), "rb")
            file.seek(start)
            return file

    def size(self, key: str) -> int:
        """Return the bytes in an object."""
        with _named_errors(key):
            descriptor = self._open(key)
            try:
                return os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)

    def list(self, prefix: str = "") -> list[str]:
        """Return every key below ``prefix``, sorted, those of unfinished artifacts included."""
        start = self._path(prefix) if prefix else self._root
        with _named_errors(prefix):
            return sorted(path.relative_to(self._root).as_posix() for path in _regular_files(start))

    def delete(self, prefix: str) -> None:
        """Remove everything below ``prefix``, or the one object of that key; nothing there is fine too.

        The manifest goes first, so that a deletion cut short leaves no artifact rather than half of one.
        """
        target = self._path(prefix)
        with _named_errors(prefix):
            if target.is_dir() and not target.is_symlink():
                (target / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            self._remove_empty_parents(target)

    def link(self, key: str, expires_s: int, file_name: str, method: Literal["GET", "HEAD"] = "GET") -> None:
        """Return None: a folder serves no HTTP, so the API makes links of its own."""

    def sweep_uploads(self, older_than_s: float) -> int:
        """Remove unfinished files that were begun longer ago, and return how many there were."""
        before, swept = time.time() - older_than_s, 0
        with _named_errors("the store"):
            for path in _regular_files(self._root):
                # ctime, not mtime: a second name of an old file is new.
                if path.name.startswith(TEMPORARY) and path.lstat().st_ctime < before:
                    path.unlink(missing_ok=True)
                    swept += 1
        return swept

    def free_bytes(self) -> int:
        """Return how many more bytes can be stored."""
        with _named_errors("the store"):
            return shutil.disk_usage(self._root).free

    def links_from(self, folder: Path) -> bool:
        """Say whether files of that folder are stored as second names, which take no room."""
        source, name = folder / _unfinished("probe"), self._root / _unfinished("probe")
        try:
            source.touch()
            os.link(source, name)
        except OSError:
            return False
        finally:
            source.unlink(missing_ok=True)
            name.unlink(missing_ok=True)
        return True

    def check(self) -> None:
        """Write, read back and remove a small object; raises StorageUnavailable when that fails."""
        self._check_root()
        probe = self._root / _unfinished("probe")
        with _named_errors("the store"):
            try:
                _write_bytes(b"probe", probe)
                if probe.read_bytes() != b"probe":
                    raise StorageUnavailable("the store does not give back what was written")
            finally:
                probe.unlink(missing_ok=True)

    def _check_root(self) -> None:
        """A store that has gone is not made anew: it may be a disk that is not mounted."""
        if not self._root.is_dir():
            raise StorageUnavailable("the store's folder is gone")

    def _path(self, key: str) -> Path:
        """Turn a key into a path below the root; a key is our own, but it ends up in a path, so it is checked."""
        path = self._root.joinpath(*checked_parts(key))
        if path.parent.resolve() != path.parent:
            raise ObjectNotFound(f"there is no object {key!r}")
        return path

    def _known(self, known: KnownObject | None, source: Path) -> Path | None:
        """Return the stored file that holds the source's bytes, if the store has them as it was told."""
        if known is None:
            return None
        try:
            stored = self._path(known.key)
            is_there = stored.lstat().st_size == known.bytes and stat.S_ISREG(stored.lstat().st_mode)
        except (OSError, ObjectNotFound):
            return None
        return stored if is_there and hash_file(source) == hash_file(stored) == (known.bytes, known.sha256) else None

    def _open(self, key: str) -> int:
        descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ObjectNotFound(f"there is no object {key!r}")
        return descriptor

    def _sync_parents(self, path: Path) -> None:
        """Force the folders that were made on the way to ``path`` to disk."""
        while path != self._root:
            path = path.parent
            _sync_folder(path)

    def _remove_empty_parents(self, path: Path) -> None:
        for parent in path.parents:
            if parent == self._root or not parent.is_relative_to(self._root):
                return
            try:
                parent.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return


def _regular_files(start: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(start, followlinks=False):
        yield from (Path(folder, name) for name in names)


def _put(source: Path, place: Path, name: str) -> ManifestFile:
    """Store one file: a second name for the same bytes on the same disk, else a copy. Hashed either way."""
    _make_folder(place.parent)
    temporary = place.with_name(_unfinished(place.name))
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, temporary)
        size, sha256 = _sync_and_hash(temporary)
        temporary.rename(place)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(place.parent)
    return ManifestFile(path=name, bytes=size, sha256=sha256, media_type=media_type(name))


@contextmanager
def beside(path: Path) -> Generator[Path]:
    """Give a place for an unfinished file beside ``path``; what is still there at the end goes."""
    temporary = path.with_name(_unfinished(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _unfinished(name: str) -> str:
    """Return a name for an unfinished file; two who store the same file must not share one."""
    return f"{TEMPORARY}{os.urandom(8).hex()}-{name[-40:]}"


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, though a deletion may be clearing away an empty one of them just now."""
    for _ in range(_TRIES):
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except FileNotFoundError:
            continue
        return
    raise StorageUnavailable(f"the folder of {path.name!r} cannot be made")


def _sync_and_hash(path: Path) -> tuple[int, str]:
    """Force a file to disk, then hash what can be read back from it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return hash_file(path)


def _write_bytes(data: bytes, place: Path) -> None:
    _make_folder(place.parent)
    temporary = place.with_name(_unfinished(place.name))
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(place)
    _sync_folder(place.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named_errors(what: str) -> Generator[None]:
    """Turn what the disk says into an error of ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ObjectNotFound(f"there is no object {what!r}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room to store {what!r}") from error
        if error.errno == errno.ELOOP:
            raise ObjectNotFound(f"there is no object {what!r}") from error
        raise StorageUnavailable(f"the store failed at {what!r}: {error.strerror}") from error
