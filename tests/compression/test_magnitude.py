"""Magnitude: the weights nearest to zero go, of a whole matrix or of every group, and the others are not touched.

Shapes: E experts, O output features, I input features.
"""

import pytest
import torch

from compression.slimming import magnitude
from compression.slimming.masks import NOfM, Unstructured, keep_largest
from tests.compression.test_gptq import weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_unstructured_the_weights_of_a_whole_matrix_are_compared():
    weight_EOI = torch.tensor([[[1.0, -2.0], [3.0, -4.0]], [[-40.0, 10.0], [-20.0, 30.0]]])

    pruned_EOI = magnitude.prune(weight_EOI, Unstructured(0.5))

    # By rows it would be the second and the fourth; by the whole stack, nothing of the first matrix.
    assert pruned_EOI.tolist() == [[[0, 0], [3, -4]], [[-40, 0], [0, 30]]]


def test_with_a_pattern_the_weights_of_a_group_are_compared():
    weight_EOI = torch.tensor([[[1.0, -2.0, 30.0, 40.0], [-60.0, 50.0, 0.5, -0.25]]])

    pruned_EOI = magnitude.prune(weight_EOI, NOfM(1, 2))

    assert pruned_EOI.tolist() == [[[0, -2, 0, 40], [-60, 0, 0.5, 0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_the_rounded_share_of_every_matrix_goes_and_what_stays_keeps_its_bits(dtype: torch.dtype, sparsity: float):
    weight_EOI = weights(3, 7, 33).to(dtype)

    pruned_EOI = magnitude.prune(weight_EOI, Unstructured(sparsity))

    assert pruned_EOI.dtype == dtype
    kept_EOI = pruned_EOI != 0
    assert kept_EOI.sum(dim=(1, 2)).tolist() == [7 * 33 - round(sparsity * 7 * 33)] * 3
    assert torch.equal(pruned_EOI[kept_EOI], weight_EOI[kept_EOI])
    for weight_OI, kept_OI in zip(weight_EOI.abs(), kept_EOI, strict=True):
        assert weight_OI[kept_OI].min() >= weight_OI[~kept_OI].max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (5, 16)])
def test_n_of_m_masks_every_row_by_its_sizes(dtype: torch.dtype, n: int, m: int):
    weight_EOI = weights(3, 7, 48).to(dtype)

    pruned_EOI = magnitude.prune(weight_EOI, NOfM(n, m))

    expected_EOI = weight_EOI.where(keep_largest(weight_EOI.abs(), NOfM(n, m)), torch.zeros((), dtype=dtype))
    assert torch.equal(pruned_EOI, expected_EOI)
    assert ((pruned_EOI != 0).unflatten(2, (-1, m)).sum(3) == n).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NOfM(2, 4)])
def test_an_expert_is_pruned_alone_as_it_is_in_a_stack(pattern: Unstructured | NOfM):
    weight_EOI = weights(4, 6, 40) * torch.tensor([1.0, 100.0, 0.01, 1.0])[:, None, None]

    together_EOI = magnitude.prune(weight_EOI, pattern)

    for e in range(4):
        assert torch.equal(magnitude.prune(weight_EOI[e, None], pattern)[0], together_EOI[e])


def test_a_transposed_view_is_pruned_like_its_copy_and_left_alone():
    weight_EIO = weights(2, 16, 6)
    before_EIO = weight_EIO.clone()

    for pattern in (Unstructured(0.5), NOfM(2, 4)):
        assert torch.equal(magnitude.prune(weight_EIO.mT, pattern), magnitude.prune(weight_EIO.mT.contiguous(), pattern))
    assert torch.equal(weight_EIO, before_EIO)
