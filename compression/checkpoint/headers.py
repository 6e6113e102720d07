"""What tensors a checkpoint holds, where, and how big: read from config.json and the tensor headers alone.

A safetensors file opens with the length of its header (8 bytes, little-endian), then the header: one JSON object
from tensor name to dtype, shape and the two offsets of its bytes, counted from the header's end. The tensors must
fill the rest of the file without hole or overlap, so a truncated file is noticed without reading it.
Format: https://github.com/huggingface/safetensors, section "Format".

Whoever made the files is not trusted. Lengths are checked before anything is read, marks are counted before
anything is parsed, and whatever is wrong is refused with the name of the file and the tensor. Weights are never read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

from compression.architectures import ARCHITECTURES, REFUSED
from compression.checkpoint.believed import MARKS_PER_TENSOR, believed_tensors
from compression.errors import (
    BrokenCheckpoint,
    ModelNotFound,
    RemoteCodeRequired,
    SourceNotAllowed,
    SourceUnavailable,
    UnsafeCheckpoint,
)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_MAX_CONFIG = 4 * 2**20
_MAX_CONFIG_DEPTH = 32
_MAX_HEADER = 40 * 10**6
"""Bytes of all the headers of a checkpoint together; the largest known need half of it."""
_MAX_NOT_ASCII = 4 * 2**20
"""Bytes of a JSON file beyond which it must be ASCII: one other letter makes all letters four times as big in memory."""
_MAX_CONFIG_MARKS = 100_000
_MAX_SHARDS = 4096
_MAX_RANK = 16
_MAX_NAME = 512


class CheckpointFiles(Protocol):
    """The files of one model: a folder, a repository on a hub, a bucket."""

    def names(self) -> list[str]:
        """Return the plain names of the files at the top level."""
        ...

    def size(self, name: str) -> int:
        """Return the bytes in a file."""
        ...

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, fewer only where the file ends."""
        ...


class FolderFiles:
    """The files of a folder; nothing outside ``root`` is ever opened, whatever a link says.

    ``root`` is the folder itself unless given: a hub cache keeps its snapshots as links into a folder beside them.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self._path = path
        self._root = (path if root is None else root).resolve()

    def names(self) -> list[str]:
        """Return the names of the folder's files, sorted; sub-folders are left out."""
        try:
            with os.scandir(self._path) as entries:
                return sorted(entry.name for entry in entries if not entry.is_dir())
        except OSError as error:
            raise ModelNotFound(f"there is no readable folder {self._path.name!r}: {error.strerror}") from error

    def open(self, name: str) -> BufferedReader:
        """Open a file for reading, or refuse it: a link that leads out, a pipe, a device."""
        return os.fdopen(self._open(name), "rb")

    def size(self, name: str) -> int:
        """Return the bytes in a file."""
        descriptor = self._open(name)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, fewer only where the file ends."""
        with self.open(name) as file:
            try:
                file.seek(start)
                return file.read(length)
            except OSError as error:
                raise SourceUnavailable(f"{name!r} cannot be read: {error.strerror}") from error

    def _open(self, name: str) -> int:
        """Open a regular file below the root; a pipe or a device would make the reader wait."""
        if not is_plain(name):
            raise SourceNotAllowed(f"{name[:_MAX_NAME]!r} is not a plain file name")
        try:
            target = (self._path / name).resolve(strict=True)
            if not target.is_relative_to(self._root):
                raise SourceNotAllowed(f"{name!r} is a link that leads out of the model's folder")
            descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, RuntimeError) as error:  # links in a circle: RuntimeError up to Python 3.12, then ELOOP
            if not isinstance(error, OSError) or error.errno in (errno.ENOENT, errno.ELOOP):
                raise BrokenCheckpoint(f"{name!r} is missing, or is a link that leads nowhere") from error
            raise SourceUnavailable(f"{name!r} cannot be opened: {error.strerror}") from error
        fault = ""
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            fault = "is not a regular file"
        elif not _is_held_below(descriptor, self._root):
            fault = "is a link that leads out of the model's folder"
        if fault:
            os.close(descriptor)
            raise SourceNotAllowed(f"{name!r} {fault}")
        return descriptor


def _is_held_below(descriptor: int, root: Path) -> bool:
    """Say whether what was opened lies below ``root``: a folder on the way may have become a link since it was resolved.

    The kernel knows; where it does not tell (no /proc), what was resolved before must do.
    """
    try:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(root)
    except OSError:
        return True


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a checkpoint; ``start`` and ``stop`` are offsets in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """The bytes that the tensor takes on disk."""
        return self.stop - self.start


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights."""

    config: dict[str, Any]
    tensors: dict[str, TensorHeader]


