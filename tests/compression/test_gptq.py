"""GPTQ: the codes of a slow, independent elimination; exactly round-to-nearest where there is nothing to repair.

Shapes: E experts, O output features, I input features, G groups, T tokens.
"""

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from compression.slimming import feedback, gptq
from compression.slimming.awq import round_weighted
from compression.slimming.damage import relative_errors
from compression.slimming.grid import AnyGrid, FloatGrid, Grid, Quantized, dequantize, quantize, search_scales
from compression.slimming.rtn import round_to_nearest

SHAPES = [  # outputs, inputs, bits, group_size: multiples of the base block and of the panel, and neither
    (16, 64, 4, 32),
    (5, 200, 4, -1),
    (24, 320, 3, 64),
    (3, 130, 2, -1),
    (9, 256, 8, 128),
]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_tokens(count: int, width: int, seed: int = 0) -> Tensor:
    """Inputs that mix with one another, some much louder than others, in no order."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    loudness_I = torch.randn(width, generator=generator).exp()
    return torch.randn(count, width, generator=generator) @ mix_II * loudness_I


def grams(experts: int, width: int, *, tokens: int | None = None) -> Tensor:
    count = tokens or 2 * width
    stack_ETI = torch.stack([correlated_tokens(count, width, seed) for seed in range(experts)])
    gram_EII = stack_ETI.mT @ stack_ETI / count
    return (gram_EII + gram_EII.mT) / 2


def relative_error(weight_EOI: Tensor, became_EOI: Tensor, statistic: Tensor | None) -> Tensor:
    return relative_errors(weight_EOI, [became_EOI], statistic)[0]


def widest_scales(weight_EOI: Tensor, grid: Grid) -> Tensor:
    """amax / highest: no weight lies half way between two codes, so float32 and float64 must agree."""
    return (
        weight_EOI.float()
        .unflatten(2, (grid.groups(weight_EOI.shape[2]), -1))
        .abs()
        .amax(3)
        .div(grid.highest)
        .to(weight_EOI.dtype)
    )


def eliminated(weight_OI: Tensor, gram_II: Tensor, scale_OG: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """GPTQ as its paper tells it, in float64: invert, quantize an input, spread its error, eliminate it from the inverse.

    Also returns, per row, how near a quotient came to a tie between two codes.
    """
    inputs = weight_OI.shape[1]
    damped_II = gram_II.double() + 0.01 * gram_II.double().diagonal().mean() * torch.eye(inputs)
    inverse_II = torch.linalg.inv(damped_II)
    rest_OI, codes_OI = weight_OI.double(), torch.zeros(weight_OI.shape, dtype=torch.int8)
    scale_OI = scale_OG.repeat_interleave(inputs // scale_OG.shape[1], dim=1)
    nearest_tie_O = torch.full((weight_OI.shape[0],), torch.inf, dtype=torch.float64)
    for j in torch.argsort(gram_II.diagonal(), descending=True, stable=True).tolist():
        quotient_O = rest_OI[:, j] / scale_OI[:, j].double()
        nearest_tie_O = torch.minimum(nearest_tie_O, (quotient_O - quotient_O.floor() - 0.5).abs())
        code_O = quotient_O.round().clamp(grid.lowest, grid.highest)
        stored_O = (code_O.to(scale_OG.dtype) * scale_OI[:, j]).double()
        codes_OI[:, j] = code_O.to(torch.int8)
        rest_OI = rest_OI - ((rest_OI[:, j] - stored_O) / inverse_II[j, j])[:, None] * inverse_II[j]
        inverse_II = inverse_II - torch.outer(inverse_II[:, j], inverse_II[j]) / inverse_II[j, j]
        inverse_II[j, j] = 1.0  # its row and column are zero now but for rounding; nothing reads the pivot again
    return codes_OI, nearest_tie_O


def assert_eliminated(codes_EOI: Tensor, weight_EOI: Tensor, gram_EII: Tensor, *, scale_EOG: Tensor, grid: Grid) -> None:
    """At a tie float32 and float64 may part, and the rest of the row with them; such rows are left out, and must be few."""
    compared = 0
    for codes_OI, *expert in zip(codes_EOI, weight_EOI, gram_EII, scale_EOG, strict=True):
        expected_OI, nearest_tie_O = eliminated(*expert, grid)
        clear_O = nearest_tie_O > 1e-4  # ten times what a quotient in float32 is off
        assert torch.equal(codes_OI[clear_O], expected_OI[clear_O])
        compared += int(clear_O.sum())
    assert compared > 0.7 * codes_EOI[:, :, 0].numel()


@pytest.mark.parametrize(("outputs", "inputs", "bits", "group_size"), SHAPES)
def test_codes_are_those_of_a_float64_elimination_of_the_inverse(outputs: int, inputs: int, bits: int, group_size: int):
    grid, weight_EOI, gram_EII = Grid(bits, group_size), weights(3, outputs, inputs), grams(3, inputs)
    scale_EOG = widest_scales(weight_EOI, grid)

    quantized, damping_E = gptq.quantize(weight_EOI, gram_EII, grid, scale_EOG=scale_EOG)

    assert quantized.scale_EOG is scale_EOG
    assert damping_E.tolist() == [0.01] * 3
    assert_eliminated(quantized.codes_EOI, weight_EOI, gram_EII, scale_EOG=scale_EOG, grid=grid)


def test_the_error_handed_on_is_that_of_the_weight_a_loader_will_compute():
    # 8 bits in bf16: the product of code and scale is itself rounded, by up to half a code.
    grid, weight_EOI, gram_EII = Grid(8, 64), weights(2, 16, 128).bfloat16(), grams(2, 128)
    scale_EOG = widest_scales(weight_EOI, grid)

    codes_EOI = gptq.quantize(weight_EOI, gram_EII, grid, scale_EOG=scale_EOG)[0].codes_EOI

    assert_eliminated(codes_EOI, weight_EOI, gram_EII, scale_EOG=scale_EOG, grid=grid)


def test_two_inputs_by_hand():
    # The second input is louder and goes first: 0.6 -> 1, error -0.4. The first repairs it by their product over its own
    # damped square, 2 + 0.01 x the mean diagonal 3: 0.6 + 2 / 2.03 x -0.4 = 0.206 -> 0, where rounding says 1.
    weight_EOI = torch.tensor([[[0.6, 0.6]]])
    gram_EII = torch.tensor([[[2.0, 2.0], [2.0, 4.0]]])

    quantized, _ = gptq.quantize(weight_EOI, gram_EII, Grid(4, -1), scale_EOG=torch.ones(1, 1, 1))

    assert quantized.codes_EOI.tolist() == [[[0, 1]]]
    # dW = (0.6, -0.4): 2 x 0.36 - 2 x 2 x 0.24 + 4 x 0.16 = 0.4; W: 2 x 0.36 + 2 x 2 x 0.36 + 4 x 0.36 = 3.6.
    assert output_error(weight_EOI, quantized, gram_EII).item() == pytest.approx(0.4 / 3.6, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs", "bits", "group_size"), SHAPES)
def test_with_an_identity_gram_matrix_it_is_round_to_nearest(
    dtype: torch.dtype, outputs: int, inputs: int, bits: int, group_size: int
):
    grid, weight_EOI = Grid(bits, group_size), weights(2, outputs, inputs).to(dtype)

    quantized, _ = gptq.quantize(weight_EOI, torch.eye(inputs).expand(2, -1, -1), grid)

    nearest = round_to_nearest(weight_EOI, grid)
    assert torch.equal(quantized.codes_EOI, nearest.codes_EOI)
    assert torch.equal(quantized.scale_EOG, nearest.scale_EOG)


def test_inputs_of_different_loudness_that_never_meet_are_rounded_to_nearest_on_scales_that_weigh_it():
    grid, weight_EOI = Grid(4, 32), weights(2, 8, 96)
    loudness_EI = torch.rand(2, 96, generator=torch.Generator().manual_seed(0)) + 0.1

    quantized, _ = gptq.quantize(weight_EOI, loudness_EI.diag_embed(), grid)

    damped_EI = loudness_EI + 0.01 * loudness_EI.mean(dim=1, keepdim=True)  # an error costs what is left of the damped square
    rounded = round_weighted(weight_EOI, damped_EI, grid)
    assert torch.equal(quantized.codes_EOI, rounded.codes_EOI)
    assert torch.equal(quantized.scale_EOG, rounded.scale_EOG)
    assert not torch.equal(quantized.scale_EOG, round_to_nearest(weight_EOI, grid).scale_EOG)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1), FloatGrid()], ids=repr)
def test_with_a_diagonal_gram_matrix_the_scales_are_those_that_weigh_errors_by_the_damped_diagonal(grid: AnyGrid):
    weight_EOI = weights(2, 8, 96)
    loudness_EI = torch.randn(2, 96, generator=torch.Generator().manual_seed(0)).mul(2).exp()

    quantized, _ = gptq.quantize(weight_EOI, loudness_EI.diag_embed(), grid)

    damped_EI = loudness_EI + 0.01 * loudness_EI.mean(dim=1, keepdim=True)
    assert torch.equal(quantized.scale_EOG, search_scales(weight_EOI, grid, damped_EI))
    assert not torch.equal(quantized.scale_EOG, search_scales(weight_EOI, grid))


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1), FloatGrid()], ids=repr)
def test_the_scales_weigh_errors_by_what_the_inputs_after_them_cannot_stand_in_for(grid: AnyGrid):
    weight_EOI, gram_EII = weights(3, 8, 96), grams(3, 96)

    quantized, _ = gptq.quantize(weight_EOI, gram_EII, grid)

    left_EI = torch.stack([left_of(gram_II) for gram_II in gram_EII])
    expected_EOG = search_scales(weight_EOI, grid, left_EI)
    # D in float32 is off by some 1e-5, and two candidates may be as near as that: one scale in fifty may part.
    assert (quantized.scale_EOG == expected_EOG).float().mean() >= 0.98
    for other_EI in (gram_EII.diagonal(dim1=1, dim2=2), None):
        assert (quantized.scale_EOG == search_scales(weight_EOI, grid, other_EI)).float().mean() < 0.9


def left_of(gram_II: Tensor) -> Tensor:
    """Each input's variance given those that are quieter than it, in float64, one regression after the other."""
    damped_II = gram_II.double() + 0.01 * gram_II.double().diagonal().mean() * torch.eye(len(gram_II))
    left_I = damped_II.diagonal().clone()
    order = torch.argsort(gram_II.diagonal(), descending=True, stable=True).tolist()
    for place, j in enumerate(order[:-1]):
        later = order[place + 1 :]
        left_I[j] -= damped_II[j, later] @ torch.linalg.solve(damped_II[later][:, later], damped_II[later, j])
    return left_I


