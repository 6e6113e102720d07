"""Shards as blocks finish, then the index; config, tokenizer and everything else a stock loader opens.

One shard per block: a finished block is a finished file, and verification can open any window of blocks from
the shards that hold it. Files are written beside the computing, one at a time and each read back and compared with what was
to be written; at most one waits, so that memory holds two blocks at the most.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression.architectures import find_architecture
from compression.checkpoint.headers import FolderFiles
from compression.errors import DiskFull, VerificationFailed
from compression.recipe import Pattern
from compression.runtime import slimtrim_runtime
from compression.runtime.slimtrim_runtime import declared

RUNTIME = Path(slimtrim_runtime.__file__)
"""The file that opens artifacts of the custom profile; it ships inside them."""
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md", "report.json", "report.html", "quantize_config.json"}
_COPIED_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".md", ".tiktoken"}
OnShard = Callable[[Path], None]
"""Told where a shard lies that is written and was read back."""
_COPIED_NAMES = {"LICENSE", "LICENCE", "NOTICE", "USE_POLICY"}


class Writer:
    """The artifact's folder, filled in the order in which blocks finish."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write config.json at once: from here on the folder says what it is going to hold."""
        self.folder = folder
        self.bytes = 0
        """Tensor bytes written so far."""
        self._shards = find_architecture(config).block_count(config) + 1
        self._needs_runtime = needs_runtime(config)
        self._weight_map: dict[str, str] = {}
        self._hand = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._writing: tuple[Future[Path], OnShard] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)

    def outside(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the tensors written that belong to no block; they must stay as they are."""
        self._write(0, tensors)

    def adopt(self, index: int, tensors: Mapping[str, Tensor], shard: Path) -> None:
        """Take one block's shard as it is, from an earlier attempt at the same artifact; ``tensors``: what it holds."""
        place = self._place(index + 1, tensors)
        try:
            os.link(shard, place)
        except OSError:  # another disk, or one without links
            shutil.copyfile(shard, place)

    def block(self, index: int, tensors: Mapping[str, Tensor], on_shard: OnShard | None = None) -> None:
        """Have one block's shard written; its tensors must stay as they are. ``on_shard`` hears when it is there.

        Raises what went wrong with the shard before: DiskFull where there was no room, VerificationFailed where the file
        does not hold what it was given.
        """
        self._write(index + 1, tensors, on_shard)

    def close(self) -> None:
        """Wait for the shard in hand, and let the writing thread end."""
        try:
            self._wait()
        finally:
            self._hand.shutdown()

    def finish(self, source: Path) -> None:
        """Write the index, and copy what is neither weights nor code from the source's folder; add the loader if needed."""
        self.close()
        metadata = {"total_size": self.bytes}
        weight_map = dict(sorted(self._weight_map.items()))
        write_json(self.folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
        files = FolderFiles(source)
        for name in files.names():
            wanted = Path(name).suffix in _COPIED_SUFFIXES or name in _COPIED_NAMES
            if wanted and name not in _NOT_COPIED and not name.endswith(".index.json"):
                with files.open(name) as file, (self.folder / name).open("wb") as copy:
                    shutil.copyfileobj(file, copy)
        if self._needs_runtime:
            shutil.copyfile(RUNTIME, self.folder / RUNTIME.name)

    def _write(self, shard: int, tensors: Mapping[str, Tensor], on_shard: OnShard | None = None) -> None:
        self._wait()
        place = self._place(shard, tensors)
        writing = self._hand.submit(_write_shard, place, dict(tensors))
        self._writing = writing, on_shard or (lambda _: None)

    def _place(self, shard: int, tensors: Mapping[str, Tensor]) -> Path:
        name = shard_name(shard, self._shards)
        self._weight_map |= dict.fromkeys(tensors, name)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        return self.folder / name

    def _wait(self) -> None:
        if self._writing is not None:
            (writing, on_shard), self._writing = self._writing, None
            on_shard(writing.result())


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> Path:
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise _as_ours(error, path) from error
    found = load_file(path)
    for name, tensor in tensors.items():
        # As bytes: a NaN would not equal itself, and 8-bit floats know no comparison.
        if name not in found or not torch.equal(_bytes_of(found[name]), _bytes_of(tensor)):
            raise VerificationFailed(
                f"read back, {path.name} does not hold what was written for {name}; the disk is not to be trusted"
            )
    return path


def _as_ours(error: Exception, path: Path) -> Exception:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return DiskFull(f"there is no room for {path.name}; free some space and try again")
    return error


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def shard_name(shard: int, shards: int) -> str:
    """Return the file name of shard ``shard``, counted from 0; shard 0 holds what lies outside the blocks."""
    return f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write_json(path: Path, content: object) -> None:
    """Write JSON as people and stock tools expect it: indented, with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sparse_config(pattern: Pattern, trimmed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the entries of config.json that declare packed zeros, beside what the ``trimmed`` config already declares."""
    section = (trimmed or {}).get("slimtrim", {"profile": "custom"})
    return declared({**section, "sparse": {"pattern": f"{pattern.n}:{pattern.m}"}})


def needs_runtime(config: Mapping[str, Any]) -> bool:
    """Say whether only its own loader opens an artifact with this config.json."""
    return not {"sparse", "experts", "packed_experts"}.isdisjoint(config.get("slimtrim", {}))
