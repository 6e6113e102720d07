"""The grid of a symmetric quantizer: scales, codes, and the way back.

A weight w is stored as a code q and a scale s shared by a group of consecutive inputs: w ~ q * s, no zero point. Codes
are integers in [-2^(b-1), 2^(b-1) - 1] (``Grid``) or 8-bit floats of four exponent and three fraction bits
(``FloatGrid``; Micikevicius et al., arXiv:2209.05433). The layout is that of compressed-tensors, and ``dequantize`` gives
the numbers, bit for bit, that its loader will give. Scales are those with the least squared error on the weights among
some ten candidates (Banner et al., arXiv:1810.05723, call it clipping), each rounded to the dtype in which it is stored
before any code is computed from it.

Shapes: E experts, O output features, I input features, G groups of inputs, R rows of one group each, N inputs of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compression.errors import NonFiniteWeights


@dataclass(frozen=True, slots=True)
class Grid:
    """Which integers a weight may become, and how many inputs share one scale (-1: the whole row)."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 8, f"{self.bits} bits do not fit the int8 codes"
        assert self.group_size == -1 or self.group_size > 0, f"no group has {self.group_size} inputs"

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    code_dtype: ClassVar[torch.dtype] = torch.int8

    @property
    def shares(self) -> tuple[float, ...]:
        """The scales tried, as multiples of the largest weight of a group."""
        half = (self.highest - self.lowest) / 2
        return (*(share / half for share in _SHARES), 1 / self.highest)

    def groups(self, inputs: int) -> int:
        """Return how many scales a row of ``inputs`` weights has."""
        if self.group_size == -1:
            return 1
        assert inputs % self.group_size == 0, f"groups of {self.group_size} do not divide {inputs} inputs"
        return inputs // self.group_size

    def snap_(self, ratio: Tensor) -> Tensor:
        """Replace float32 multiples of the scale by the nearest codes, as float32; ties go to even."""
        return ratio.round_().clamp_(self.lowest, self.highest)


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """Codes that are 8-bit floats, one scale for a whole row: dense near zero, 448 at most."""

    bits: ClassVar[int] = 8
    code_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    @property
    def shares(self) -> tuple[float, ...]:
        """The scales tried, as multiples of the largest weight of a row."""
        return tuple(share / _LARGEST_FLOAT for share in _FLOAT_SHARES)

    def groups(self, inputs: int) -> int:
        """Return how many scales a row has: one."""
        return 1

    def snap_(self, ratio: Tensor) -> Tensor:
        """Replace float32 multiples of the scale by the nearest codes, as float32; ties go to even."""
        return ratio.copy_(ratio.clamp_(-_LARGEST_FLOAT, _LARGEST_FLOAT).to(self.code_dtype))


AnyGrid = Grid | FloatGrid


@dataclass(frozen=True, slots=True)
class Quantized:
    """A stack of weights on a grid: codes in the grid's dtype, and scales in the dtype of the weights they replace."""

    codes_EOI: Tensor
    scale_EOG: Tensor


# Shares of amax / ((highest - lowest) / 2), from 1.1 down to 0.5. Forty would lower the squared error of 4-bit weights by
# 1 to 3 %, and what GPTQ then makes of it by less than 1 %. The plain 1.0 is left out on purpose: amax / 7.5 puts the
# largest weight of every group on +-7.5, exactly half way between two codes, where one unit in the last place decides
# and two machines disagree. In its stead comes amax / highest, which clips nothing: 3 to 11 % less error with 8 bits.
_SHARES = tuple(1.1 - 0.6 * step / 9 for step in range(10))

_LARGEST_FLOAT = 448.0
# A float grid repeats itself with every power of two: what a scale can choose is where between two of them the weights
# come to lie. None of these clips, and the first is what everybody else takes.
_FLOAT_SHARES = tuple(2 ** (step / 8) for step in range(8))

_BLOCK_ON_CPU = 2**16
"""Weights worked on at a time: 256 KiB in float32 stay in a core's cache, which is worth a factor of ten."""
_BLOCK_ON_DEVICE = 2**26
"""On an accelerator it is the number of launches that costs."""


