"""Wanda: a weight counts by what it is typically multiplied with; rows are compared with themselves only.

Shapes: E experts, O output features, I input features.
"""

import pytest
import torch

from compression.slimming import magnitude, wanda
from compression.slimming.damage import relative_error
from compression.slimming.masks import NOfM, Pattern, Unstructured
from tests.compression.test_gptq import weights

PATTERNS = [Unstructured(0.5), Unstructured(0.3), NOfM(2, 4), NOfM(1, 3), NOfM(5, 16)]


def by_rows(weight_EOI: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Magnitude pruning where every row is a matrix of its own."""
    return magnitude.prune(weight_EOI.flatten(0, 1)[:, None], pattern).view(weight_EOI.shape)


def test_a_small_weight_on_a_loud_input_outlives_a_large_weight_on_a_quiet_one():
    weight_EOI = torch.tensor([[[3.0, 1.0]]])
    mean_square_EI = torch.tensor([[1.0, 9.0]]).square()

    for pattern in (Unstructured(0.5), NOfM(1, 2)):
        assert wanda.prune(weight_EOI, mean_square_EI, pattern).tolist() == [[[0, 1]]]


def test_it_is_the_root_of_the_mean_square_that_a_weight_is_multiplied_with():
    # 3 x 1 against 1 x 2: multiplied with the mean square itself, 4, the second would stay.
    pruned_EOI = wanda.prune(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[1.0, 4.0]]), Unstructured(0.5))

    assert pruned_EOI.tolist() == [[[3, 0]]]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("loudness", [1.0, 0.25, 1e6])
def test_with_equally_loud_inputs_it_is_magnitude_row_by_row(pattern: Pattern, loudness: float):
    weight_EOI = weights(3, 8, 48)

    pruned_EOI = wanda.prune(weight_EOI, torch.full((3, 48), loudness), pattern)

    assert torch.equal(pruned_EOI, by_rows(weight_EOI, pattern))


def test_every_output_keeps_as_many_inputs_however_small_its_weights_are():
    weight_EOI = weights(2, 4, 40) * torch.tensor([1.0, 0.01, 1.0, 100.0])[:, None]

    pruned_EOI = wanda.prune(weight_EOI, torch.rand(2, 40, generator=torch.Generator().manual_seed(0)), Unstructured(0.3))

    assert ((pruned_EOI != 0).sum(2) == 28).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_its_neighbours_are_not(pattern: Pattern):
    weight_EOI = weights(3, 8, 48)
    mean_square_EI = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).exp()
    mean_square_EI[1] = 0

    pruned_EOI = wanda.prune(weight_EOI, mean_square_EI, pattern)

    assert torch.equal(pruned_EOI[1, None], by_rows(weight_EOI[1, None], pattern))
    for e in (0, 2):
        alone_1OI = wanda.prune(weight_EOI[e, None], mean_square_EI[e, None], pattern)
        assert torch.equal(pruned_EOI[e], alone_1OI[0])
        assert not torch.equal(pruned_EOI[e], by_rows(weight_EOI[e, None], pattern)[0])


def test_inputs_that_never_fire_go_first():
    weight_EOI = weights(1, 8, 32)
    mean_square_EI = torch.ones(1, 32)
    mean_square_EI[:, ::2] = 0

    pruned_EOI = wanda.prune(weight_EOI, mean_square_EI, Unstructured(0.5))

    assert (pruned_EOI[:, :, ::2] == 0).all()
    assert torch.equal(pruned_EOI[:, :, 1::2], weight_EOI[:, :, 1::2])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_output_error_is_below_magnitudes_where_inputs_are_not_equally_loud(pattern: Pattern):
    weight_EOI = weights(3, 16, 96)
    mean_square_EI = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).exp().square()

    pruned_EOI = wanda.prune(weight_EOI, mean_square_EI, pattern)

    by_magnitude_E = relative_error(weight_EOI, by_rows(weight_EOI, pattern), mean_square_EI)
    # Without correlations these are the cheapest weights of every row: no mask with as many in a row can lose less.
    assert (relative_error(weight_EOI, pruned_EOI, mean_square_EI) < by_magnitude_E).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_stays_keeps_its_bits_and_arguments_are_left_alone(dtype: torch.dtype):
    weight_EOI, mean_square_EI = weights(2, 5, 24).to(dtype), weights(2, 24, seed=1).square().double()
    before_EOI, before_EI = weight_EOI.clone(), mean_square_EI.clone()

    pruned_EOI = wanda.prune(weight_EOI, mean_square_EI, NOfM(2, 4))

    assert pruned_EOI.dtype == dtype
    assert torch.equal(pruned_EOI[pruned_EOI != 0], weight_EOI[pruned_EOI != 0])
    assert torch.equal(weight_EOI, before_EOI)
    assert torch.equal(mean_square_EI, before_EI)
