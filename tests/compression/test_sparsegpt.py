"""SparseGPT: mask and repairs of a slow, independent elimination; exactly magnitude pruning where there is nothing to repair.

Shapes: E experts, O outputs, I inputs.
"""

import pytest
import torch
from torch import Tensor

from compression.slimming import feedback, magnitude, sparsegpt, wanda
from compression.slimming.masks import NOfM, Pattern, Unstructured
from tests.compression.test_gptq import correlated_tokens, grams, indefinite, relative_error, weights

CASES = [  # outputs, inputs, pattern: groups that share no factor with blocks of 8, 64 and 128, and such as do
    (16, 64, NOfM(2, 4)),
    (5, 240, NOfM(1, 3)),
    (6, 260, NOfM(3, 5)),
    (4, 336, NOfM(5, 16)),
    (7, 192, NOfM(20, 64)),
    (12, 64, Unstructured(0.5)),
    (8, 320, Unstructured(0.7)),
    (3, 200, Unstructured(0.25)),
]


def width_of(pattern: Pattern) -> int:
    return pattern.m if isinstance(pattern, NOfM) else 128


def kept_of(score_OB: Tensor, pattern: Pattern) -> tuple[Tensor, float]:
    """The mask, and how near a decision came to a tie, relative to the scores."""
    if isinstance(pattern, NOfM):
        rows_RC, count = score_OB, pattern.n
    else:
        rows_RC = score_OB.reshape(1, -1)
        count = rows_RC.shape[1] - round(pattern.sparsity * rows_RC.shape[1])
    order_RC = rows_RC.argsort(dim=1, descending=True)
    mask_RC = torch.zeros_like(rows_RC, dtype=torch.bool)
    nearest = torch.inf
    for row, order_C in enumerate(order_RC):
        mask_RC[row, order_C[:count]] = True
        last, first = rows_RC[row, order_C[count - 1]], rows_RC[row, order_C[count]]
        nearest = min(nearest, float((last - first) / last))
    return mask_RC.view(score_OB.shape), nearest


def eliminated(weight_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> tuple[Tensor, float]:
    """SparseGPT as its paper tells it, in float64: invert, factor the inverse, drop an input's weights, spread the error.

    Also returns how near any decision came to a tie.
    """
    inputs = weight_OI.shape[1]
    damped_II = gram_II.double() + 0.01 * gram_II.double().diagonal().mean() * torch.eye(inputs)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    rest_OI, nearest, width = weight_OI.double().clone(), torch.inf, width_of(pattern)
    for start in range(0, inputs, width):
        block = slice(start, min(start + width, inputs))
        mask_OB, near = kept_of((rest_OI[:, block] / upper_II.diagonal()[block]) ** 2, pattern)
        nearest = min(nearest, near)
        for j in range(block.start, block.stop):
            lost_O = rest_OI[:, j] * ~mask_OB[:, j - start]
            rest_OI[:, j:] -= (lost_O / upper_II[j, j])[:, None] * upper_II[j, j:]
            rest_OI[:, j] *= mask_OB[:, j - start]
    return rest_OI, nearest


@pytest.mark.parametrize(("outputs", "inputs", "pattern"), CASES)
def test_mask_and_weights_are_those_of_a_float64_elimination_of_the_inverse(outputs: int, inputs: int, pattern: Pattern):
    weight_EOI, gram_EII = weights(2, outputs, inputs), grams(2, inputs)

    pruned_EOI, damping_E = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    assert damping_E.tolist() == [0.01] * 2
    for pruned_OI, weight_OI, gram_II in zip(pruned_EOI, weight_EOI, gram_EII, strict=True):
        expected_OI, nearest = eliminated(weight_OI, gram_II, pattern)
        assert nearest > 1e-5, "float32 may decide otherwise: this data does not test the mask"
        assert torch.equal(pruned_OI != 0, expected_OI != 0)
        # Repairs in float32, through a matrix with a condition number around 1e3, of weights of size 0.02.
        torch.testing.assert_close(pruned_OI.double(), expected_OI, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(pruned_OI, weight_OI * (pruned_OI != 0), rtol=0.1)


def magnitude_in_blocks(weight_EOI: Tensor, pattern: Pattern) -> Tensor:
    """Magnitude pruning over the weights that SparseGPT compares: groups of m in a row, or 128 inputs of all rows."""
    if isinstance(pattern, NOfM):
        return magnitude.prune(weight_EOI, pattern)
    return torch.cat([magnitude.prune(block_EOI, pattern) for block_EOI in weight_EOI.split(128, dim=2)], dim=2)


@pytest.mark.parametrize(("outputs", "inputs", "pattern"), CASES)
def test_with_an_identity_gram_matrix_it_is_magnitude_pruning_over_the_same_weights(outputs: int, inputs: int, pattern: Pattern):
    weight_EOI = weights(2, outputs, inputs)

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, torch.eye(inputs).expand(2, -1, -1), pattern)

    assert torch.equal(pruned_EOI, magnitude_in_blocks(weight_EOI, pattern))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too_and_ties_keep_the_lowest_input(dtype: torch.dtype):
    # A few hundred values in bf16: many groups hold equal weights.
    weight_EOI = weights(2, 64, 240).to(dtype)

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, torch.eye(240).expand(2, -1, -1), NOfM(2, 4))

    assert pruned_EOI.dtype == dtype
    assert torch.equal(pruned_EOI, magnitude.prune(weight_EOI, NOfM(2, 4)))


