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
    # Transposed: of equals, the lower input stays first, and only then the lower output.
    return torch.cat([magnitude.prune(weight_EBO, pattern) for weight_EBO in weight_EOI.mT.split(128, dim=1)], dim=1).mT


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


def test_a_group_of_two_by_hand():
    # Damped by 0.01 x 3, the Gram matrix is (2.03, 2; 2, 4.03). Losing the first weight costs what the second input cannot
    # stand in for, 2.03 - 4 / 4.03 = 1.037, times 1; losing the second, with none after it, 4.03 x 0.49 = 1.975. So the
    # first goes, and the second takes over 2 / 4.03 of it.
    weight_EOI, gram_EII = torch.tensor([[[1.0, 0.7]]]), torch.tensor([[[2.0, 2.0], [2.0, 4.0]]])

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, NOfM(1, 2))

    assert pruned_EOI[0, 0].tolist() == pytest.approx([0, 0.7 + 2 / 4.03], rel=1e-6)  # a few roundings of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@cases
def test_with_an_identity_gram_matrix_it_is_magnitude_over_the_same_comparisons(
    outputs: int, inputs: int, pattern: Pattern, dtype: torch.dtype
):
    weight_EOI = weights(2, outputs, inputs).to(dtype)

    pruned_EOI, damping_E = sparsegpt.prune(weight_EOI, torch.eye(inputs).expand(2, -1, -1), pattern)

    assert pruned_EOI.dtype == dtype
    assert damping_E.tolist() == [0.01] * 2
    assert torch.equal(pruned_EOI, by_magnitude(weight_EOI, pattern))


def test_the_error_handed_on_is_that_of_the_weight_as_it_is_stored():
    # The first goes and the second takes it over: 1.72108, in bf16 1.71875. Its change from 1 is the third's to repair, by
    # 0.9 / 1.01 of it, whose own weight all but makes up for that: 0.000155. Without the rounding, -0.0019 would be left.
    gram_EII = torch.eye(4).unsqueeze(0)
    gram_EII[0, 0, 1] = gram_EII[0, 1, 0] = 0.3
    gram_EII[0, 1, 2] = gram_EII[0, 2, 1] = 0.9
    weight_EOI = torch.tensor([[[0.5, 1.0, 0.640625, 0.0]]], dtype=torch.bfloat16)

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, NOfM(1, 2))

    left = 0.640625 + 0.9 / 1.01 * (1 - 1.71875)
    assert pruned_EOI[0, 0].tolist() == [0, 1.71875, pytest.approx(left, rel=2**-8), 0]  # half a step of bf16, and as much again


@cases
def test_the_output_error_is_below_magnitudes_and_wandas_on_correlated_inputs(outputs: int, inputs: int, pattern: Pattern):
    weight_EOI, gram_EII = weights(4, outputs, inputs), grams(4, inputs)

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    others = [by_magnitude(weight_EOI, pattern), wanda.prune(weight_EOI, gram_EII.diagonal(dim1=1, dim2=2), pattern)]
    pruned_E, *other_E = (relative_error(weight_EOI, became_EOI, gram_EII) for became_EOI in (pruned_EOI, *others))
    assert (pruned_E < 0.5 * other_E[0]).all()  # some inputs are ten times as loud as others, which magnitude cannot know
    assert (pruned_E < other_E[1]).all()


@cases
def test_an_expert_is_pruned_bit_for_bit_alike_alone_in_the_stack_and_in_any_chunk(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, pattern: Pattern
):
    weight_EOI, gram_EII = weights(5, outputs, inputs), grams(5, inputs)
    monkeypatch.setattr(feedback, "_experts_at_once", lambda weight_EOI: len(weight_EOI))
    together_EOI = sparsegpt.prune(weight_EOI, gram_EII, pattern)[0]

    for at_once in (1, 2, 3):
        monkeypatch.setattr(feedback, "_experts_at_once", lambda _, at_once=at_once: at_once)
        assert torch.equal(sparsegpt.prune(weight_EOI, gram_EII, pattern)[0], together_EOI)
    for e in range(5):
        assert torch.equal(sparsegpt.prune(weight_EOI[e, None], gram_EII[e, None], pattern)[0][0], together_EOI[e])