def read_checkpoint(files: CheckpointFiles) -> Checkpoint:
    """Return the config and every tensor's header, or refuse what is missing, unsafe or broken."""
    names = set(files.names())
    config = _read_config(files, names)
    tensors: dict[str, TensorHeader] = {}
    most = believed_tensors(config)
    left, marks = _MAX_HEADER, MARKS_PER_TENSOR * most
    places, shards = _find_shards(files, names, marks)
    for file in shards:
        raw = _raw_header(files, file, left)
        left -= len(raw)
        marks -= _checked_marks(raw, file, marks)
        for tensor in _read_header(files, file, raw):
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise BrokenCheckpoint(f"tensor {tensor.name!r} is in {other.file!r} and again in {file!r}")
        if len(tensors) > most:
            raise BrokenCheckpoint(
                f"{len(tensors)} tensors were found up to {file!r}; with this {CONFIG}, at most {most} are believed"
            )
    for name, file in places.items():
        if name not in tensors or tensors[name].file != file:
            raise BrokenCheckpoint(f"{INDEX} places tensor {name[:_MAX_NAME]!r} in {file!r}, which does not hold it")
    return Checkpoint(config, tensors)


def is_plain(name: str) -> bool:
    """Say whether a name stays in its folder: no separator, no control character, not a way up."""
    return 0 < len(name) <= _MAX_NAME and name.isprintable() and name not in (".", "..") and not set(name) & set("/\\")