@pytest.mark.parametrize(("outputs", "inputs", "bits", "group_size"), SHAPES)
def test_an_expert_gets_the_same_codes_alone_in_the_stack_and_in_any_chunk(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, bits: int, group_size: int
):
    grid, weight_EOI, gram_EII = Grid(bits, group_size), weights(7, outputs, inputs), grams(7, inputs)
    monkeypatch.setattr(feedback, "_experts_at_once", lambda weight_EOI: len(weight_EOI))
    together_EOI = gptq.quantize(weight_EOI, gram_EII, grid)[0].codes_EOI

    for at_once in (1, 3):
        monkeypatch.setattr(feedback, "_experts_at_once", lambda _, at_once=at_once: at_once)
        assert torch.equal(gptq.quantize(weight_EOI, gram_EII, grid)[0].codes_EOI, together_EOI)
    for e in range(7):
        alone_1OI = gptq.quantize(weight_EOI[e, None], gram_EII[e, None], grid)[0].codes_EOI
        assert torch.equal(alone_1OI[0], together_EOI[e])


def test_renaming_the_inputs_renames_the_codes():
    # Loud inputs go first whatever they are called; one group, so that the scales do not change.
    grid, weight_EOI, gram_EII = Grid(4, -1), weights(2, 8, 96), grams(2, 96)
    names_I = torch.randperm(96, generator=torch.Generator().manual_seed(1))

    codes_EOI = gptq.quantize(weight_EOI, gram_EII, grid)[0].codes_EOI
    renamed_EOI = gptq.quantize(weight_EOI[:, :, names_I], gram_EII[:, names_I][:, :, names_I], grid)[0].codes_EOI

    assert torch.equal(renamed_EOI, codes_EOI[:, :, names_I])


