"""Wanda: a weight counts by what enters it; rows are compared with themselves alone.

Shapes: E experts, O outputs, I inputs.
"""

import pytest
import torch

from compression.slimming import magnitude
from compression.slimming.masks import NOfM, Pattern, Unstructured
from compression.slimming.wanda import prune
from tests.compression.test_magnitude import DTYPES, weights

PATTERNS = [Unstructured(0.5), Unstructured(0.3), NOfM(2, 4), NOfM(3, 8), NOfM(1, 5)]


def magnitude_by_row(weight_EOI: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Each row is pruned as if it were a matrix of its own."""
    return magnitude.prune(weight_EOI.flatten(0, 1)[:, None], pattern).view(weight_EOI.shape)


def test_a_small_weight_on_a_loud_input_outlives_a_large_weight_on_a_quiet_one():
    weight_EOI, norm_EI = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[1.0, 9.0]])

    assert prune(weight_EOI, norm_EI**2, Unstructured(0.5)).tolist() == [[[0.0, 1.0]]]


def test_it_is_the_norm_that_counts_and_not_its_square():
    # 5 x 2 beats 3 x 3, but 5 x 2^2 would not beat 3 x 3^2.
    weight_EOI, norm_EI = torch.tensor([[[5.0, 3.0]]]), torch.tensor([[2.0, 3.0]])

    assert prune(weight_EOI, norm_EI**2, NOfM(1, 2)).tolist() == [[[5.0, 0.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_equally_loud_inputs_it_is_magnitude_pruning_of_each_row(pattern: Pattern, dtype: torch.dtype):
    weight_EOI = weights(2, 6, 40, dtype=dtype)

    pruned_EOI = prune(weight_EOI, torch.full((2, 40), 4.0), pattern)

    assert pruned_EOI.dtype == dtype
    assert torch.equal(pruned_EOI, magnitude_by_row(weight_EOI, pattern))


def test_every_output_keeps_as_many_inputs_however_small_its_weights_are():
    weight_EOI = weights(1, 4, 40)
    weight_EOI[0, 2] *= 1e-3

    pruned_EOI = prune(weight_EOI, torch.rand(1, 40) + 0.1, Unstructured(0.25))

    assert (pruned_EOI == 0).sum(2).tolist() == [[10] * 4]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_are_those_of_a_slow_reference(pattern: Pattern):
    weight_EOI = weights(3, 5, 40)
    mean_square_EI = torch.rand(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.01

    pruned_EOI = prune(weight_EOI, mean_square_EI, pattern)

    width = 40 if isinstance(pattern, Unstructured) else pattern.m
    kept = 40 - round(pattern.sparsity * 40) if isinstance(pattern, Unstructured) else pattern.n
    for expert in range(3):
        for output in range(5):
            for start in range(0, 40, width):
                score = {
                    i: abs(weight_EOI[expert, output, i].item()) * mean_square_EI[expert, i].item() ** 0.5 for i in range(40)
                }
                order = sorted(range(start, start + width), key=lambda i: -score[i])
                for i in order[:kept]:
                    assert pruned_EOI[expert, output, i] == weight_EOI[expert, output, i]
                assert not pruned_EOI[expert, output, order[kept:]].any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_expert_without_tokens_is_pruned_by_magnitude_row_by_row_and_its_neighbour_is_not(pattern: Pattern):
    weight_EOI = weights(2, 6, 40)
    mean_square_EI = torch.stack([torch.zeros(40), torch.rand(40, generator=torch.Generator().manual_seed(2)) ** 4])

    pruned_EOI = prune(weight_EOI, mean_square_EI, pattern)

    plain_EOI = magnitude_by_row(weight_EOI, pattern)
    assert torch.equal(pruned_EOI[0], plain_EOI[0])
    assert not torch.equal(pruned_EOI[1], plain_EOI[1])
    assert torch.equal(pruned_EOI[1, None], prune(weight_EOI[1, None], mean_square_EI[1, None], pattern))


def test_inputs_that_never_fire_go_first():
    weight_EOI, mean_square_EI = weights(1, 6, 40), torch.ones(1, 40)
    weight_EOI[:, :, ::2] *= 100
    mean_square_EI[:, ::2] = 0

    assert not prune(weight_EOI, mean_square_EI, Unstructured(0.5))[:, :, ::2].any()


def test_arguments_are_left_alone():
    weight_EOI, mean_square_EI = weights(1, 4, 8), torch.rand(1, 8)
    before_EOI, before_EI = weight_EOI.clone(), mean_square_EI.clone()

    prune(weight_EOI, mean_square_EI, NOfM(2, 4))

    assert torch.equal(weight_EOI, before_EOI)
    assert torch.equal(mean_square_EI, before_EI)
