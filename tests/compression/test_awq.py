"""AWQ: scales that change exponents alone, and losses that are those of the outputs.

Shapes: A exponents tried, E experts, O output features, I input features, R outputs looked at, T tokens.
"""

import math

import pytest
import torch
from torch import Tensor

from compression.slimming.awq import EXPONENTS, best_exponents, input_scales, losses, round_weighted
from compression.slimming.damage import sample
from compression.slimming.grid import AnyGrid, FloatGrid, Grid, dequantize, quantize, search_scales
from compression.slimming.rtn import round_to_nearest
from tests.compression.test_gptq import correlated_tokens, weights

exponents = pytest.mark.parametrize("exponent", EXPONENTS)


def loudness(*shape: int, spread: float = 2.0) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).exp()


def test_scales_by_hand():
    # Roots of the mean squares: 1, 4 and 16, around their geometric middle of 4; the silent input counts for nothing.
    mean_square_EI = torch.tensor([[1.0, 16.0, 0.0, 256.0]])

    assert input_scales(mean_square_EI, 1.0).tolist() == [[0.25, 1, 1, 4]]
    assert input_scales(mean_square_EI, 0.5).tolist() == [[0.5, 1, 1, 2]]


@exponents
def test_scales_are_powers_of_two_of_at_most_six_orders_either_way(exponent: float):
    mean_square_EI = loudness(3, 500, spread=12.0)

    mantissa_EI, order_EI = input_scales(mean_square_EI, exponent).frexp()

    assert (mantissa_EI == 0.5).all()  # 2^k is told as 0.5 x 2^(k + 1)
    widest = order_EI.sub(1).abs().amax().item()
    assert widest <= 6
    assert (widest == 6) == (exponent >= 0.2), "this data does not reach the limit where it should"


@exponents
def test_louder_inputs_never_get_smaller_scales(exponent: float):
    loud_EI = loudness(2, 100, spread=6.0).sort(dim=1).values

    assert (input_scales(loud_EI, exponent).diff(dim=1) >= 0).all()


def test_the_exponent_zero_scales_nothing_and_one_makes_inputs_equally_loud():
    mean_square_EI = loudness(3, 200)

    assert (input_scales(mean_square_EI, 0.0) == 1).all()
    left_EI = mean_square_EI.sqrt() / input_scales(mean_square_EI, 1.0)
    # Powers of two are met to within half an order either way: a factor of two between the loudest and the quietest.
    assert (left_EI.amax(1) / left_EI.amin(1) < 2 * (1 + 1e-6)).all()
    assert (mean_square_EI.sqrt().amax(1) / mean_square_EI.sqrt().amin(1) > 20).all()


@exponents
def test_inputs_that_never_fire_keep_a_scale_of_one_and_move_no_other(exponent: float):
    heard_EI = 1000 * loudness(2, 60)
    with_silent_EI = torch.cat([heard_EI, torch.zeros(2, 40)], dim=1)

    scale_EI = input_scales(with_silent_EI, exponent)

    assert (scale_EI[:, 60:] == 1).all()
    assert torch.equal(scale_EI[:, :60], input_scales(heard_EI, exponent))
    assert (input_scales(torch.zeros(2, 9), exponent) == 1).all()


@exponents
def test_the_same_data_four_times_as_loud_gets_the_same_scales(exponent: float):
    mean_square_EI = loudness(2, 64)

    assert torch.equal(input_scales(mean_square_EI * 16, exponent), input_scales(mean_square_EI, exponent))


def slow_loss(weight_OI: Tensor, x_TI: Tensor, scale_I: list[float], grid: AnyGrid) -> float:
    """The squared error of the outputs of one expert on its tokens, in float64, as a mean over tokens."""
    factor_I = torch.tensor(scale_I, dtype=torch.float64)
    loud_OI = (weight_OI.double() * factor_I).to(weight_OI.dtype)
    quiet_I = (x_TI.double() / factor_I).square().mean(dim=0)
    scale_OG = search_scales(loud_OI[None], grid, quiet_I[None])
    became_OI = dequantize(quantize(loud_OI[None], scale_OG, grid), scale_OG)[0].double() / factor_I
    return (x_TI.double() @ (weight_OI.double() - became_OI).T).square().sum(dim=1).mean().item()


