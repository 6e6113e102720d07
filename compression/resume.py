"""Exact resume: blocks that an earlier attempt finished are taken as they are, and the streams walk through them.

What a run's blocks depend on is hashed into its fingerprint: the weights, the calibration tokens, what is cut and how it is
slimmed, and ``ALGORITHM``, which stands for our own code. Where all of that is the same, a finished block's shard is that
block. The environment - device, versions, threads - changes roundings, not validity: it is written beside every block, and a
report tells of an artifact whose blocks come from several.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from compression.report import LedgerRow, ResumeNote
from compression.shelf import Files, Shelf
from compression.trimming import Cuts

ALGORITHM = 1
"""Raised by hand whenever the same run would write other blocks."""
_SHARD, _RECORD = "block.safetensors", "record.json"


@dataclass(frozen=True, slots=True)
class FinishedBlock:
    """One block of the artifact that need not be made."""

    shard: Path
    ledger: list[LedgerRow]
    environment: dict[str, str]

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors as they were written."""
        return load_file(self.shard)


@dataclass
class FinishedBlocks:
    """The blocks of one run: those taken from a shelf, and those put there."""

    shelf: Shelf | None
    fingerprint: str
    environment: dict[str, str]
    taken: dict[int, FinishedBlock] = field(default_factory=dict[int, FinishedBlock])

    def __post_init__(self) -> None:
        found = {} if self.shelf is None else self.shelf.find(self.fingerprint)
        # Up to the first gap: activations reach a block through all those before it.
        while (block := _read(found.get(_name(len(self.taken)), {}))) is not None:
            self.taken[len(self.taken)] = block

    def block(self, index: int) -> FinishedBlock | None:
        """Return a block that an earlier attempt finished, by its index in the artifact; None where it is to be made."""
        return self.taken.get(index)

    def keep(self, index: int, shard: Path, ledger: Sequence[LedgerRow]) -> None:
        """Have a block kept whose shard is written and read back."""
        if self.shelf is None:
            return
        record = self.shelf.folder / f"{_name(index)}.json"
        rows = [row.model_dump(mode="json") for row in ledger]
        record.write_text(json.dumps({"environment": self.environment, "ledger": rows}), encoding="utf-8")
        self.shelf.keep(self.fingerprint, _name(index), {_SHARD: shard, _RECORD: record})

    def notes(self) -> tuple[ResumeNote, ...]:
        """Return which blocks were taken, by the environment that made them."""
        made: dict[str, list[int]] = {}
        for index, block in self.taken.items():
            made.setdefault(json.dumps(block.environment, sort_keys=True), []).append(index)
        return tuple(
            ResumeNote(blocks=tuple(blocks), environment=json.loads(where), same=json.loads(where) == self.environment)
            for where, blocks in made.items()
        )


def fingerprint_of(
    *, content: str, calibration: str | None, config: Mapping[str, Any], steps: Sequence[Any], cuts: Cuts, zero_width: int | None
) -> str:
    """Return the hash of what the blocks of an artifact depend on, the environment apart.

    ``content``: of the source's weights. ``calibration``: of the tokens. ``config``: the artifact's config.json.
    """
    kept = {
        "blocks": cuts.blocks,
        "experts": sorted(cuts.experts.items()),
        "layers_dropped": sorted(cuts.layers_dropped),
        "merged": sorted((block, sorted(groups.items())) for block, groups in cuts.merged.items()),
        "skip": sorted(cuts.skip.items()),
        "zero_width": zero_width,
    }
    about = [ALGORITHM, content, calibration, config, list(steps), kept]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _name(index: int) -> str:
    return f"block-{index:05d}"


def _read(files: Files) -> FinishedBlock | None:
    """Return the block that these files hold; None where one is missing or of another version's form."""
    if _SHARD not in files or _RECORD not in files:
        return None
    try:
        record = json.loads(files[_RECORD].read_text(encoding="utf-8"))
        ledger = [LedgerRow.model_validate(row) for row in record["ledger"]]
        return FinishedBlock(files[_SHARD], ledger, dict(record["environment"]))
    except (ValueError, KeyError, ValidationError):
        return None
