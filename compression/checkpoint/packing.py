"""Small integers into int32 words and back, in the pack-quantized layout of compressed-tensors.

Along the last dimension, value j of a row occupies bits j * b to j * b + b - 1 of one little-endian bit stream, as
the unsigned number code + 2^(b - 1); the last word is filled up with zero bits. 3-bit values straddle words.

Eight codes are eight bytes in memory and exactly b bytes in the stream, whatever b is. So eight at a time are read as one
64-bit number, its bytes are moved together in three steps (pairs, fours, all eight), and its first b bytes are kept.

Shapes: O output features, I input features; W words, B bytes, J numbers of 64 bits; any leading dimensions.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

assert sys.byteorder == "little", "words are viewed as bytes, which only a little-endian machine orders as the file does"


def packed_words(inputs: int, bits: int) -> int:
    """Return how many int32 words a row of ``inputs`` codes fills."""
    return -(-inputs * bits // 32)


@torch.no_grad()
def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Return the codes, int8 in [-2^(bits-1), 2^(bits-1) - 1], as int32 words [..., O, W]."""
    assert codes_OI.dtype == torch.int8, f"codes are int8, not {codes_OI.dtype}"
    inputs = codes_OI.shape[-1]
    # The smallest code is stored as zero bits, so it fills up the last eight. Padding copies: what follows works in place.
    stream_OJ = pad(codes_OI, (0, -inputs % 8), value=-(2 ** (bits - 1))).contiguous().view(torch.int64)
    # The low bits of a negative code are those of its two's complement; flipping the topmost adds 2^(bits-1).
    stream_OJ.bitwise_and_(_ones(bits, every=8)).bitwise_xor_(_signed(_ones(1, every=8) << (bits - 1)))
    for lane in (8, 16, 32):
        low = _ones(lane, every=2 * lane)
        stream_OJ = (stream_OJ & low).bitwise_or_((stream_OJ >> lane).bitwise_and_(low) << (bits * lane // 8))
    used = -(-inputs * bits // 8)  # bytes; what padding adds after them must stay zero
    bytes_OB = stream_OJ.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return pad(bytes_OB[..., :used], (0, 4 * packed_words(inputs, bits) - used)).contiguous().view(torch.int32)


@torch.no_grad()
def unpack(packed_OW: Tensor, bits: int, inputs: int) -> Tensor:
    """Return the first ``inputs`` codes of every row as int8; the inverse of ``pack``."""
    assert packed_OW.dtype == torch.int32, f"words are int32, not {packed_OW.dtype}"
    assert packed_OW.shape[-1] == packed_words(inputs, bits), f"{packed_OW.shape[-1]} words do not hold {inputs} codes"
    bytes_OB = packed_OW.contiguous().view(torch.uint8)
    bytes_OB = pad(bytes_OB, (0, -bytes_OB.shape[-1] % bits)).unflatten(-1, (-1, bits))
    stream_OJ = pad(bytes_OB, (0, 8 - bits)).contiguous().view(torch.int64).squeeze(-1)
    for lane in (32, 16, 8):
        moved = bits * lane // 8
        low = _ones(moved, every=2 * lane)
        stream_OJ = (stream_OJ & low).bitwise_or_((stream_OJ >> moved).bitwise_and_(low) << lane)
    # 2^7 does not fit an int8, its negative does, and the sum wraps around as it should.
    return stream_OJ.view(torch.int8)[..., :inputs].add(-(2 ** (bits - 1)))


def _ones(count: int, *, every: int) -> int:
    """Return the signed 64-bit number whose lowest ``count`` of ``every`` bits are set."""
    return _signed(sum(((1 << count) - 1) << start for start in range(0, 64, every)))


def _signed(number: int) -> int:
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number