@pytest.mark.parametrize("pattern", [NOfM(2, 4), NOfM(1, 3), NOfM(5, 16), Unstructured(0.5)])
def test_bad_gram_matrices_are_pruned_by_magnitude_or_repaired_and_leave_their_neighbours_alone(pattern: Pattern):
    width = 240
    healthy_II, tokens_TI = grams(1, width)[0], correlated_tokens(10, width, seed=5)
    few_tokens_II = tokens_TI.T @ tokens_TI / 10  # rank 10 of 240
    speck_II = healthy_II.clone()
    speck_II[3, 77] = speck_II[77, 3] = float("nan")
    silent_but_poisoned_II = torch.full((width, width), torch.nan).fill_diagonal_(0)
    hopeless = [torch.zeros(width, width), torch.full((width, width), torch.nan), speck_II, indefinite(width)]
    stack = [healthy_II, *hopeless, silent_but_poisoned_II, few_tokens_II, healthy_II]
    weight_EOI, gram_EII = weights(len(stack), 8, width), torch.stack(stack)

    pruned_EOI, damping_E = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    assert damping_E.tolist() == [0.01, *[torch.inf] * 5, 0.01, 0.01]
    plain_EOI = by_magnitude(weight_EOI, pattern)
    assert torch.equal(pruned_EOI[1:6], plain_EOI[1:6])
    for e in (0, 6, 7):
        alone_1OI = sparsegpt.prune(weight_EOI[e, None], gram_EII[e, None], pattern)[0]
        assert torch.equal(pruned_EOI[e], alone_1OI[0])
        assert not torch.equal(pruned_EOI[e], plain_EOI[e])


@pytest.mark.parametrize("pattern", [NOfM(2, 4), Unstructured(0.5)])
def test_inputs_that_never_fire_go_first_however_large_their_weights(pattern: Pattern):
    weight_EOI, gram_EII = weights(2, 8, 128), grams(2, 128)
    weight_EOI[:, :, ::2] *= 1000
    gram_EII[:, ::2] = gram_EII[:, :, ::2] = 0

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, pattern)

    assert (pruned_EOI[:, :, ::2] == 0).all()
    assert torch.equal(pruned_EOI[:, :, 1::2], weight_EOI[:, :, 1::2])  # nothing was lost that they would have to repair


def test_with_sparsity_zero_nothing_changes():
    weight_EOI, gram_EII = weights(3, 8, 200), grams(3, 200)

    assert torch.equal(sparsegpt.prune(weight_EOI, gram_EII, Unstructured(0.0))[0], weight_EOI)


def test_the_rounded_share_of_every_block_of_128_inputs_goes():
    pruned_EOI, _ = sparsegpt.prune(weights(2, 5, 300), grams(2, 300), Unstructured(0.7))

    for block, inputs in ((slice(128), 128), (slice(128, 256), 128), (slice(256, 300), 44)):
        assert (pruned_EOI[:, :, block] == 0).sum(dim=(1, 2)).tolist() == [round(0.7 * 5 * inputs)] * 2


def test_arguments_are_left_alone_and_parameters_are_taken_as_they_are():
    weight_EOI, gram_EII = torch.nn.Parameter(weights(2, 8, 64)), grams(2, 64)
    before_EOI, before_EII = weight_EOI.detach().clone(), gram_EII.clone()

    pruned_EOI, _ = sparsegpt.prune(weight_EOI, gram_EII, NOfM(2, 4))

    assert not pruned_EOI.requires_grad
    assert torch.equal(weight_EOI, before_EOI)
    assert torch.equal(gram_EII, before_EII)
