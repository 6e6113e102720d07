"""One block's tensors, and nothing else.

Offsets come from the headers that ``headers.py`` has already checked, so reading is a seek and a read into
fresh memory: no mapped pages stay behind when the block is let go.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compression.architectures import find_architecture
from compression.checkpoint.headers import Checkpoint, FolderFiles, TensorHeader, read_checkpoint
from compression.errors import BrokenCheckpoint, NonFiniteWeights
from compression.planner.inventory import is_left_behind

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CONFIG_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class Model(Protocol):
    """A checkpoint read a block at a time: as it is stored, or as cuts will leave it."""

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        ...

    def outside(self) -> dict[str, Tensor]:
        """Return the saved tensors that belong to no block."""
        ...

    def block(self, index: int) -> dict[str, Tensor]:
        """Return the saved tensors of one block."""
        ...


class Reader:
    """A checkpoint in a folder, read a block at a time; tensors that no stock class reads are left behind."""

    def __init__(self, folder: Path, checkpoint: Checkpoint | None = None) -> None:
        self.folder = folder
        self.checkpoint = checkpoint if checkpoint is not None else read_checkpoint(FolderFiles(folder))
        self.dense = self.checkpoint
        """The headers of what is handed out: the checkpoint's own, unless a reader unpacks it."""
        self.hashing = False
        """Whether to take the sha256 of every block that is read from here on, for ``content``."""
        self._digests: dict[int | None, str] = {}
        self._blocks: defaultdict[int | None, list[TensorHeader]] = defaultdict(list)
        self.architecture = find_architecture(self.checkpoint.config)
        count = self._count = self.architecture.block_count(self.checkpoint.config)
        for header in self.checkpoint.tensors.values():
            if not is_left_behind(self.architecture, header.name, count):
                self._blocks[self.architecture.block_of(header.name)].append(header)

    @property
    def config(self) -> dict[str, Any]:
        """config.json, with the dtype filled in where it is silent: that of the weights, as the stock loader decides."""
        config = self.checkpoint.config
        if config.get("dtype") or config.get("torch_dtype"):
            return config
        floating = (h.dtype for h in self.checkpoint.tensors.values() if h.dtype in _CONFIG_DTYPES)
        return {**config, "dtype": _CONFIG_DTYPES[next(floating, "F32")]}

    def block(self, index: int) -> dict[str, Tensor]:
        """Return the saved tensors of one block, by their full saved names."""
        return self._known(index, self._read(self._blocks.get(index, ())))

    def outside(self) -> dict[str, Tensor]:
        """Return the saved tensors that belong to no block: embeddings, final norm, head."""
        return self._known(None, self._read(self._blocks[None]))

    def content(self) -> str:
        """Return the sha256 of all tensors as they are stored; blocks that were read before are not read again."""
        self.hashing = True
        for index in (None, *range(self._count)):
            if index not in self._digests:
                self._known(index, self._read(self._blocks.get(index, ())))
        return hashlib.sha256(json.dumps(sorted(map(str, self._digests.items()))).encode()).hexdigest()

    def _known(self, index: int | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.hashing and index not in self._digests:
            digest = hashlib.sha256()
            for name in sorted(tensors):
                digest.update(name.encode())
                digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
            self._digests[index] = digest.hexdigest()
        return tensors

    def _read(self, headers: Iterable[TensorHeader]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        by_file: defaultdict[str, list[TensorHeader]] = defaultdict(list)
        for header in headers:
            by_file[header.file].append(header)
        for file, inside in by_file.items():
            with FolderFiles(self.folder).open(file) as handle:
                for header in sorted(inside, key=lambda h: h.start):
                    handle.seek(header.start)
                    tensors[header.name] = _tensor(header, bytearray(header.bytes), handle)
        return tensors


def refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteWeights naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        # One pass without a temporary of the tensor's size: a sum is finite only if every term is.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise NonFiniteWeights(f"{name} holds a NaN or an infinity; the checkpoint cannot be used as it is")


def _tensor(header: TensorHeader, buffer: bytearray, handle: BufferedReader) -> Tensor:
    if handle.readinto(buffer) != len(buffer):
        raise BrokenCheckpoint(f"{header.file} ends inside {header.name}; fetch the file again")
    dtype = TORCH_DTYPES[header.dtype]
    if not buffer:
        return torch.empty(header.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(header.shape)