def test_louder_data_of_the_same_kind_gives_the_same_codes():
    grid, weight_EOI, gram_EII = Grid(4, 32), weights(2, 8, 96), grams(2, 96)

    codes_EOI = gptq.quantize(weight_EOI, gram_EII, grid)[0].codes_EOI

    assert torch.equal(gptq.quantize(weight_EOI, gram_EII * 2**20, grid)[0].codes_EOI, codes_EOI)
    assert torch.equal(gptq.quantize(weight_EOI, gram_EII * 2**-20, grid)[0].codes_EOI, codes_EOI)


@pytest.mark.parametrize(("outputs", "inputs", "bits", "group_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_error_is_well_below_that_of_rounding_on_correlated_inputs(
    dtype: torch.dtype, outputs: int, inputs: int, bits: int, group_size: int
):
    grid, weight_EOI, gram_EII = Grid(bits, group_size), weights(4, outputs, inputs).to(dtype), grams(4, inputs)

    quantized, _ = gptq.quantize(weight_EOI, gram_EII, grid)

    rounded_E = output_error(weight_EOI, round_to_nearest(weight_EOI, grid), gram_EII)
    assert (output_error(weight_EOI, quantized, gram_EII) < 0.6 * rounded_E).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_codes_lose_less_of_the_output_than_rounding_on_correlated_inputs(dtype: torch.dtype):
    grid, weight_EOI, gram_EII = FloatGrid(), weights(4, 16, 200).to(dtype), grams(4, 200)

    quantized, damping_E = gptq.quantize(weight_EOI, gram_EII, grid)

    assert (quantized.codes_EOI.dtype, quantized.scale_EOG.shape) == (torch.float8_e4m3fn, (4, 16, 1))
    assert damping_E.tolist() == [0.01] * 4
    rounded_E = output_error(weight_EOI, round_to_nearest(weight_EOI, grid), gram_EII)
    assert (output_error(weight_EOI, quantized, gram_EII) < 0.4 * rounded_E).all()


def test_with_an_identity_gram_matrix_float_codes_are_round_to_nearest():
    grid, weight_EOI = FloatGrid(), weights(2, 16, 200)

    quantized, _ = gptq.quantize(weight_EOI, torch.eye(200).expand(2, -1, -1), grid)

    nearest = round_to_nearest(weight_EOI, grid)
    assert torch.equal(quantized.codes_EOI.float(), nearest.codes_EOI.float())
    assert torch.equal(quantized.scale_EOG, nearest.scale_EOG)


@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(8, 32), FloatGrid()], ids=repr)
def test_a_weight_that_may_only_be_zero_is_zero_and_the_others_repair_it(grid: AnyGrid):
    weight_EOI, gram_EII = weights(3, 8, 96), grams(3, 96)
    kept_EOI = torch.rand(weight_EOI.shape, generator=torch.Generator().manual_seed(1)) > 0.1  # of weights that are not zero

    quantized, _ = gptq.quantize(weight_EOI, gram_EII, grid, kept_EOI=kept_EOI)

    stored_EOI = dequantize(quantized.codes_EOI, quantized.scale_EOG)
    assert (stored_EOI[~kept_EOI] == 0).all()
    cut_E = relative_error(
        weight_EOI, dequantize(quantize(weight_EOI, quantized.scale_EOG, grid), quantized.scale_EOG) * kept_EOI, gram_EII
    )
    assert (relative_error(weight_EOI, stored_EOI, gram_EII) < 0.6 * cut_E).all()


