"""Magnitude: the weights nearest to zero go; compared over a whole matrix, or group by group.

Shapes: E experts, O outputs, I inputs.
"""

import pytest
import torch

from compression.slimming.magnitude import prune
from compression.slimming.masks import NOfM, Unstructured

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def test_without_a_pattern_the_smallest_of_the_whole_matrix_go():
    weight_EOI = torch.tensor([[[1.0, -2.0], [-30.0, 4.0]]])

    assert prune(weight_EOI, Unstructured(0.5)).tolist() == [[[0.0, 0.0], [-30.0, 4.0]]]


def test_with_a_pattern_the_smallest_of_each_group_go():
    weight_EOI = torch.tensor([[[1.0, -2.0], [-30.0, 4.0]]])

    assert prune(weight_EOI, NOfM(1, 2)).tolist() == [[[0.0, -2.0], [-30.0, 0.0]]]


def test_the_small_weights_go_and_the_large_ones_keep_every_bit():
    weight_EOI = weights(3, 16, 40)

    pruned_EOI = prune(weight_EOI, Unstructured(0.3))

    gone_EOI = pruned_EOI == 0
    assert gone_EOI.flatten(1).sum(1).tolist() == [192] * 3  # 0.3 x 640
    assert torch.equal(pruned_EOI[~gone_EOI], weight_EOI[~gone_EOI])
    for weight_OI, gone_OI in zip(weight_EOI.abs(), gone_EOI, strict=True):
        assert weight_OI[gone_OI].max() < weight_OI[~gone_OI].min()


def test_experts_are_not_compared_with_each_other():
    weight_EOI = weights(2, 4, 8)
    weight_EOI[1] *= 1000

    together_EOI = prune(weight_EOI, Unstructured(0.5))

    assert torch.equal(together_EOI, torch.cat([prune(weight_EOI[expert, None], Unstructured(0.5)) for expert in range(2)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sparsity_of_zero_is_the_identity(dtype: torch.dtype):
    weight_EOI = weights(2, 4, 8, dtype=dtype)

    pruned_EOI = prune(weight_EOI, Unstructured(0.0))

    assert pruned_EOI.dtype == dtype
    assert torch.equal(pruned_EOI, weight_EOI)


@pytest.mark.parametrize("pattern", [NOfM(2, 4), Unstructured(0.5)])
def test_a_pruned_weight_is_zero_without_a_sign(pattern: NOfM | Unstructured):
    weight_EOI = -weights(1, 4, 8).abs()

    pruned_EOI = prune(weight_EOI, pattern)

    assert (pruned_EOI == 0).any()
    assert not pruned_EOI[pruned_EOI == 0].signbit().any()


def test_the_argument_is_left_alone():
    weight_EOI = weights(1, 4, 8)
    before_EOI = weight_EOI.clone()

    prune(weight_EOI, NOfM(2, 4))

    assert torch.equal(weight_EOI, before_EOI)


@pytest.mark.parametrize("pattern", [NOfM(1, 2), Unstructured(0.5)])
def test_weights_that_were_multiplied_since_they_came_are_compared_as_they_came(pattern: NOfM | Unstructured):
    came_EOI, moved_EI = weights(2, 6, 8), torch.tensor([[0.25, 1, 4, 2, 1, 64, 1, 0.5], [8.0, 1, 1, 1, 1, 1, 1, 1]])

    pruned_EOI = prune(came_EOI * moved_EI[:, None], pattern, moved_EI)

    assert torch.equal(pruned_EOI, prune(came_EOI, pattern) * moved_EI[:, None])
    assert not torch.equal(pruned_EOI, prune(came_EOI * moved_EI[:, None], pattern))
