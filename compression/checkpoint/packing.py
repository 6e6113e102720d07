"""Small integers into int32 words and back, in the pack-quantized layout of compressed-tensors.

Along the last dimension, value j of a row occupies bits j * b to j * b + b - 1 of one little-endian bit stream, as
the unsigned number code + 2^(b - 1); the last word is filled up with zero bits. Eight values are exactly b bytes
whatever b is, so they are gathered in one 64-bit number and its first b bytes are kept. 3-bit values straddle words.

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
    used = -(-inputs * bits // 8)  # bytes; what padding adds after them must stay zero
    stream_OJ = _gather_eights(codes_OI, bits)
    bytes_OB = stream_OJ.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    bytes_OB = pad(bytes_OB[..., :used], (0, 4 * packed_words(inputs, bits) - used))
    return bytes_OB.contiguous().view(torch.int32)


@torch.no_grad()
def unpack(packed_OW: Tensor, bits: int, inputs: int) -> Tensor:
    """Return the first ``inputs`` codes of every row as int8; the inverse of ``pack``."""
    assert packed_OW.dtype == torch.int32, f"words are int32, not {packed_OW.dtype}"
    assert packed_OW.shape[-1] == packed_words(inputs, bits), f"{packed_OW.shape[-1]} words do not hold {inputs} codes"
    bytes_OB = packed_OW.contiguous().view(torch.uint8)
    bytes_OB = pad(bytes_OB, (0, -bytes_OB.shape[-1] % bits)).unflatten(-1, (-1, bits))
    stream_OJ = pad(bytes_OB, (0, 8 - bits)).contiguous().view(torch.int64).squeeze(-1)
    codes_OJ8 = torch.empty(*stream_OJ.shape, 8, dtype=torch.int8, device=packed_OW.device)
    for place in range(8):
        codes_OJ8[..., place] = (stream_OJ >> (place * bits)).bitwise_and_(2**bits - 1).sub_(2 ** (bits - 1))
    return codes_OJ8.flatten(-2)[..., :inputs].contiguous()


def _gather_eights(codes_OI: Tensor, bits: int) -> Tensor:
    # Padding with the smallest code, which is stored as zero bits.
    codes_OJ8 = pad(codes_OI, (0, -codes_OI.shape[-1] % 8), value=-(2 ** (bits - 1))).unflatten(-1, (-1, 8))
    stream_OJ = torch.zeros(codes_OJ8.shape[:-1], dtype=torch.int64, device=codes_OI.device)
    for place in range(8):
        stream_OJ |= (codes_OJ8[..., place].long() + 2 ** (bits - 1)) << (place * bits)
    return stream_OJ
