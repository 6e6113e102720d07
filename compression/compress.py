"""The second visitor: cut a block, make its weights smaller, write it, open it again, go on from there.

What is written is the truth. Activations move on through the block as the stock loader makes it of the very tensors that
go into the shard, so every block has been opened by stock code before the next one is calibrated on its outputs, and
nothing of ours decodes a weight on the way. Meanwhile the shard is written, read back and compared (``writer.py``).

Two streams walk along. Calibration tokens are computed however is quickest. The witness, one small batch of them, is
computed as the stock model computes it, and ends in the logits that the artifact must give when it is opened again.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from compression.architectures import Architecture
from compression.block import Shell
from compression.checkpoint.writer import Writer
from compression.memory import give_back
from compression.moe import attention_module
from compression.report import LedgerRow
from compression.resume import FinishedBlock, FinishedBlocks
from compression.slim import Slimming, slim_
from compression.sweep import OnBlock, Stream
from compression.trimming.view import TrimmedReader


@dataclass
class Compressor:
    """Everything that stays the same from block to block."""

    architecture: Architecture
    slimming: Slimming
    trimmed: Shell
    """The trimmed model before slimming: what is calibrated."""
    artifact: Shell
    """The model that the artifact's config.json describes: what is opened again."""
    writer: Writer
    calibration: Stream | None
    """None where no method needs to know what enters a weight."""
    witness: Stream
    finished: FinishedBlocks = field(default_factory=lambda: FinishedBlocks(None, "", {}))
    """Blocks that earlier attempts at the same artifact left, and where this one leaves its own."""

    def run(self, trimmed: TrimmedReader, on_block: OnBlock) -> list[LedgerRow]:
        """Write every kept block; leave the witness behind the artifact's last one. Returns a row per weight changed."""
        ledger: list[LedgerRow] = []
        blocks = len(trimmed)
        for index in range(blocks):
            if (made := self.finished.block(index)) is not None:
                saved, rows = self._take(made, trimmed, index, is_last=index + 1 == blocks), made.ledger
            else:
                saved = trimmed.block(index)
                rows = self._slim_(saved, index, trimmed.source(index)) if self.slimming.steps else []
                self.writer.block(index, saved, partial(self._keep, index, rows))
            ledger += rows
            self._advance(saved, index, trimmed.source(index), is_last=index + 1 == blocks)
            del saved  # or the next block is read while this one is still held
            give_back()
            on_block(index + 1, blocks, f"block {trimmed.source(index)} is finished ({index + 1} of {blocks})")
        return ledger

    def _take(self, made: FinishedBlock, trimmed: TrimmedReader, index: int, *, is_last: bool) -> dict[str, Tensor]:
        """Put a finished block in its place, and bring calibration to where slimming the block would have left it."""
        saved = made.tensors()
        self.writer.adopt(index, saved, made.shard)
        if self.calibration is not None and not self.slimming.propagate_error and not is_last:
            with self.trimmed.live(index, trimmed.block(index)) as block:
                self.calibration.push(index, self.calibration.convert_(block))
        return saved

    def _keep(self, index: int, ledger: list[LedgerRow], shard: Path) -> None:
        self.finished.keep(index, shard, ledger)

    def _slim_(self, saved: dict[str, Tensor], index: int, source: int) -> list[LedgerRow]:
        with self.trimmed.live(index, saved) as block:
            if self.calibration is not None:
                self.calibration.convert_(block)
            return slim_(
                saved,
                block,
                self.slimming,
                stream=self.calibration,
                architecture=self.architecture,
                index=index,
                source=source,
            )

    def _advance(self, saved: dict[str, Tensor], index: int, source: int, *, is_last: bool) -> None:
        with self.artifact.live(index, saved) as block:
            self.witness.push(index, block)
            if self.calibration is not None and self.slimming.propagate_error and not is_last:
                self.calibration.convert_(block)
                # Unless it was slimmed too, attention answers what it did when the block was calibrated.
                with ExitStack() as stack:
                    if self.slimming.treatment("attention", source) is None:
                        stack.enter_context(self.calibration.repeated(attention_module(self.architecture, block)))
                    self.calibration.push(index, block)