def slow_scales(mean_square_I: Tensor, exponent: float) -> list[float]:
    orders = [math.log2(square) / 2 for square in mean_square_I.tolist()]
    middle = sum(orders) / len(orders)
    return [2.0 ** max(-6, min(6, round((order - middle) * exponent))) for order in orders]


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1), FloatGrid()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "looked_at"), [(8, slice(None)), (200, slice(None, None, 2))])
def test_losses_are_those_of_a_slow_loop_over_tokens(grid: AnyGrid, dtype: torch.dtype, outputs: int, looked_at: slice):
    weight_EOI = weights(2, outputs, 64).to(dtype)
    x_ETI = torch.stack([correlated_tokens(150, 64, seed) for seed in range(2)])
    gram_EII = (x_ETI.mT.double() @ x_ETI.double() / 150).float()
    shared_I = gram_EII.diagonal(dim1=1, dim2=2).mean(dim=0)

    loss_AE = losses(weight_EOI, gram_EII, shared_I.expand(2, -1), grid)

    assert loss_AE.shape == (len(EXPONENTS), 2)
    for exponent, loss_E in zip(EXPONENTS, loss_AE.tolist(), strict=True):
        scale_I = slow_scales(shared_I, exponent)
        slow = [slow_loss(weight_OI[looked_at], x_TI, scale_I, grid) for weight_OI, x_TI in zip(weight_EOI, x_ETI, strict=True)]
        assert loss_E == pytest.approx(slow, rel=1e-4)  # a quadratic form of a Gram matrix in float32 against sums in float64


def test_the_loss_of_exponent_zero_is_that_of_rounding_by_loudness():
    weight_EOI, x_TI, grid = weights(1, 16, 64), correlated_tokens(200, 64), Grid(4, 32)
    gram_EII = (x_TI.T @ x_TI / 200)[None]
    mean_square_EI = gram_EII.diagonal(dim1=1, dim2=2)

    loss_AE = losses(weight_EOI, gram_EII, mean_square_EI, grid)

    rounded = round_weighted(weight_EOI, mean_square_EI, grid)
    lost_OI = weight_EOI[0] - dequantize(rounded.codes_EOI, rounded.scale_EOG)[0]
    assert loss_AE[0].item() == pytest.approx((x_TI @ lost_OI.T).square().sum().item() / 200, rel=1e-4)  # both in float32


def test_with_a_few_loud_inputs_some_scaling_beats_none():
    weight_EOI, mean_square_EI = weights(3, 64, 128), torch.ones(3, 128)
    mean_square_EI[:, 5::40] = 20.0**2

    loss_AE = losses(weight_EOI, mean_square_EI.diag_embed(), mean_square_EI, Grid(3, 32))

    assert all(exponent > 0 for exponent in best_exponents(loss_AE))
    assert (loss_AE.amin(0) < 0.8 * loss_AE[0]).all()


def test_the_best_exponent_has_the_least_loss_and_is_the_smallest_of_equals():
    loss_AE = torch.ones(len(EXPONENTS), 3, dtype=torch.float64)
    loss_AE[4, 1] = 0.5
    loss_AE[[3, 7, 10], 2] = 0.25

    assert best_exponents(loss_AE) == [0.0, 0.4, 0.3]


@pytest.mark.parametrize("grid", [Grid(4, 32), FloatGrid()], ids=repr)
def test_without_tokens_it_is_rounding_without_calibration_and_neighbours_are_not(grid: AnyGrid):
    weight_EOI, mean_square_EI = weights(3, 8, 64), loudness(3, 64)
    mean_square_EI[1] = 0

    rounded = round_weighted(weight_EOI, mean_square_EI, grid)

    nearest = round_to_nearest(weight_EOI, grid)
    assert torch.equal(rounded.codes_EOI[1].float(), nearest.codes_EOI[1].float())
    assert torch.equal(rounded.scale_EOG[1], nearest.scale_EOG[1])
    for e in (0, 2):
        alone = round_weighted(weight_EOI[e, None], mean_square_EI[e, None], grid)
        assert torch.equal(rounded.scale_EOG[e], alone.scale_EOG[0])
        assert not torch.equal(rounded.scale_EOG[e], nearest.scale_EOG[e])


def test_scaling_by_a_power_of_two_and_back_loses_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        weight_EOI = weights(2, 8, 64).to(dtype)
        factor_E1I = input_scales(loudness(2, 64, spread=12.0), 1.0)[:, None].to(dtype)

        assert torch.equal(weight_EOI * factor_E1I / factor_E1I, weight_EOI)
        assert not torch.equal(weight_EOI * factor_E1I, weight_EOI)


def test_at_most_128_outputs_decide():
    weight_EOI, x_TI = weights(1, 300, 32), correlated_tokens(100, 32)
    gram_EII = (x_TI.T @ x_TI / 100)[None]
    mean_square_EI = gram_EII.diagonal(dim1=1, dim2=2)

    all_AE = losses(weight_EOI, gram_EII, mean_square_EI, Grid(4, -1))

    assert torch.equal(all_AE, losses(sample(weight_EOI), gram_EII, mean_square_EI, Grid(4, -1)))
