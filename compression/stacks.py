"""One stack of matrices through pruning and quantization, and into the names under which it is saved.

Shapes: E experts, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compression.checkpoint.packing import pack
from compression.checkpoint.sparse import packed_tensors
from compression.methods import PRUNERS, QUANTIZERS
from compression.recipe import Pattern as PackedPattern
from compression.slimming import magnitude, rtn
from compression.slimming.grid import AnyGrid, FloatGrid, Quantized, dequantize
from compression.slimming.hessian import Statistic
from compression.slimming.masks import Pattern

LEAST = 0.5
"""Tokens per input below which an expert is slimmed without calibration: decision record 0015."""


@dataclass(frozen=True)
class Treatment:
    """What is done to the matrices of one component."""

    prune: str | None
    pattern: Pattern | None
    quantize: str | None
    scheme: str
    grid: AnyGrid | None
    packed: PackedPattern | None
    """The pattern in which the pruned weight is stored without its zeros; None where it is stored with them."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods asked for, in the order in which they work."""
        return tuple(name for name in (self.prune, self.quantize) if name is not None)


@dataclass(frozen=True)
class Slimmed:
    """A stack as it was, and what became of it."""

    treatment: Treatment
    weight_EOI: Tensor
    became_EOI: Tensor
    """The weights that a loader computes, in the dtype in which they are saved."""
    quantized: Quantized | None
    statistic: Tensor | None
    """What is known of the inputs: Gram matrices [E, I, I], mean squares [E, I], or nothing."""
    used: tuple[tuple[str, ...], ...]
    """The methods really used, for each expert."""
    damping_E: Tensor
    """The largest that one of the methods really used took; zero where none took any."""
    moved_EI: Tensor | None = None
    """What the weights were multiplied with, and their inputs divided by, before they were slimmed; None for nothing."""

    def outputs(self, part: slice) -> Slimmed:
        """Return the same for some of the outputs, as views."""
        quantized = self.quantized
        if quantized is not None:
            quantized = Quantized(quantized.codes_EOI[:, part], quantized.scale_EOG[:, part])
        return replace(self, weight_EOI=self.weight_EOI[:, part], became_EOI=self.became_EOI[:, part], quantized=quantized)


@torch.no_grad()
def slim_stack(weight_EOI: Tensor, statistic: Statistic | None, treatment: Treatment) -> Slimmed:
    """Prune and quantize a stack; an expert of whose inputs too little is known is slimmed without calibration."""
    experts, _, inputs = weight_EOI.shape
    starved_E, moved_EI = torch.zeros(experts, dtype=torch.bool), None
    if statistic is not None:
        starved_E, moved_EI = statistic.tokens_E < LEAST * inputs, statistic.moved_EI
    used: list[list[str]] = [[] for _ in range(experts)]
    became_EOI, quantized = weight_EOI, None
    damping_E = torch.zeros(experts, dtype=torch.float64)
    if treatment.prune is not None:
        assert treatment.pattern is not None
        pruner = PRUNERS[treatment.prune]
        became_EOI, found_E = pruner.run(weight_EOI, statistic, treatment.pattern)
        plain_E = _plain(starved_E, found_E, needed=pruner.needs != "nothing")
        damping_E = torch.where(plain_E, 0.0, found_E)
        if plain_E.any():
            plainly_moved_EI = None if moved_EI is None else moved_EI[plain_E]
            became_EOI[plain_E] = magnitude.prune(weight_EOI[plain_E], treatment.pattern, plainly_moved_EI)
        _note(used, plain_E, treatment.prune, pruner.fallback)
    if treatment.quantize is not None:
        assert treatment.grid is not None
        quantizer = QUANTIZERS[treatment.quantize]
        quantized, found_E = quantizer.run(became_EOI, statistic, treatment.grid)
        plain_E = _plain(starved_E, found_E, needed=quantizer.needs != "nothing")
        damping_E = torch.maximum(damping_E, torch.where(plain_E, 0.0, found_E))
        if plain_E.any():
            rounded = rtn.round_to_nearest(became_EOI[plain_E], treatment.grid)
            _put_(quantized.codes_EOI, plain_E, rounded.codes_EOI)
            _put_(quantized.scale_EOG, plain_E, rounded.scale_EOG)
        _note(used, plain_E, treatment.quantize, quantizer.fallback)
        became_EOI = dequantize(quantized.codes_EOI, quantized.scale_EOG)
    known = None if statistic is None else statistic.value
    return Slimmed(treatment, weight_EOI, became_EOI, quantized, known, tuple(map(tuple, used)), damping_E, moved_EI)


def store_(saved: dict[str, Tensor], name: str, slimmed: Slimmed, place: int) -> int:
    """Put one matrix of the stack in the place of ``{name}.weight``; return the bytes it takes."""
    saved.pop(f"{name}.weight", None)
    stored = {key: tensor.cpu() for key, tensor in _stored(name, slimmed, place).items()}
    saved |= stored
    return sum(tensor.nbytes for tensor in stored.values())


def _stored(name: str, slimmed: Slimmed, place: int) -> dict[str, Tensor]:
    quantized, packed = slimmed.quantized, slimmed.treatment.packed
    if quantized is None:
        weight_OI = slimmed.became_EOI[place]
        return {f"{name}.weight": weight_OI} if packed is None else packed_tensors(name, weight_OI, packed)
    codes_OI, scale = quantized.codes_EOI[place], {f"{name}.weight_scale": quantized.scale_EOG[place]}
    if isinstance(slimmed.treatment.grid, FloatGrid):
        return {f"{name}.weight": codes_OI, **scale}
    assert slimmed.treatment.grid is not None
    shape = torch.tensor(codes_OI.shape, dtype=torch.int64)
    return {f"{name}.weight_packed": pack(codes_OI, slimmed.treatment.grid.bits), **scale, f"{name}.weight_shape": shape}


def _plain(starved_E: Tensor, damping_E: Tensor, *, needed: bool) -> Tensor:
    return starved_E | damping_E.isinf() if needed else torch.zeros_like(starved_E)


def _note(used: list[list[str]], plain_E: Tensor, asked: str, fallback: str) -> None:
    for names, plain in zip(used, plain_E.tolist(), strict=True):
        names.append(fallback if plain else asked)


def _put_(stack: Tensor, plain_E: Tensor, rounded: Tensor) -> None:
    # 8-bit floats know no assignment by mask; one expert at a time they do.
    for place, expert in enumerate(plain_E.nonzero().flatten().tolist()):
        stack[expert] = rounded[place]
