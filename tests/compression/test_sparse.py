"""Packed zeros: what is written is the documented layout, and comes back as it went in.

Shapes: E experts, O outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.checkpoint.reader import TORCH_DTYPES
from compression.checkpoint.sparse import pack_sparse, packed_tensors, unpack_sparse
from compression.planner.inventory import take_inventory
from compression.planner.sizes import Cut, planned_tensors
from compression.recipe import Pattern
from tests.compression.made_checkpoints import checkpoint, mixtral

anything = settings(deadline=None, derandomize=True, max_examples=150)
patterns = st.integers(2, 64).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def sparse(*shape: int, n: int, m: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a random weight with at most n non-zero in every m inputs, and fewer in some."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).unflatten(-1, (-1, m))
    rank = torch.rand(weight.shape, generator=generator).argsort(-1).argsort(-1)
    few = torch.randint(0, n + 1, (*weight.shape[:-1], 1), generator=generator)
    return (weight.masked_fill(rank >= few, 0.0)).flatten(-2).to(dtype)


def test_the_case_done_by_hand():
    weight_OI = torch.tensor([[0.0, 1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])

    packed = pack_sparse(weight_OI, 2, 4)

    # The second row fills its two places per group with the first zeros: inputs 0 and 3, then 4 and 5.
    assert packed.compressed_OK.tolist() == [[1.0, 2.0, 3.0, 4.0], [0.0, 5.0, 0.0, 0.0]]
    assert packed.bitmask_OM.tolist() == [[0b10010110], [0b00111001]]
    assert packed.shape.tolist() == [2, 8]
    assert [tensor.dtype for tensor in packed] == [torch.float32, torch.uint8, torch.int64]


@anything
@given(pattern=patterns, outputs=st.integers(1, 5), groups=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_unpacking_gives_back_every_bit(pattern: tuple[int, int], outputs: int, groups: int, seed: int):
    n, m = pattern
    weight_OI = sparse(outputs, groups * m, n=n, m=m, seed=seed)

    packed = pack_sparse(weight_OI, n, m)

    assert packed.compressed_OK.shape == (outputs, groups * n)
    assert packed.bitmask_OM.shape == (outputs, -(-groups * m // 8))
    assert torch.equal(unpack_sparse(*packed).view(torch.int16), weight_OI.view(torch.int16))


@anything
@given(pattern=patterns, groups=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_the_mask_is_packed_as_numpy_packs_bits_in_little_order(pattern: tuple[int, int], groups: int, seed: int):
    n, m = pattern
    weight_OI = sparse(3, groups * m, n=n, m=m, seed=seed)

    packed = pack_sparse(weight_OI, n, m)

    mask_OI = np.unpackbits(packed.bitmask_OM.numpy(), axis=-1, bitorder="little", count=groups * m).astype(bool)
    assert np.array_equal(np.packbits(mask_OI, axis=-1, bitorder="little"), packed.bitmask_OM.numpy())
    assert (mask_OI.reshape(3, groups, m).sum(-1) == n).all()
    assert mask_OI[(weight_OI != 0).numpy()].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_stack_is_packed_as_its_matrices_are(dtype: torch.dtype):
    weight_EOI = sparse(3, 4, 24, n=3, m=8, dtype=dtype)

    packed = pack_sparse(weight_EOI, 3, 8)

    assert packed.compressed_OK.dtype == dtype
    for expert, weight_OI in enumerate(weight_EOI):
        alone = pack_sparse(weight_OI, 3, 8)
        assert torch.equal(packed.compressed_OK[expert], alone.compressed_OK)
        assert torch.equal(packed.bitmask_OM[expert], alone.bitmask_OM)
    assert torch.equal(unpack_sparse(*packed), weight_EOI)


def test_a_transposed_matrix_is_packed_by_its_rows():
    weight_IO = sparse(6, 40, n=2, m=4).T.contiguous()

    assert torch.equal(unpack_sparse(*pack_sparse(weight_IO.T, 2, 4)), weight_IO.T)


def test_a_weight_denser_than_the_pattern_is_our_own_mistake():
    with pytest.raises(AssertionError, match="more than 2 non-zero in 4"):
        pack_sparse(torch.ones(1, 4), 2, 4)


def test_a_mask_that_does_not_fit_its_values_is_refused():
    packed = pack_sparse(sparse(4, 16, n=2, m=4), 2, 4)

    with pytest.raises(ValueError, match="does not fit its values"):
        unpack_sparse(packed.compressed_OK, packed.bitmask_OM ^ 1, packed.shape)
    with pytest.raises(ValueError, match="does not fit its values"):
        unpack_sparse(packed.compressed_OK, packed.bitmask_OM, torch.tensor([4, 24]))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 64), (3, 8), (5, 32)])
def test_planned_tensors_are_those_that_are_saved(n: int, m: int):
    inventory = take_inventory(checkpoint(*mixtral(blocks=1, hidden=64, width=192)))
    cut = Cut(8, pattern=Pattern(n, m), pruned=frozenset({"experts"}))
    stem = "model.layers.0.block_sparse_moe.experts.5.w2"

    saved = packed_tensors(stem, sparse(64, 192, n=n, m=m), Pattern(n, m))

    planned = {tensor.name: tensor for tensor in planned_tensors(inventory, cut, inventory.blocks[0]) if stem in tensor.name}
    assert {name: (tuple(t.shape), t.dtype, t.nbytes) for name, t in saved.items()} == {
        name: (t.shape, TORCH_DTYPES[t.dtype], t.bytes) for name, t in planned.items()
    }
