"""The error that the ledger tells, against what a stack computes on real tokens.

Shapes: E experts, O output features, I input features, T tokens.
"""

import pytest
import torch

from compression.slimming import magnitude
from compression.slimming.damage import relative_errors, sample
from compression.slimming.masks import NOfM
from tests.compression.test_gptq import correlated_tokens, grams, relative_error, weights


def test_output_error_is_the_lost_share_of_the_outputs_energy():
    x_TI, weight_EOI = correlated_tokens(300, 64), weights(1, 16, 64)
    became_EOI = magnitude.prune(weight_EOI, NOfM(2, 4))
    lost_EOI = weight_EOI - became_EOI

    error_E = relative_error(weight_EOI, became_EOI, (x_TI.T @ x_TI / 300).unsqueeze(0))

    share = (x_TI @ lost_EOI[0].T).square().sum() / (x_TI @ weight_EOI[0].T).square().sum()
    assert error_E.item() == pytest.approx(share.item(), rel=1e-4)  # both in float32, summed in different orders


def test_output_error_is_zero_without_tokens_and_without_loss():
    weight_EOI = weights(2, 4, 32)
    became_EOI = magnitude.prune(weight_EOI, NOfM(2, 4))

    assert relative_error(weight_EOI, became_EOI, torch.zeros(2, 32, 32)).tolist() == [0.0, 0.0]
    assert relative_error(weight_EOI, weight_EOI, grams(2, 32)).tolist() == [0.0, 0.0]


def test_output_error_of_one_expert_is_not_anothers():
    weight_EOI, gram_EII = weights(3, 8, 64), grams(3, 64)
    became_EOI = magnitude.prune(weight_EOI, NOfM(2, 4))

    together_E = relative_error(weight_EOI, became_EOI, gram_EII)

    for e in range(3):
        assert relative_error(weight_EOI[e, None], became_EOI[e, None], gram_EII[e, None])[0] == together_E[e]


def test_with_mean_squares_alone_inputs_count_as_uncorrelated():
    # (1, 2) becomes (0, 2) under inputs of mean square 3 and 4: 1 x 3 lost of 1 x 3 + 4 x 4.
    weight_EOI, became_EOI = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 2.0]]])

    error_E = relative_error(weight_EOI, became_EOI, torch.tensor([[3.0, 4.0]]))

    assert error_E.item() == pytest.approx(3 / 19)
    assert relative_error(weight_EOI, became_EOI, torch.diag(torch.tensor([3.0, 4.0]))[None]).item() == pytest.approx(3 / 19)


def test_several_ways_are_each_told_as_if_alone():
    weight_EOI, gram_EII = weights(2, 4, 32), grams(2, 32)
    ways = [magnitude.prune(weight_EOI, NOfM(2, 4)), weight_EOI, 0 * weight_EOI]

    together = relative_errors(weight_EOI, ways, gram_EII)

    assert [error_E.tolist() for error_E in together] == [relative_error(weight_EOI, way, gram_EII).tolist() for way in ways]
    assert together[2].tolist() == [1.0, 1.0]


def test_without_calibration_it_is_the_share_of_the_weight_itself():
    weight_EOI, became_EOI = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 2.0]]])

    assert relative_error(weight_EOI, became_EOI, None).item() == pytest.approx(1 / 5)


@pytest.mark.parametrize(("outputs", "looked_at"), [(1, 1), (128, 128), (129, 65), (300, 100)])
def test_at_most_128_outputs_are_looked_at(outputs: int, looked_at: int):
    assert sample(torch.zeros(2, outputs, 3)).shape == (2, looked_at, 3)
