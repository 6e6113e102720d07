"""The manifest: every file of an artifact with its bytes and its sha256. Its own hash stands for the whole artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from jobs.errors import StorageUnavailable

MANIFEST = "manifest.json"
_CHUNK = 2**20

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


def manifest_of(files: list[ManifestFile]) -> Manifest:
    """Return the manifest of these files."""
    return Manifest(files=files, bytes=sum(file["bytes"] for file in files))


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the manifest in the one spelling that is stored and hashed."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def manifest_sha256(manifest: Manifest) -> str:
    """Return the hash that stands for the whole artifact, since the manifest holds every file's own."""
    return hashlib.sha256(manifest_bytes(manifest)).hexdigest()


def as_manifest(data: dict[str, Any]) -> Manifest:
    """Return a manifest read back from JSON, with its types."""
    return Manifest(files=[ManifestFile(**file) for file in data["files"]], bytes=data["bytes"])


def media_type(name: str) -> str:
    """Return the media type that a file is served with."""
    return MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each regular file of a folder with its relative name, in one order on every machine; refuse anything else."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise StorageUnavailable(f"{path.name!r} is neither a file nor a folder, so it is not stored")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if name == MANIFEST:
                raise StorageUnavailable(f"{MANIFEST} is written by the store; the artifact may not bring its own")
            yield name, path


def hash_file(path: Path) -> tuple[int, str]:
    """Return a file's bytes and its sha256."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
