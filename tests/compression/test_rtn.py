"""Round to nearest: nearest it is, for every weight, whoever else is in the stack.

Shapes: E experts, O output features, I input features, G groups, C codes.
"""

import pytest
import torch
from torch import Tensor

from compression.slimming.grid import Grid, dequantize
from compression.slimming.rtn import round_to_nearest


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def squared_error(weight_EOI: Tensor, grid: Grid) -> float:
    quantized = round_to_nearest(weight_EOI, grid)
    return (dequantize(quantized.codes_EOI, quantized.scale_EOG).double() - weight_EOI.double()).square().sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_no_code_is_nearer_than_the_one_chosen(dtype: torch.dtype, bits: int, group_size: int):
    weight_EOI, grid = weights(2, 3, 64, dtype=dtype), Grid(bits, group_size)

    quantized = round_to_nearest(weight_EOI, grid)

    scale_EOI = quantized.scale_EOG.double().repeat_interleave(64 // quantized.scale_EOG.shape[2], dim=2)
    all_C = torch.arange(grid.lowest, grid.highest + 1, dtype=torch.float64)
    distance_EOIC = (weight_EOI.double().unsqueeze(3) - scale_EOI.unsqueeze(3) * all_C).abs()
    chosen_EOI = (weight_EOI.double() - scale_EOI * quantized.codes_EOI).abs()
    # The ratio of weight and scale is rounded to float32: half a code is met to within 128 x 2^-24 of a scale.
    assert (chosen_EOI <= distance_EOIC.amin(3) + scale_EOI * 1e-5).all()


def test_codes_are_int8_and_scales_keep_the_weights_dtype():
    quantized = round_to_nearest(weights(2, 3, 64, dtype=torch.bfloat16), Grid(4, 32))

    assert (quantized.codes_EOI.dtype, quantized.codes_EOI.shape) == (torch.int8, (2, 3, 64))
    assert (quantized.scale_EOG.dtype, quantized.scale_EOG.shape) == (torch.bfloat16, (2, 3, 2))


def test_an_expert_is_rounded_alone_as_it_is_in_a_stack():
    weight_EOI, grid = weights(5, 7, 128), Grid(4, 64)

    together = round_to_nearest(weight_EOI, grid)

    for expert in range(5):
        alone = round_to_nearest(weight_EOI[expert, None], grid)
        assert torch.equal(together.codes_EOI[expert], alone.codes_EOI[0])
        assert torch.equal(together.scale_EOG[expert], alone.scale_EOG[0])


def test_more_bits_and_smaller_groups_lose_less():
    weight_EOI = weights(2, 16, 256)

    assert (
        squared_error(weight_EOI, Grid(8, 64)) < squared_error(weight_EOI, Grid(4, 64)) < squared_error(weight_EOI, Grid(3, 64))
    )
    assert (
        squared_error(weight_EOI, Grid(4, 32)) < squared_error(weight_EOI, Grid(4, 128)) < squared_error(weight_EOI, Grid(4, -1))
    )