@torch.no_grad()
def search_scales(weight_EOI: Tensor, grid: AnyGrid, importance_EI: Tensor | None = None) -> Tensor:
    """Return the scale of every group, in the dtype of the weights, that rounds them with the least squared error.

    ``importance_EI``: what a squared error counts at each input; everywhere the same when it is not given. No scale is zero
    or subnormal, not even that of a group of zeros: some kernels flush subnormals, and 0 / 0 follows.
    """
    experts, outputs, inputs = weight_EOI.shape
    groups = grid.groups(inputs)
    weight_RN = weight_EOI.reshape(-1, inputs // groups)
    importance_PN = None if importance_EI is None else importance_EI.float().reshape(experts * groups, -1)
    scale_R = weight_EOI.new_empty(weight_RN.shape[0])
    for rows in _row_blocks(weight_RN):
        importance_RN = None
        if importance_PN is not None:
            row_R = torch.arange(rows.start, min(rows.stop, len(weight_RN)), device=weight_RN.device)
            importance_RN = importance_PN[row_R // (outputs * groups) * groups + row_R % groups]
        scale_R[rows] = _least_squares_scale(weight_RN[rows].float(), grid, weight_EOI.dtype, importance_RN)
    scale_EOG = scale_R.view(experts, outputs, groups)
    _refuse_non_finite(scale_EOG)
    return scale_EOG


@torch.no_grad()
def quantize(weight_EOI: Tensor, scale_EOG: Tensor, grid: AnyGrid) -> Tensor:
    """Return the nearest code of every weight, ties to even, in the grid's dtype.

    Divides by the scale in float32: a product with its reciprocal rounds differently.
    """
    groups = scale_EOG.shape[-1]
    weight_RN = weight_EOI.reshape(-1, weight_EOI.shape[-1] // groups)
    scale_R1 = scale_EOG.reshape(-1, 1)
    codes_RN = torch.empty_like(weight_RN, dtype=grid.code_dtype, memory_format=torch.contiguous_format)
    for rows in _row_blocks(weight_RN):
        codes_RN[rows] = grid.snap_(weight_RN[rows].float() / scale_R1[rows].float()).to(grid.code_dtype)
    return codes_RN.view(weight_EOI.shape)


@torch.no_grad()
def dequantize(codes_EOI: Tensor, scale_EOG: Tensor) -> Tensor:
    """Return the weights that a stock loader will compute from codes and scales: their product in the scale's dtype."""
    weight_EOGN = codes_EOI.unflatten(-1, (scale_EOG.shape[-1], -1)).to(scale_EOG.dtype)
    return weight_EOGN.mul_(scale_EOG.unsqueeze(-1)).flatten(-2)


def _row_blocks(weight_RN: Tensor) -> Iterator[slice]:
    size = _BLOCK_ON_CPU if weight_RN.device.type == "cpu" else _BLOCK_ON_DEVICE
    step = max(1, size // max(1, weight_RN.shape[1]))
    for start in range(0, weight_RN.shape[0], step):
        yield slice(start, start + step)


def _least_squares_scale(weight_RN: Tensor, grid: AnyGrid, stored: torch.dtype, importance_RN: Tensor | None) -> Tensor:
    largest_R = weight_RN.abs().amax(dim=1)
    best_R = torch.full_like(largest_R, torch.inf)
    chosen_R = torch.full_like(largest_R, torch.nan)  # stays NaN where no candidate has a finite error
    error_RN = torch.empty_like(weight_RN)
    for share in grid.shares:
        scale_R = (largest_R * share).to(stored).clamp_(min=torch.finfo(stored).tiny).float()
        torch.div(weight_RN, scale_R[:, None], out=error_RN)
        grid.snap_(error_RN).mul_(scale_R[:, None]).sub_(weight_RN)
        error_RN.square_()
        error_R = (error_RN if importance_RN is None else error_RN.mul_(importance_RN)).sum(dim=1)
        better_R = error_R < best_R
        best_R = torch.where(better_R, error_R, best_R)
        chosen_R = torch.where(better_R, scale_R, chosen_R)
    return chosen_R.to(stored)


def _refuse_non_finite(scale_EOG: Tensor) -> None:
    bad_E = ~scale_EOG.isfinite().flatten(1).all(dim=1)
    if bad_E.any():
        experts = bad_E.nonzero().flatten().tolist()
        raise NonFiniteWeights(f"weights that are NaN, infinite or too large to square, in expert(s) {experts}", experts=experts)