def test_which_weights_may_stay_is_each_experts_own_in_any_chunk(monkeypatch: pytest.MonkeyPatch):
    weight_EOI, gram_EII, grid = weights(5, 8, 96), grams(5, 96), Grid(4, 32)
    kept_EOI = torch.rand(weight_EOI.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    monkeypatch.setattr(feedback, "_experts_at_once", lambda weight_EOI: len(weight_EOI))
    together_EOI = gptq.quantize(weight_EOI, gram_EII, grid, kept_EOI=kept_EOI)[0].codes_EOI

    for at_once in (1, 2):
        monkeypatch.setattr(feedback, "_experts_at_once", lambda _, at_once=at_once: at_once)
        assert torch.equal(gptq.quantize(weight_EOI, gram_EII, grid, kept_EOI=kept_EOI)[0].codes_EOI, together_EOI)
    assert (together_EOI[~kept_EOI] == 0).all()


def test_letting_every_weight_stay_is_naming_none():
    weight_EOI, gram_EII, grid = weights(2, 8, 96), grams(2, 96), Grid(4, 32)

    all_kept, _ = gptq.quantize(weight_EOI, gram_EII, grid, kept_EOI=torch.ones(2, 8, 96, dtype=torch.bool))

    assert torch.equal(all_kept.codes_EOI, gptq.quantize(weight_EOI, gram_EII, grid)[0].codes_EOI)


def output_error(weight_EOI: Tensor, quantized: Quantized, gram_EII: Tensor) -> Tensor:
    return relative_error(weight_EOI, dequantize(quantized.codes_EOI, quantized.scale_EOG), gram_EII)


def indefinite(width: int) -> Tensor:
    gram_II = torch.eye(width)
    gram_II[0, 1] = gram_II[1, 0] = 100.0
    return gram_II


def test_bad_gram_matrices_are_rounded_or_repaired_and_leave_their_neighbours_alone():
    width, grid = 128, Grid(4, 32)
    healthy_II, tokens_TI = grams(1, width)[0], correlated_tokens(10, width, seed=5)
    few_tokens_II = tokens_TI.T @ tokens_TI / 10  # rank 10 of 128
    speck_II = healthy_II.clone()
    speck_II[3, 77] = speck_II[77, 3] = float("nan")
    dead_II = healthy_II.clone()
    dead_II[40] = dead_II[:, 40] = 0
    bad = [torch.zeros(width, width), torch.full((width, width), torch.nan), speck_II, indefinite(width), few_tokens_II, dead_II]
    weight_EOI = weights(len(bad) + 2, 16, width)
    gram_EII = torch.stack([healthy_II, *bad, healthy_II])

    quantized, damping_E = gptq.quantize(weight_EOI, gram_EII, grid)

    nearest_EOI = round_to_nearest(weight_EOI, grid).codes_EOI
    assert damping_E.tolist() == [0.01, *[torch.inf] * 4, 0.01, 0.01, 0.01]
    assert torch.equal(quantized.codes_EOI[1:5], nearest_EOI[1:5])
    nearest_on_found_EOI = quantize(weight_EOI, quantized.scale_EOG, grid)
    assert torch.equal(quantized.codes_EOI[6, :, 40], nearest_on_found_EOI[6, :, 40])
    for e in (0, 5, 6, 7):
        assert not torch.equal(quantized.codes_EOI[e], nearest_EOI[e])
        alone_1OI = gptq.quantize(weight_EOI[e, None], gram_EII[e, None], grid)[0].codes_EOI
        assert torch.equal(quantized.codes_EOI[e], alone_1OI[0])


def test_an_input_that_never_fires_does_not_change_how_the_others_are_repaired():
    width, grid = 64, Grid(4, -1)
    weight_EOI, gram_EII = weights(1, 8, width), grams(1, width)
    scale_EOG = torch.full((1, 8, 1), 0.01)
    gram_EII[:, 20] = gram_EII[:, :, 20] = 0
    louder_EOI = weight_EOI.clone()
    louder_EOI[:, :, 20] *= -3

    codes = [gptq.quantize(w_EOI, gram_EII, grid, scale_EOG=scale_EOG)[0].codes_EOI for w_EOI in (weight_EOI, louder_EOI)]

    others_I = torch.arange(width) != 20
    assert torch.equal(codes[0][:, :, others_I], codes[1][:, :, others_I])
    assert not torch.equal(codes[0][:, :, 20], codes[1][:, :, 20])


def test_the_damping_that_was_needed_is_told():
    # The smallest eigenvalue is 1 - 1.05: a hundredth of the diagonal does not lift it above zero, a tenth does.
    gram_EII = torch.tensor([[[1.0, 1.05], [1.05, 1.0]]])

    _, damping_E = gptq.quantize(weights(1, 4, 2), gram_EII, Grid(4, -1))

    assert damping_E.tolist() == pytest.approx([0.1])


def test_arguments_are_left_alone_and_parameters_are_taken_as_they_are():
    weight_EOI, gram_EII = torch.nn.Parameter(weights(2, 8, 64)), grams(2, 64)
    before_EOI, before_EII = weight_EOI.detach().clone(), gram_EII.clone()

    quantized, _ = gptq.quantize(weight_EOI, gram_EII, Grid(4, 32))

    assert not quantized.scale_EOG.requires_grad
    assert torch.equal(weight_EOI, before_EOI)
    assert torch.equal(gram_EII, before_EII)


def test_fewer_experts_are_solved_at_once_when_memory_is_short(monkeypatch: pytest.MonkeyPatch):
    weight_EOI = torch.empty(64, 16, 128)
    one_expert = 9 * 16 * 128 + 4 * 128 * 128
    counts = []

    for free in (0, 4 * 10 * one_expert, 2**60):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        counts.append(feedback._experts_at_once(weight_EOI))

    assert counts == [1, 10, 64]
