"""A checkpoint as the cuts leave it, read a block at a time: what every stage after choosing looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compression.architectures import Architecture
from compression.checkpoint.reader import Reader, refuse_non_finite
from compression.trimming import Cuts
from compression.trimming.surgery import cut_block, cut_config

Merge = Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]
"""Changes the tensors of a source block, given its index, before experts are taken out of it."""


class TrimmedReader:
    """A source as if it had been trimmed; blocks go by their index in the artifact."""

    def __init__(
        self, reader: Reader, architecture: Architecture, cuts: Cuts, *, zero_width: int | None = None, merge: Merge | None = None
    ) -> None:
        """``zero_width``: of the dense layers of zeros that stand for dropped MoE layers; None where nothing does."""
        self._reader, self._architecture, self._cuts = reader, architecture, cuts
        self._zero_width, self._merge = zero_width, merge
        self.config: dict[str, Any] = cut_config(reader.config, architecture, cuts, zero_width=zero_width)
        """config.json of the trimmed model, before slimming."""

    @property
    def folder(self) -> Path:
        """Where the source lies, with its tokenizer."""
        return self._reader.folder

    def __len__(self) -> int:
        """Return how many blocks are left."""
        return len(self._cuts.blocks)

    def source(self, index: int) -> int:
        """Return which block of the source became block ``index``."""
        return self._cuts.blocks[index]

    def outside(self) -> dict[str, Tensor]:
        """Return the tensors that belong to no block; NonFiniteWeights if one holds a NaN or an infinity."""
        tensors = self._reader.outside()
        refuse_non_finite(tensors)
        return tensors

    def block(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of one block, trimmed; NonFiniteWeights if one of the source holds a NaN or an infinity."""
        saved: Mapping[str, Tensor] = self._reader.block(self.source(index))
        refuse_non_finite(saved)
        if self._merge is not None:
            saved = self._merge(saved, self.source(index))
        return cut_block(saved, self._architecture, self._cuts, index, zero_width=self._zero_width)
