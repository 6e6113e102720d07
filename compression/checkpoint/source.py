"""The checkpoint that is to be compressed, always dense: quantized tensors are unpacked as a block is asked for.

Whoever reads a source sees ``{saved name: dense tensor}`` of one block, however the files store it. What was never
quantized keeps its very bytes; everything else goes through the stock quantizer hooks, one block at a time.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.block import Unpacker
from compression.checkpoint.headers import Checkpoint, FolderFiles, TensorHeader, read_checkpoint
from compression.checkpoint.reader import TORCH_DTYPES, Reader
from compression.errors import BrokenCheckpoint
from compression.planner.inventory import dense_checkpoint
from compression.planner.unpacked import Unpacked


def open_source(folder: Path, device: torch.device | str = "cpu") -> Reader:
    """Return a reader of dense blocks; quantized ones are unpacked on the device and handed over on the host."""
    checkpoint = read_checkpoint(FolderFiles(folder))
    dense, unpacked = dense_checkpoint(checkpoint)
    return Reader(folder, dense) if unpacked is None else UnpackingReader(folder, checkpoint, dense, unpacked, device)


class UnpackingReader(Reader):
    """A quantized checkpoint in a folder, read as the dense one that it stands for."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, dense: Checkpoint, unpacked: Unpacked, device: torch.device | str
    ) -> None:
        super().__init__(folder, checkpoint)
        self.dense = dense
        self._as_stored = {name for name, header in dense.tensors.items() if checkpoint.tensors.get(name) is header}
        self._planned: defaultdict[int | None, list[TensorHeader]] = defaultdict(list)
        for name, header in dense.tensors.items():
            if name not in self._as_stored:
                self._planned[self.architecture.block_of(name)].append(header)
        self._unpacker = Unpacker(dense.config, unpacked.loading, device)

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the dense model: it names its dtype and no quantization."""
        return self.dense.config

    def block(self, index: int) -> dict[str, Tensor]:
        """Return the dense tensors of one block, by the names that the stock class saves."""
        return self._unpacked(super().block(index))

    def outside(self) -> dict[str, Tensor]:
        """Return the dense tensors that belong to no block."""
        return self._unpacked(super().outside())

    def _unpacked(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        packed: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            (tensors if name in self._as_stored else packed)[name] = tensor
        stored.clear()
        if not packed:
            return tensors
        block = self.architecture.block_of(min(packed))
        return tensors | self._checked(self._unpacker.dense(packed), block)

    def _checked(self, unpacked: dict[str, Tensor], block: int | None) -> dict[str, Tensor]:
        """Return of the unpacked tensors those that were planned, each as it was planned; scales may be left over."""
        tensors: dict[str, Tensor] = {}
        for header in self._planned[block]:
            tensor = unpacked.get(header.name)
            if tensor is None or header.shape != tuple(tensor.shape) or TORCH_DTYPES[header.dtype] != tensor.dtype:
                found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise BrokenCheckpoint(
                    f"the stock quantizer hooks give {found} for {header.name}, where its headers mean "
                    f"{header.dtype} {list(header.shape)}"
                )
            tensors[header.name] = tensor.cpu()
        return tensors
