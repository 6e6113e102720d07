"""SparseGPT: the masks and weights of its paper's inverse; exactly magnitude where there is nothing to repair.

Shapes: E experts, O output features, I input features, B inputs of a block, C weights compared.
"""

import pytest
import torch
from torch import Tensor

from compression.slimming import feedback, magnitude, sparsegpt, wanda
from compression.slimming.damage import relative_error
from compression.slimming.masks import NOfM, Pattern, Unstructured
from tests.compression.test_gptq import correlated_tokens, grams, indefinite, weights

CASES = [  # outputs, inputs, pattern: groups that divide the base block of 8 and the panel of 64, and that do not
    (16, 64, NOfM(2, 4)),
    (9, 200, NOfM(4, 8)),
    (12, 135, NOfM(1, 3)),
    (7, 200, NOfM(3, 5)),
    (5, 160, NOfM(5, 16)),
    (6, 128, Unstructured(0.5)),
    (5, 300, Unstructured(0.7)),
    (3, 40, Unstructured(0.25)),
]
cases = pytest.mark.parametrize(("outputs", "inputs", "pattern"), CASES)


def by_magnitude(weight_EOI: Tensor, pattern: Pattern) -> Tensor:
    """Magnitude over what SparseGPT compares: groups of m, or 128 inputs of all outputs."""
    if isinstance(pattern, NOfM):
        return magnitude.prune(weight_EOI, pattern)
    # Scores are laid out input by input, so that of equal ones the lower input stays; no weights here are equal.
    return torch.cat([magnitude.prune(weight_EOB, pattern) for weight_EOB in weight_EOI.split(128, dim=2)], dim=2)


def eliminated(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """SparseGPT as its paper tells it, in float64: the factor of the inverse prices the weights and spreads their loss.

    Also returns, per row, how near the lowest that stayed came to the highest that went, relative to either.
    """
    inputs = weight_OI.shape[1]
    damped_II = gram_II.double() + 0.01 * gram_II.double().diagonal().mean() * torch.eye(inputs)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    rest_OI = weight_OI.double().clone()
    pruned_OI = torch.zeros_like(rest_OI)
    gap_O = torch.full((weight_OI.shape[0],), torch.inf, dtype=torch.float64)
    decided = pattern.m if isinstance(pattern, NOfM) else 128
    for j in range(inputs):
        if j % decided == 0:
            block = slice(j, min(j + decided, inputs))
            price_OB = (rest_OI[:, block] / upper_II.diagonal()[block]).square()
            compared_RC = price_OB if isinstance(pattern, NOfM) else price_OB.flatten()[None]
            count = compared_RC.shape[1]
            drop = count - pattern.n if isinstance(pattern, NOfM) else round(pattern.sparsity * count)
            ranked_RC = compared_RC.sort(dim=1).values
            kept_OB = (compared_RC > ranked_RC[:, drop - 1, None]).view(price_OB.shape)
            gap_O = torch.minimum(gap_O, ranked_RC[:, drop] / ranked_RC[:, drop - 1] - 1)
        pruned_OI[:, j] = rest_OI[:, j] * kept_OB[:, j % decided]
        lost_O = (rest_OI[:, j] - pruned_OI[:, j]) / upper_II[j, j]
        rest_OI[:, j:] -= torch.outer(lost_O, upper_II[j, j:])
    return pruned_OI, gap_O


@cases
def test_masks_and_weights_are_those_of_a_float64_factor_of_the_inverse(outputs: int, inputs: int, pattern: Pattern):
    weight_EOI, gram_EII = weights(4, outputs, inputs), grams(4, inputs)

    pruned_EOI, damping_E = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    assert damping_E.tolist() == [0.01] * 4
    compared = 0
    for pruned_OI, weight_OI, gram_II in zip(pruned_EOI, weight_EOI, gram_EII, strict=True):
        expected_OI, gap_O = eliminated(weight_OI, gram_II, pattern)
        clear_O = gap_O > 1e-4  # ten times what a price in float32 is off
        assert torch.equal(pruned_OI[clear_O] != 0, expected_OI[clear_O] != 0)
        # Weights of 0.02, repaired many times over in float32 with factors of a matrix with a condition number around 1e3.
        assert not clear_O.any() or (pruned_OI - expected_OI)[clear_O].abs().max() < 1e-5 * expected_OI.abs().max()
        compared += int(clear_O.sum())
    assert compared >= 0.7 * 4 * outputs
