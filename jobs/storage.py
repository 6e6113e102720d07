"""Where results go: a folder now, a bucket later, behind one interface.

An artifact is a set of files under a prefix that belongs to one attempt of one job (``artifacts/<job>/a<fence>/``).
Every file is written beside its place, hashed, forced to disk and renamed; ``manifest.json`` comes last, and an
artifact without one does not exist. A prefix is written once. What a killed worker leaves is found by ``list``
and removed by ``delete``, like everything else.

Keys are relative POSIX paths of plain names. Links are never followed and never stored.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypedDict

from compression.errors import DiskFull, SlimtrimError
from jobs.errors import StorageUnavailable
from jobs.settings import Settings

MANIFEST = "manifest.json"
_TEMPORARY = ".part-"
_CHUNK = 2**20
_TRIES = 100

MEDIA_TYPES = {
    ".safetensors": "application/vnd.safetensors",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".jinja": "text/plain; charset=utf-8",
    ".yaml": "application/yaml",
    ".html": "text/html; charset=utf-8",
    ".py": "text/x-python; charset=utf-8",
}


class ObjectNotFound(StorageUnavailable):
    """There is no object of that key; asking again does not help."""

    retryable = False


class ManifestFile(TypedDict):
    """One file of an artifact; ``path`` is relative to the artifact."""

    path: str
    bytes: int
    sha256: str
    media_type: str


class Manifest(TypedDict):
    """Every file of an artifact, and their bytes together."""

    files: list[ManifestFile]
    bytes: int


class Storage(Protocol):
    """Where artifacts are kept."""

    def put_artifact(self, prefix: str, folder: Path) -> Manifest:
        """Store a folder's files under ``prefix``, the manifest last, and return the manifest."""
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

    def free_bytes(self) -> int:
        """Return how many more bytes can be stored."""
        ...

    def check(self) -> None:
        """Write, read back and remove a small object; raises StorageUnavailable when that fails."""
        ...


def open_storage(settings: Settings) -> Storage:
    """Return the store that the settings name; they refuse what is not built, by name, at start-up."""
    return FolderStorage(settings.objects_folder)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the manifest in the one spelling that is stored and hashed."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def manifest_sha256(manifest: Manifest) -> str:
    """Return the hash that stands for the whole artifact, since the manifest holds every file's own."""
    return hashlib.sha256(manifest_bytes(manifest)).hexdigest()


def as_manifest(data: dict[str, Any]) -> Manifest:
    """Return a manifest read back from JSON, with its types."""
    return Manifest(files=[ManifestFile(**file) for file in data["files"]], bytes=data["bytes"])


class FolderStorage:
    """A folder on a local disk."""

    def __init__(self, root: Path) -> None:
        """``root`` is created when missing, readable by its owner alone."""
        with _named_errors("the store"):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._root = root.resolve()

    def put_artifact(self, prefix: str, folder: Path) -> Manifest:
        """Store a folder's files under ``prefix``, the manifest last, and return the manifest."""
        target = self._path(prefix)
        self._check_root()
        if target.exists():
            raise StorageUnavailable(f"{prefix!r} is already written, and a prefix is written once")
        try:
            with _named_errors(prefix):
                files = [_put_file(source, target, name) for name, source in _files_below(folder)]
                manifest = Manifest(files=files, bytes=sum(file["bytes"] for file in files))
                _write_bytes(manifest_bytes(manifest), target / MANIFEST)
                self._sync_parents(target)
        except SlimtrimError:
            self.delete(prefix)  # a full disk must not stay full of half an artifact
            raise
        return manifest

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

    def free_bytes(self) -> int:
        """Return how many more bytes can be stored."""
        with _named_errors("the store"):
            return shutil.disk_usage(self._root).free

    def check(self) -> None:
        """Write, read back and remove a small object; raises StorageUnavailable when that fails."""
        self._check_root()
        probe = self._root / f"{_TEMPORARY}{os.urandom(8).hex()}"
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
        parts = key.removesuffix("/").split("/")
        if not all(part.isprintable() and part not in ("", ".", "..") and "\\" not in part for part in parts):
            raise ObjectNotFound(f"{key!r} is not the key of an object")
        path = self._root.joinpath(*parts)
        if path.parent.resolve() != path.parent:
            raise ObjectNotFound(f"there is no object {key!r}")
        return path

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


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each regular file of a folder with its relative name, in one order on every machine."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise StorageUnavailable(f"{path.name!r} is neither a file nor a folder, so it is not stored")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if name == MANIFEST:
                raise StorageUnavailable(f"{MANIFEST} is written by the store; the artifact may not bring its own")
            yield name, path


def _regular_files(start: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(start, followlinks=False):
        yield from (Path(folder, name) for name in names)


def _put_file(source: Path, target: Path, name: str) -> ManifestFile:
    """Store one file: a second name for the same bytes on the same disk, else a copy. Hashed either way."""
    place = target / name
    _make_folder(place.parent)
    temporary = place.with_name(f"{_TEMPORARY}{place.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, temporary)
    size, sha256 = _sync_and_hash(temporary)
    temporary.rename(place)
    _sync_folder(place.parent)
    return ManifestFile(path=name, bytes=size, sha256=sha256, media_type=media_type(name))


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, though a deletion may be clearing away an empty one of them just now."""
    for _ in range(_TRIES):
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except FileNotFoundError:
            continue
        return
    raise StorageUnavailable(f"the folder of {path.name!r} cannot be made")


def media_type(name: str) -> str:
    """Return the media type that a file is served with."""
    return MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")


def _sync_and_hash(path: Path) -> tuple[int, str]:
    """Force a file to disk, then hash what can be read back from it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _write_bytes(data: bytes, place: Path) -> None:
    _make_folder(place.parent)
    temporary = place.with_name(f"{_TEMPORARY}{place.name}")
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