def _read_config(files: CheckpointFiles, names: set[str]) -> dict[str, Any]:
    if CONFIG not in names:
        raise ModelNotFound(f"there is no {CONFIG}, so there is no model here")
    config = _parse_object(_read_whole(files, CONFIG, _MAX_CONFIG, _MAX_CONFIG_MARKS), CONFIG)
    keys_found = _check_depth(config)
    # A supported family opens with its stock class, whatever code the checkpoint offers besides; that code is never run.
    if "auto_map" in keys_found and str(config.get("model_type")) not in {*ARCHITECTURES, *REFUSED}:
        raise RemoteCodeRequired(
            f"{CONFIG} asks for the model's own code (auto_map), and none is ever run; supported without it: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return config


def _check_depth(config: dict[str, Any]) -> set[str]:
    """Refuse deep nesting, which breaks whoever walks it next; return every key that holds something."""
    keys: set[str] = set()
    level: list[Any] = [config]
    for _ in range(_MAX_CONFIG_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                members = cast("dict[str, Any]", value)
                keys.update(key for key, member in members.items() if member)
                below.extend(members.values())
            elif isinstance(value, list):
                below.extend(cast("list[Any]", value))
        level = below
        if not level:
            return keys
    raise BrokenCheckpoint(f"{CONFIG} is nested more than {_MAX_CONFIG_DEPTH} deep")


def _find_shards(files: CheckpointFiles, names: set[str], marks: int) -> tuple[dict[str, str], list[str]]:
    """Return what the index claims (nothing without one) and the files to read; a single file wins, as in stock loaders."""
    if SINGLE in names:
        return {}, [SINGLE]
    if INDEX in names:
        places = _read_index(files, marks)
        shards = sorted(set(places.values()))
        _check_shards(shards, names)
        return places, shards
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise UnsafeCheckpoint(f"only pickled weights were found ({pickled[0]!r}); convert the model to safetensors")
    raise BrokenCheckpoint(f"there is neither {SINGLE} nor {INDEX}")


def _read_index(files: CheckpointFiles, marks: int) -> dict[str, str]:
    places = _parse_object(_read_whole(files, INDEX, _MAX_HEADER, marks), INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BrokenCheckpoint(f"{INDEX} has no weight_map from tensor to file")
    for name, file in cast("dict[str, object]", places).items():
        if not isinstance(file, str) or not is_plain(file) or not file.endswith(".safetensors"):
            raise BrokenCheckpoint(
                f"{INDEX} places tensor {name[:_MAX_NAME]!r} in {str(file)[:_MAX_NAME]!r}; "
                "only plain .safetensors names in the same folder are read"
            )
    return cast("dict[str, str]", places)


def _check_shards(shards: list[str], names: set[str]) -> None:
    if len(shards) > _MAX_SHARDS:
        raise BrokenCheckpoint(f"{INDEX} names {len(shards)} files; at most {_MAX_SHARDS} are read")
    for file in shards:
        if file not in names:
            raise BrokenCheckpoint(f"{INDEX} names {file!r}, which is missing")


def _raw_header(files: CheckpointFiles, file: str, limit: int) -> bytes:
    """Return the header of a safetensors file, once it is known to be harmless to read."""
    size = files.size(file)
    if size < 8:
        raise BrokenCheckpoint(f"{file!r} is {size} bytes long, too short for a safetensors header")
    (length,) = struct.unpack("<Q", _read_exactly(files, file, 0, 8))
    if length > limit:
        raise BrokenCheckpoint(
            f"{file!r} claims a header of {length} bytes; of all headers together at most {_MAX_HEADER} bytes are read"
        )
    if 8 + length > size:
        raise BrokenCheckpoint(f"{file!r} is {size} bytes long and ends inside its header of {length} bytes")
    return _read_exactly(files, file, 8, length)


def _read_header(files: CheckpointFiles, file: str, raw: bytes) -> list[TensorHeader]:
    """Return the tensors of one safetensors file, in the order of their bytes."""
    entries = _parse_object(raw, file)
    entries.pop("__metadata__", None)
    tensors = sorted(_read_entries(entries, file, 8 + len(raw)), key=lambda tensor: (tensor.start, tensor.stop))
    _check_filled(tensors, file, 8 + len(raw), files.size(file))
    return tensors


def _read_entries(entries: dict[str, Any], file: str, data: int) -> Iterator[TensorHeader]:
    """Turn a header's entries into tensors; ``data`` is where the file's tensor bytes begin."""
    for name, entry in entries.items():
        if not (0 < len(name) <= _MAX_NAME and name.isprintable()):
            raise BrokenCheckpoint(f"{file!r} holds a tensor without a printable name: {name[:_MAX_NAME]!r}")
        if not isinstance(entry, dict):
            raise BrokenCheckpoint(f"tensor {name!r} in {file!r} is not described by an object")
        members = cast("dict[str, Any]", entry)
        dtype, shape, offsets = members.get("dtype"), _sizes(members.get("shape")), _sizes(members.get("data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise BrokenCheckpoint(f"tensor {name!r} in {file!r} has an unknown dtype {str(dtype)[:40]!r}")
        if shape is None or offsets is None or len(offsets) != 2:
            raise BrokenCheckpoint(f"tensor {name!r} in {file!r} has no proper shape and data_offsets")
        if offsets[1] - offsets[0] < 0 or (offsets[1] - offsets[0]) * 8 != prod(shape) * DTYPE_BITS[dtype]:
            raise BrokenCheckpoint(
                f"tensor {name!r} in {file!r} of dtype {dtype} and shape {list(shape)} "
                f"cannot fill bytes {offsets[0]} to {offsets[1]}"
            )
        yield TensorHeader(name, dtype, shape, file, data + offsets[0], data + offsets[1])


def _sizes(value: object) -> tuple[int, ...] | None:
    """Return a list of counts as a tuple; None for anything else. The limits keep the product cheap."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    if len(items) > _MAX_RANK:
        return None
    for item in items:
        if type(item) is not int or not 0 <= item < 2**63:  # type(): True is no size
            return None
    return cast("tuple[int, ...]", tuple(items))


def _check_filled(tensors: Iterable[TensorHeader], file: str, data: int, size: int) -> None:
    """Refuse holes, overlaps, a truncated file and bytes that belong to no tensor."""
    end = data
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise BrokenCheckpoint(f"tensor {tensor.name!r} in {file!r} {fault}: it begins at {tensor.start}, not {end}")
        end = tensor.stop
        if end > size:
            raise BrokenCheckpoint(f"{file!r} is truncated: it is {size} bytes long and tensor {tensor.name!r} ends at {end}")
    if end != size:
        raise BrokenCheckpoint(f"{file!r} is {size} bytes long, but its tensors end at {end}")


def _read_whole(files: CheckpointFiles, name: str, limit: int, marks: int) -> bytes:
    size = files.size(name)
    if size > limit:
        raise BrokenCheckpoint(f"{name} is {size} bytes long; at most {limit} are read")
    raw = _read_exactly(files, name, 0, size)
    _checked_marks(raw, name, marks)
    return raw


def _read_exactly(files: CheckpointFiles, name: str, start: int, length: int) -> bytes:
    data = files.read(name, start, length)
    if len(data) != length:
        raise BrokenCheckpoint(f"{name!r} gave {len(data)} of {length} bytes at {start}")
    return data


def _checked_marks(raw: bytes, name: str, limit: int) -> int:
    """Count brackets and commas: an empty list is two bytes on disk and a hundred in memory, so they bound what parsing takes."""
    marks = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    if marks > limit:
        raise BrokenCheckpoint(f"{name} holds {marks} brackets and commas, more than the {limit} that are parsed")
    return marks


def _parse_object(raw: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in a file whose marks were counted; a repeated key is refused: readers differ in which counts."""
    if len(raw) > _MAX_NOT_ASCII and not raw.isascii():
        raise BrokenCheckpoint(f"{name} is {len(raw)} bytes long; beyond {_MAX_NOT_ASCII} only plain ASCII is parsed")
    try:
        value: object = json.loads(raw.decode("utf-8"), object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{name} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{name} does not hold a JSON object")
    return cast("dict[str, Any]", value)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{repeated[:_MAX_NAME]!r} appears twice")
    return members