@pytest.mark.parametrize(("outputs", "inputs", "pattern"), CASES)
def test_as_many_weights_stay_as_the_pattern_says(outputs: int, inputs: int, pattern: Pattern):
    pruned_EOI, _ = sparsegpt.prune(weights(2, outputs, inputs), grams(2, inputs), pattern)

    for block_EOI in pruned_EOI.split(width_of(pattern), dim=2):
        kept_EO = (block_EOI != 0).sum(2)
        if isinstance(pattern, NOfM):
            assert (kept_EO == pattern.n).all()
        else:
            compared = outputs * block_EOI.shape[2]
            assert kept_EO.sum(1).tolist() == [compared - round(pattern.sparsity * compared)] * 2


def test_a_sparsity_of_zero_is_the_identity():
    weight_EOI = weights(2, 6, 150)

    assert torch.equal(sparsegpt.prune(weight_EOI, grams(2, 150), Unstructured(0.0))[0], weight_EOI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs", "pattern"), CASES)
def test_the_output_error_is_below_magnitudes_and_wandas_on_correlated_inputs(
    outputs: int, inputs: int, pattern: Pattern, dtype: torch.dtype
):
    weight_EOI, gram_EII = weights(4, outputs, inputs).to(dtype), grams(4, inputs)

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    error_E = relative_error(weight_EOI, pruned_EOI, gram_EII)
    by_wanda_EOI = wanda.prune(weight_EOI, gram_EII.diagonal(dim1=1, dim2=2), pattern)
    assert (error_E < relative_error(weight_EOI, magnitude.prune(weight_EOI, pattern), gram_EII)).all()
    assert (error_E < relative_error(weight_EOI, by_wanda_EOI, gram_EII)).all()


@pytest.mark.parametrize(("outputs", "inputs", "pattern"), CASES)
def test_an_expert_gets_the_same_bits_alone_in_the_stack_and_in_any_chunk(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, pattern: Pattern
):
    weight_EOI, gram_EII = weights(7, outputs, inputs), grams(7, inputs)
    monkeypatch.setattr(feedback, "_experts_at_once", lambda weight_EOI: len(weight_EOI))
    together_EOI = sparsegpt.prune(weight_EOI, gram_EII, pattern)[0]

    for at_once in (1, 3):
        monkeypatch.setattr(feedback, "_experts_at_once", lambda _, at_once=at_once: at_once)
        assert torch.equal(sparsegpt.prune(weight_EOI, gram_EII, pattern)[0], together_EOI)
    for e in range(7):
        assert torch.equal(sparsegpt.prune(weight_EOI[e, None], gram_EII[e, None], pattern)[0][0], together_EOI[e])


@pytest.mark.parametrize("pattern", [NOfM(2, 4), NOfM(3, 16), Unstructured(0.5)])
def test_hopeless_gram_matrices_give_magnitude_pruning_and_leave_their_neighbours_alone(pattern: Pattern):
    width = 160
    healthy_II, tokens_TI = grams(1, width)[0], correlated_tokens(10, width, seed=5)
    few_tokens_II = tokens_TI.T @ tokens_TI / 10  # rank 10 of 160: damping makes it good enough
    hopeless = [torch.zeros(width, width), torch.full((width, width), torch.nan), indefinite(width)]
    weight_EOI = weights(6, 12, width)
    gram_EII = torch.stack([healthy_II, *hopeless, few_tokens_II, healthy_II])

    pruned_EOI, damping_E = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    plain_EOI = magnitude_in_blocks(weight_EOI, pattern)
    assert damping_E.tolist() == [0.01, *[torch.inf] * 3, 0.01, 0.01]
    assert torch.equal(pruned_EOI[1:4], plain_EOI[1:4])
    for e in (0, 4, 5):
        assert not torch.equal(pruned_EOI[e], plain_EOI[e])
        assert torch.equal(pruned_EOI[e], sparsegpt.prune(weight_EOI[e, None], gram_EII[e, None], pattern)[0][0])


@pytest.mark.parametrize("pattern", [NOfM(2, 4), Unstructured(0.3)])
def test_inputs_that_never_fire_are_pruned_first_however_large_their_weights(pattern: Pattern):
    weight_EOI, gram_EII = weights(2, 8, 160), grams(2, 160)
    dead = [3, 60, 61, 159]
    gram_EII[:, dead] = 0
    gram_EII[:, :, dead] = 0
    weight_EOI[:, :, dead] *= 1000

    pruned_EOI, damping_E = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    assert damping_E.tolist() == [0.01] * 2
    assert not pruned_EOI[:, :, dead].any()


def test_an_input_that_never_fires_does_not_change_how_the_others_are_repaired():
    weight_EOI, gram_EII = weights(1, 8, 64), grams(1, 64)
    gram_EII[:, 20] = gram_EII[:, :, 20] = 0
    louder_EOI = weight_EOI.clone()
    louder_EOI[:, :, 20] *= -300

    pruned = [sparsegpt.prune(w_EOI, gram_EII, NOfM(2, 4))[0] for w_EOI in (weight_EOI, louder_EOI)]

    assert torch.equal(pruned[0], pruned[1])


def test_two_inputs_by_hand():
    # Of 1:2 the first input goes: 0.36 x (2 - 2 x 2 / 4.03) < 0.36 x 4.03. The second repairs it by 2 / 4.03 of its loss.
    weight_EOI = torch.tensor([[[0.6, 0.6]]])
    gram_EII = torch.tensor([[[2.0, 2.0], [2.0, 4.0]]])

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, NOfM(1, 2))

    assert pruned_EOI.flatten().tolist() == pytest.approx([0.0, 0.6 + 2 / 4.03 * 0.6])


def test_arguments_are_left_alone_and_parameters_are_taken_as_they_are():
    weight_EOI, gram_EII = torch.nn.Parameter(weights(2, 8, 64)), grams(2, 64)
    before_EOI, before_EII = weight_EOI.detach().clone(), gram_EII.clone()

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, NOfM(2, 4))

    assert not pruned_EOI.requires_grad
    assert torch.equal(weight_EOI, before_EOI)
    assert torch.equal(gram_EII, before_EII)
