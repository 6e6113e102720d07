"""The second visitor: cut a block, make its weights smaller, write it, read it back, go on from there.

The written shard is the truth. Activations move forward through the block as the stock loader reads it back from
disk, so every block has been opened by stock code before the next one is calibrated on its outputs, and nothing of
ours decodes a weight on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

from compression.architectures import Architecture
from compression.block import Shell
from compression.checkpoint.reader import Reader, refuse_non_finite
from compression.checkpoint.writer import Writer
from compression.memory import give_back
from compression.recipe import Quantize
from compression.report import LedgerRow
from compression.slim import slim_
from compression.sweep import OnBlock, Stream
from compression.trimming import Cuts
from compression.trimming.surgery import cut_block


@dataclass
class Compressor:
    """Everything that stays the same from block to block."""

    architecture: Architecture
    cuts: Cuts
    step: Quantize | None
    trimmed: Shell
    """The trimmed model before slimming: what is calibrated."""
    artifact: Shell
    """The model that the artifact's config.json describes: what is opened again."""
    writer: Writer

    def run(self, reader: Reader, stream: Stream, on_block: OnBlock) -> list[LedgerRow]:
        """Write every kept block; leave the stream behind the artifact's last one. Returns a row per weight changed."""
        ledger: list[LedgerRow] = []
        blocks = len(self.cuts.blocks)
        for index, source in enumerate(self.cuts.blocks):
            saved = reader.block(source)
            refuse_non_finite(saved)
            saved = cut_block(saved, self.architecture, source=source, index=index, experts=self.cuts.experts.get(source))
            if self.step is not None:
                with self.trimmed.live(index, saved) as block:
                    ledger += slim_(saved, block, self.step, stream=stream, architecture=self.architecture, index=index)
            written = self.writer.block(index, saved)
            del saved
            with self.artifact.live(index, written) as block:
                del written
                stream.push(index, block)
            del block  # or the next block is read while this one is still held
            give_back()
            on_block(index + 1, blocks, f"block {source} is finished ({index + 1} of {blocks})")
        return ledger
