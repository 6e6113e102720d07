"""Step class -> function, listed by hand, one line per method.

Shapes: E experts, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.recipe import BlockDrop, ExpertDrop
from compression.slimming import gptq, rtn
from compression.slimming.grid import Grid, Quantized
from compression.study import Study
from compression.trimming import Cuts, block_drop, expert_drop


@dataclass(frozen=True)
class Quantizer:
    """A way to put a stack of weights on a grid."""

    name: str
    run: Callable[[Tensor, Tensor | None, Grid], tuple[Quantized, Tensor]]
    """(weight [E, O, I], Gram [E, I, I] or None, grid) -> codes and scales, damping used per expert [E]."""
    needs_gram: bool


def _rtn(weight_EOI: Tensor, gram_EII: Tensor | None, grid: Grid) -> tuple[Quantized, Tensor]:
    return rtn.round_to_nearest(weight_EOI, grid), torch.full((weight_EOI.shape[0],), torch.inf)


def _gptq(weight_EOI: Tensor, gram_EII: Tensor | None, grid: Grid) -> tuple[Quantized, Tensor]:
    assert gram_EII is not None
    return gptq.quantize(weight_EOI, gram_EII, grid)


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": Quantizer("rtn", _rtn, needs_gram=False),
    "gptq": Quantizer("gptq", _gptq, needs_gram=True),
}


def choose_cuts(steps: tuple[object, ...], study: Study | None, cuts: Cuts, *, candidates: frozenset[int], groups: int) -> Cuts:
    """Work through the trimming steps in order and return what stays."""
    for step in steps:
        match step:
            case ExpertDrop():
                assert study is not None
                cuts = expert_drop.choose(study, step, cuts, groups)
            case BlockDrop():
                assert study is not None
                cuts = block_drop.choose(study, step, cuts, candidates)
            case _:
                pass
    return cuts
