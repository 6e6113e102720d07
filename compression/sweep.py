"""Walk the blocks of a checkpoint in order, carry the activations, hand each live block to a visitor.

The one idea that carries the library: a model is never in memory as a whole. Peak memory is one block and one
micro-batch on the device; activations wait on the host between blocks.

A processor without 16-bit arithmetic multiplies bf16 matrices six to seven times slower than float32 ones. There, blocks are
computed in float32 with the very weights that were saved: statistics and losses are those of the model, and lack only the
rounding between operations. What must equal the stock model bit for bit is computed as it is stored.

Shapes: N sequences, B sequences in a micro-batch, S tokens each, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compression.block import Call, Shell
from compression.checkpoint.reader import Model, refuse_non_finite
from compression.errors import NonFiniteWeights
from compression.memory import give_back

TOKENS_PER_MICRO_BATCH = 4096
"""Enough rows to keep every matrix product busy, few enough that one expert layer's temporaries stay small."""

Observer = Callable[[int, Tensor, Tensor], None]
"""Told the index of the micro-batch, and the block's input and output [B, S, D] on the device."""

OnBlock = Callable[[int, int, str], None]
"""Told after every block how many are done, of how many, and a message; may raise Stopped."""


class Visitor(Protocol):
    """Whoever wants to see every block in turn; it pushes the stream through the block itself."""

    def visit(self, index: int, block: nn.Module, stream: Stream) -> None:
        """Look at block ``index``; on return, the stream must have passed through it."""
        ...


class Stream:
    """Token sequences on their way through the blocks."""

    def __init__(
        self, shell: Shell, ids_NS: Tensor, attention_mask_NS: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        """Embed the tokens and record what the stock model passes to each block.

        ``dtype``: what blocks compute in; as the model is stored when it is not given. ``convert_`` brings a block there.
        """
        rows = max(1, TOKENS_PER_MICRO_BATCH // ids_NS.shape[1])
        masks = [None] * ids_NS.shape[0] if attention_mask_NS is None else attention_mask_NS.split(rows)
        self.device = shell.device
        self.dtype = dtype or shell.dtype
        self.stored = shell.dtype
        self.ids: list[Tensor] = list(ids_NS.split(rows))
        self.hidden: list[Tensor] = []
        self.blocks = len(shell.blocks)
        self._answers: list[Any] | None = None
        self._calls: list[tuple[Call, ...]] = []
        seen: list[Tensor] = []
        for ids_BS, mask_BS in zip(self.ids, masks, strict=False):
            recording = shell.record(ids_BS, mask_BS)
            self.hidden.append(recording.hidden_BSD.to(self.dtype).cpu())
            self._calls.append(tuple(_share(call, seen, self.stored, self.dtype) for call in recording.calls))

    def fork(self) -> Stream:
        """Return a stream that goes its own way from here: the same tokens, and what the stock model passes to blocks."""
        twin = copy(self)
        twin.hidden, twin._answers = list(self.hidden), None
        return twin

    def convert_(self, block: nn.Module) -> nn.Module:
        """Bring a live block's weights into the dtype that the stream computes in, and return it."""
        return block if self.dtype == self.stored else block.to(self.dtype)

    def push(self, index: int, block: nn.Module, observe: Observer | None = None) -> None:
        """Replace the activations by the block's outputs; NonFiniteWeights if one is NaN or infinite."""
        for batch, output_BSD in self.peek(index, block, observe):
            if not torch.isfinite(output_BSD.sum(dtype=torch.float64)):
                raise NonFiniteWeights(f"the activations leaving block {index} hold a NaN or an infinity")
            self.hidden[batch] = output_BSD.cpu()

    @torch.no_grad()
    def peek(self, index: int, block: nn.Module, observe: Observer | None = None) -> Generator[tuple[int, Tensor]]:
        """Yield each micro-batch's index and block output, and leave the activations as they are."""
        for batch, hidden_BSD in enumerate(self.hidden):
            call = self._calls[batch][index]
            input_BSD = hidden_BSD.to(self.device)
            output = block(input_BSD, *call.args, **call.kwargs)
            output_BSD = output[0] if isinstance(output, tuple) else output
            if observe is not None:
                observe(batch, input_BSD, output_BSD)
            yield batch, output_BSD

    @contextmanager
    def remembered(self, module: nn.Module) -> Generator[None]:
        """Keep what a module answers to each micro-batch, for ``repeated``; on the host alone, where it need not be moved."""
        self._answers = [] if self.device.type == "cpu" else None
        answers = self._answers
        hook = module.register_forward_hook(lambda _m, _a, output: answers.append(output) if answers is not None else None)
        try:
            yield
        finally:
            hook.remove()

    def forget(self) -> None:
        """Let go of what was remembered."""
        self._answers = None

    @contextmanager
    def repeated(self, module: nn.Module) -> Generator[None]:
        """Let a module that has not changed answer what it answered before, if that was remembered; forget it then."""
        answers, self._answers = self._answers, None
        if answers is not None:
            remaining = iter(answers)
            module.forward = lambda *_, **__: next(remaining)
        try:
            yield
        finally:
            module.__dict__.pop("forward", None)

    def logits(self, shell: Shell) -> Iterator[Tensor]:
        """Yield the logits [B, S, V] of each micro-batch, in the stream's dtype; call after the last block."""
        if self.dtype != self.stored:
            shell.convert_(self.dtype)
        for ids_BS, hidden_BSD in zip(self.ids, self.hidden, strict=True):
            yield shell.logits(ids_BS, hidden_BSD)


def working_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return what blocks are computed in where no bit depends on it: float32 on processors without 16-bit arithmetic."""
    if device.type != "cpu" or stored == torch.float32:
        return stored
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return stored if stored == torch.bfloat16 and has_bf16 else torch.float32


class Push:
    """The visitor that only carries the activations forward."""

    def visit(self, index: int, block: nn.Module, stream: Stream) -> None:
        """Push the stream through the block."""
        stream.push(index, block)


def sweep(shell: Shell, reader: Model, stream: Stream, visitor: Visitor, on_block: OnBlock) -> None:
    """Show every block of the checkpoint to the visitor, one live block at a time."""
    blocks = len(shell.blocks)
    for index in range(blocks):
        saved = reader.block(index)
        refuse_non_finite(saved)
        with shell.live(index, saved) as block:
            del saved
            visitor.visit(index, stream.convert_(block), stream)
        del block  # or the next one is read while this one is still held
        give_back()
        on_block(index + 1, blocks, f"block {index + 1} of {blocks}")


def _share(call: Call, seen: list[Tensor], stored: torch.dtype, dtype: torch.dtype) -> Call:
    # Micro-batches of one shape get equal masks and rotary tables: keep one copy of each.
    def shared(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _intern(value.to(dtype) if value.dtype == stored else value, seen)
        if isinstance(value, tuple | list):
            return type(value)(shared(item) for item in value)
        if isinstance(value, dict):
            return {key: shared(item) for key, item in value.items()}
        return value

    return Call(shared(call.args), shared(call.kwargs))


def _intern(tensor: Tensor, seen: Sequence[Tensor] | list[Tensor]) -> Tensor:
    for known in seen:
        if known is tensor:
            return known
        if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor):
            return known
    assert isinstance(seen, list)
    seen.append(tensor)
    return tensor
