"""Packing: what is written is what compressed-tensors would write, and comes back as it went in.

Shapes: E experts, O output features, I input features, W words.
"""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.checkpoint.packing import pack, packed_words, unpack


def codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


anything = settings(deadline=None, derandomize=True, max_examples=200)
any_bits = st.integers(2, 8)


@anything
@given(bits=any_bits, outputs=st.integers(1, 5), inputs=st.integers(1, 140), seed=st.integers(0, 2**32))
def test_packed_words_are_those_of_compressed_tensors(bits: int, outputs: int, inputs: int, seed: int):
    codes_OI = codes(outputs, inputs, bits=bits, seed=seed)

    packed_OW = pack(codes_OI, bits)

    assert packed_OW.dtype == torch.int32
    assert torch.equal(packed_OW, pack_to_int32(codes_OI, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("inputs", [1, 7, 31, 33, 97, 1407])
def test_rows_that_end_inside_a_word_are_byte_for_byte_those_of_compressed_tensors(bits: int, inputs: int):
    codes_OI = codes(11, inputs, bits=bits)

    packed_OW = pack(codes_OI, bits)

    assert packed_OW.is_contiguous()
    assert packed_OW.numpy().tobytes() == pack_to_int32(codes_OI, bits).contiguous().numpy().tobytes()


@anything
@given(bits=any_bits, experts=st.integers(1, 3), inputs=st.integers(1, 140), seed=st.integers(0, 2**32))
def test_unpacking_gives_back_every_code_of_a_stack(bits: int, experts: int, inputs: int, seed: int):
    codes_EOI = codes(experts, 2, inputs, bits=bits, seed=seed)

    assert torch.equal(unpack(pack(codes_EOI, bits), bits, inputs), codes_EOI)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("inputs", [1, 7, 31, 33, 77, 97])
def test_words_packed_by_compressed_tensors_are_read(bits: int, inputs: int):
    codes_OI = codes(3, inputs, bits=bits)

    assert torch.equal(unpack(pack_to_int32(codes_OI, bits), bits, inputs), codes_OI)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("inputs", [1, 7, 31, 33, 77, 97])
def test_compressed_tensors_reads_our_words(bits: int, inputs: int):
    codes_OI = codes(3, inputs, bits=bits)

    assert torch.equal(unpack_from_int32(pack(codes_OI, bits), bits, codes_OI.shape), codes_OI)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stack_is_packed_as_its_matrices_are(bits: int):
    codes_EOI = codes(4, 3, 50, bits=bits)

    assert torch.equal(pack(codes_EOI, bits), torch.stack([pack(codes_OI, bits) for codes_OI in codes_EOI]))


def test_a_three_bit_code_straddles_two_words():
    codes_1I = torch.full((1, 11), -4, dtype=torch.int8)
    codes_1I[0, 10] = 3  # stored as 0b111 in bits 30 to 32

    packed_1W = pack(codes_1I, 3)

    assert packed_1W.tolist() == [[-(2**30), 1]]  # two ones at the top of the first word, one at the bottom of the second


def test_the_extreme_codes_keep_their_signs():
    codes_1I = torch.tensor([[-128, 127, -1, 0]], dtype=torch.int8)

    assert pack(codes_1I, 8).view(torch.uint8).tolist() == [[0, 255, 127, 128]]
    assert torch.equal(unpack(pack(codes_1I, 8), 8, 4), codes_1I)


def test_what_fills_the_last_word_is_zero():
    codes_1I = torch.full((1, 1), 7, dtype=torch.int8)

    assert pack(codes_1I, 4).tolist() == [[15]]


@pytest.mark.parametrize(("inputs", "bits", "words"), [(8, 4, 1), (9, 4, 2), (32, 3, 3), (33, 3, 4), (5, 8, 2), (16, 2, 1)])
def test_packed_words_counts_what_pack_writes(inputs: int, bits: int, words: int):
    assert packed_words(inputs, bits) == words
    assert pack(codes(2, inputs, bits=bits), bits).shape == (2, words)


def test_a_transposed_matrix_is_packed_by_its_rows():
    codes_IO = codes(40, 6, bits=4)

    assert torch.equal(pack(codes_IO.T, 4), pack_to_int32(codes_IO.T.contiguous(), 4))


@pytest.mark.parametrize("inputs", [40, 41])  # with and without a rest of eight
def test_arguments_are_left_alone(inputs: int):
    codes_OI = codes(6, inputs, bits=4)
    before_OI = codes_OI.clone()
    packed_OW = pack(codes_OI, 4)
    before_OW = packed_OW.clone()

    unpack(packed_OW, 4, inputs)

    assert torch.equal(codes_OI, before_OI)
    assert torch.equal(packed_OW, before_OW)
