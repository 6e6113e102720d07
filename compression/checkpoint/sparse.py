"""Pruned weights without their zeros, in the layout of compressed-tensors' sparse bitmask, for any n:m.

Of every m consecutive inputs exactly n are stored, in order, with a bit per input that says which: more zeros than the
pattern asks for are stored like other values, those with the lowest index first. The layout and the way back stand in the
one file that also ships inside artifacts, ``compression.runtime.slimtrim_runtime``; here is the way there.

Shapes: O outputs, I inputs, G groups of m inputs, K kept inputs, M bytes of mask; any leading dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from compression.recipe import Pattern
from compression.runtime.slimtrim_runtime import SUFFIXES, unpack_sparse

__all__ = ["PackedSparse", "pack_sparse", "packed_tensors", "unpack_sparse"]


class PackedSparse(NamedTuple):
    """A matrix without its zeros, in the order in which ``unpack_sparse`` takes it."""

    compressed_OK: Tensor
    bitmask_OM: Tensor
    shape: Tensor


@torch.no_grad()
def pack_sparse(weight_OI: Tensor, n: int, m: int) -> PackedSparse:
    """Return a weight of which at most n in every m consecutive inputs are not zero, as it is stored."""
    mask_OI = _kept(weight_OI, n, m)
    kept = weight_OI.shape[-1] // m * n
    compressed_OK = weight_OI[mask_OI].view(*weight_OI.shape[:-1], kept)
    return PackedSparse(compressed_OK, _bytes(mask_OI), torch.tensor(weight_OI.shape[-2:], dtype=torch.int64))


def packed_tensors(stem: str, weight_OI: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    """Return what is saved in place of ``{stem}.weight``."""
    packed = pack_sparse(weight_OI, pattern.n, pattern.m)
    return {f"{stem}{suffix}": tensor for suffix, tensor in zip(SUFFIXES, packed, strict=True)}


def _kept(weight_OI: Tensor, n: int, m: int) -> Tensor:
    """Mark n of every m inputs: all that are not zero, and the first zeros where there are too few."""
    filled_OGm = weight_OI.unflatten(-1, (-1, m)) != 0
    missing_OG1 = n - filled_OGm.sum(-1, keepdim=True)
    assert (missing_OG1 >= 0).all(), f"the weight has more than {n} non-zero in {m} inputs"
    zero_OGm = ~filled_OGm
    rank_OGm = zero_OGm.cumsum(-1, dtype=torch.int8)  # 1 for a group's first zero; m is 64 at most
    return (filled_OGm | (zero_OGm & (rank_OGm <= missing_OG1))).flatten(-2)


def _bytes(mask_OI: Tensor) -> Tensor:
    """Return a bit per input: bit j % 8 of byte j // 8."""
    bits_OM8 = pad(mask_OI.to(torch.uint8), (0, -mask_OI.shape[-1] % 8)).unflatten(-1, (-1, 8))
    place_8 = torch.arange(8, dtype=torch.uint8, device=mask_OI.device)
    return (bits_OM8 << place_8).sum(-1, dtype=torch.uint8)
