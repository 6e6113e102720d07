"""The grid: scales a loader can use, nearest codes, and the numbers the stock loader computes from them.

Shapes: E experts, O output features, I input features, G groups, N inputs of a group, C candidates.
"""

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression.checkpoint.packing import pack
from compression.errors import NonFiniteWeights
from compression.slimming.grid import AnyGrid, FloatGrid, Grid, dequantize, quantize, search_scales

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def stock_weight(codes_OI: Tensor, scale_OG: Tensor, grid: Grid) -> Tensor:
    """Return what compressed-tensors makes of the files we would write."""
    group = {"strategy": "channel"} if grid.group_size == -1 else {"strategy": "group", "group_size": grid.group_size}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=grid.bits, symmetric=True, **group))
    files = {"weight_packed": pack(codes_OI, grid.bits), "weight_scale": scale_OG, "weight_shape": torch.tensor(codes_OI.shape)}
    return PackedQuantizationCompressor.decompress(files, scheme)["weight"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_dequantize_gives_bit_for_bit_what_the_stock_loader_gives(dtype: torch.dtype, bits: int, group_size: int):
    weight_EOI, grid = weights(2, 5, 256, dtype=dtype), Grid(bits, group_size)
    scale_EOG = search_scales(weight_EOI, grid)
    codes_EOI = quantize(weight_EOI, scale_EOG, grid)

    stored_EOI = dequantize(codes_EOI, scale_EOG)

    assert stored_EOI.dtype == dtype
    for stored_OI, codes_OI, scale_OG in zip(stored_EOI, codes_EOI, scale_EOG, strict=True):
        assert torch.equal(stored_OI, stock_weight(codes_OI, scale_OG, grid))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_was_dequantized_quantizes_to_the_same_codes(dtype: torch.dtype, bits: int):
    weight_EOI, grid = weights(2, 8, 128, dtype=dtype), Grid(bits, 32)
    scale_EOG = search_scales(weight_EOI, grid)
    codes_EOI = quantize(weight_EOI, scale_EOG, grid)

    assert torch.equal(quantize(dequantize(codes_EOI, scale_EOG), scale_EOG, grid), codes_EOI)


def test_codes_are_rounded_ties_to_even_and_clamped_to_their_range():
    weight_EOI = torch.tensor([[[0.5, 1.5, -0.5, -2.5, 7.5, 99.0, -8.5, -9.0]]])

    codes_EOI = quantize(weight_EOI, torch.ones(1, 1, 1), Grid(4, -1))

    assert codes_EOI.tolist() == [[[0, 2, 0, -2, 7, 7, -8, -8]]]


def test_a_weight_exactly_half_way_goes_to_the_even_code_whatever_the_scale():
    # bf16 scales: (k + 1/2) times the scale is exact in float32, its product with 1 / scale is not.
    scale_1OG = (1 + torch.arange(128) / 128).view(1, 128, 1)
    half_I = torch.arange(-8, 7) + 0.5

    codes_1OI = quantize(scale_1OG * half_I, scale_1OG, Grid(4, -1))

    assert torch.equal(codes_1OI, half_I.round().to(torch.int8).expand(1, 128, -1))


def test_each_group_is_divided_by_its_own_scale():
    weight_EOI = torch.tensor([[[1.0, 2.0, 10.0, 20.0]]])

    codes_EOI = quantize(weight_EOI, torch.tensor([[[1.0, 10.0]]]), Grid(4, 2))

    assert codes_EOI.tolist() == [[[1, 2, 1, 2]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_other_candidate_scale_has_a_smaller_error(dtype: torch.dtype, bits: int):
    weight_EOI, grid = weights(2, 40, 128, dtype=dtype), Grid(bits, 64)
    weight_EOGN = weight_EOI.double().unflatten(2, (2, 64))
    full_EOG = weight_EOI.float().unflatten(2, (2, 64)).abs().amax(3) / ((grid.highest - grid.lowest) / 2)

    def error_of(scale_EOG: Tensor) -> Tensor:
        step_EOG1 = scale_EOG.double().unsqueeze(3)
        codes_EOGN = (weight_EOGN / step_EOG1).round().clamp(grid.lowest, grid.highest)
        return (codes_EOGN * step_EOG1 - weight_EOGN).square().sum(3)

    found_EOG = error_of(search_scales(weight_EOI, grid))

    shares = [1.1 - 0.6 * step / 9 for step in range(10)] + [(grid.highest - grid.lowest) / 2 / grid.highest]
    error_CEOG = torch.stack([error_of((full_EOG * share).to(dtype)) for share in shares])
    # The search sums 64 squares in float32: it may prefer a candidate that is worse by a few units in the seventh place.
    assert (found_EOG <= error_CEOG.amin(0) * (1 + 1e-5)).all()
    assert (error_CEOG.argmin(0) > 0).any(), "every group kept the largest scale: this data does not test the search"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_loses_no_more_than_the_scale_that_clips_nothing(bits: int):
    weight_EOI, grid = weights(2, 40, 64), Grid(bits, -1)
    widest_EOG = weight_EOI.abs().amax(2, keepdim=True) / grid.highest

    found_EO, widest_EO = (
        (dequantize(quantize(weight_EOI, scale_EOG, grid), scale_EOG) - weight_EOI).double().square().sum(2)
        for scale_EOG in (search_scales(weight_EOI, grid), widest_EOG)
    )

    assert (found_EO <= widest_EO * (1 + 1e-5)).all()  # errors are summed in float32
    assert found_EO.sum() < widest_EO.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_zeros_gets_a_normal_positive_scale_and_stays_zero(dtype: torch.dtype):
    weight_EOI = weights(1, 2, 64, dtype=dtype)
    weight_EOI[0, 1, 32:] = 0

    scale_EOG = search_scales(weight_EOI, Grid(4, 32))
    codes_EOI = quantize(weight_EOI, scale_EOG, Grid(4, 32))

    assert (scale_EOG >= torch.finfo(dtype).tiny).all()
    assert (dequantize(codes_EOI, scale_EOG)[0, 1, 32:] == 0).all()
    assert (codes_EOI[0, 1, 32:] == 0).all()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    values=st.lists(st.floats(-6e4, 6e4, width=16), min_size=8, max_size=8),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([2, 3, 4, 8]),
    shrink=st.sampled_from([1.0, 1e-6, 1e-36, 1e-42]),
)
def test_no_scale_is_ever_zero_subnormal_or_infinite(values: list[float], dtype: torch.dtype, bits: int, shrink: float):
    weight_EOI = (torch.tensor(values) * shrink).to(dtype).view(1, 1, 8)

    scale_EOG = search_scales(weight_EOI, Grid(bits, -1))

    assert scale_EOG.isfinite().all()
    assert (scale_EOG >= torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_unit_in_the_last_place_does_not_move_the_code_of_a_groups_largest_weight(bits: int):
    weight_EOI, grid = weights(1, 500, 64), Grid(bits, -1)
    scale_EOG = search_scales(weight_EOI, grid)
    largest_EO1 = weight_EOI.abs().argmax(2, keepdim=True)

    codes = [
        quantize(nudged_EOI, scale_EOG, grid).gather(2, largest_EO1)
        for nudged_EOI in (weight_EOI * (1 - 2**-23), weight_EOI, weight_EOI * (1 + 2**-23))
    ]

    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[1], codes[2])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_the_experts_number(poison: float):
    weight_EOI = weights(3, 4, 32)
    weight_EOI[1, 2, 3] = poison

    with pytest.raises(NonFiniteWeights, match=r"\[1\]") as caught:
        search_scales(weight_EOI, Grid(4, 32))

    assert caught.value.details == {"experts": [1]}


def test_a_group_size_that_does_not_divide_the_row_is_our_own_mistake():
    with pytest.raises(AssertionError, match="64 do not divide 96"):
        Grid(4, 64).groups(96)


def test_scales_of_a_stack_are_those_of_its_experts_alone():
    # 1,200 rows of 128: blocks of the search end inside an expert.
    weight_EOI, grid = weights(4, 300, 128), Grid(4, 128)

    together_EOG = search_scales(weight_EOI, grid)

    assert torch.equal(together_EOG, torch.cat([search_scales(weight_EOI[expert, None], grid) for expert in range(4)]))


def test_a_transposed_view_is_quantized_like_its_copy_and_left_alone():
    weight_EIO = weights(2, 64, 6)
    before_EIO = weight_EIO.clone()
    grid = Grid(4, 32)

    scale_EOG = search_scales(weight_EIO.mT, grid)
    codes_EOI = quantize(weight_EIO.mT, scale_EOG, grid)

    assert torch.equal(scale_EOG, search_scales(weight_EIO.mT.contiguous(), grid))
    assert torch.equal(codes_EOI, quantize(weight_EIO.mT.contiguous(), scale_EOG, grid))
    assert torch.equal(weight_EIO, before_EIO)


def e4m3() -> Tensor:
    """All 254 codes that are numbers, the even of two neighbours at even places, in float64."""
    all_C = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return all_C[~all_C.isnan()]


def float_codes(ratios: Tensor) -> Tensor:
    """Return what these multiples of the scale become, as numbers."""
    codes_EOI = quantize(ratios.view(1, 1, -1), torch.ones(1, 1, 1, dtype=ratios.dtype), FloatGrid())
    assert codes_EOI.dtype == torch.float8_e4m3fn
    return codes_EOI.double().flatten()


def test_float_codes_by_hand():
    # Steps of 2^-5 from 0.25, of 2 from 16, of 32 from 256, of 2^-9 below 2^-6; 17, 19 and 2^-10 lie half way.
    ratios = torch.tensor([0.3, 17.0, 19.0, 300.0, -300.0, 448.0, 2**-10, 1.1 * 2**-10, 3 * 2**-10, 0.0])

    assert float_codes(ratios).tolist() == [0.3125, 16, 20, 288, -288, 448, 0, 2**-9, 2**-8, 0]


def test_no_float_code_is_nearer_than_the_one_chosen_and_ties_go_to_the_even():
    positive_C = e4m3()[:127]  # codes 0 to 126, ascending
    halfway = (positive_C[1:] + positive_C[:-1]) / 2
    random = torch.randn(5000, generator=torch.Generator().manual_seed(0)).double().mul(8).exp2().clamp(max=448).float().double()

    assert positive_C[-1] == 448
    assert (positive_C.diff() > 0).all()
    distance = (random[:, None] - positive_C).abs()
    assert torch.equal(float_codes(random.float()), positive_C[distance.argmin(dim=1)])
    even = positive_C[torch.arange(126).add(1) // 2 * 2]
    assert torch.equal(float_codes(halfway.float()), even)
    assert torch.equal(float_codes(-halfway.float()), -even)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_code_is_its_own_nearest(dtype: torch.dtype):
    assert torch.equal(float_codes(e4m3().to(dtype)), e4m3())


@pytest.mark.parametrize("too_large", [449.0, 464.0, 480.0, 1e4, 3e38, float("inf")])
def test_what_no_float_code_reaches_is_clamped_to_448_and_never_nan(too_large: float):
    # What the dtype's own conversion makes of more than 464, NaN or 448, depends on the release of torch.
    assert float_codes(torch.tensor([too_large, -too_large])).tolist() == [448, -448]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 31, 256])
def test_dequantized_floats_are_bit_for_bit_what_the_stock_loader_gives(dtype: torch.dtype, inputs: int):
    weight_EOI, grid = weights(2, 5, inputs, dtype=dtype), FloatGrid()
    scale_EOG = search_scales(weight_EOI, grid)
    codes_EOI = quantize(weight_EOI, scale_EOG, grid)
    arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)

    stored_EOI = dequantize(codes_EOI, scale_EOG)

    assert (stored_EOI.dtype, scale_EOG.shape) == (dtype, (2, 5, 1))
    for stored_OI, codes_OI, scale_OG in zip(stored_EOI, codes_EOI, scale_EOG, strict=True):
        files = {"weight": codes_OI, "weight_scale": scale_OG}
        assert torch.equal(stored_OI, FloatQuantizationCompressor.decompress(files, scheme)["weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_dequantized_from_floats_quantizes_to_the_same_codes(dtype: torch.dtype):
    weight_EOI, grid = weights(2, 8, 128, dtype=dtype), FloatGrid()
    scale_EOG = search_scales(weight_EOI, grid)
    codes_EOI = quantize(weight_EOI, scale_EOG, grid)

    again_EOI = quantize(dequantize(codes_EOI, scale_EOG), scale_EOG, grid)

    assert torch.equal(again_EOI.double(), codes_EOI.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_search_for_floats_loses_no_more_than_the_scale_everybody_takes(dtype: torch.dtype):
    weight_EOI, grid = weights(2, 40, 64, dtype=dtype), FloatGrid()
    plain_EOG = (weight_EOI.float().abs().amax(2, keepdim=True) / 448).to(dtype)

    found_EO, plain_EO = (
        (quantize(weight_EOI, scale_EOG, grid).double() * scale_EOG - weight_EOI.double()).square().sum(2)
        for scale_EOG in (search_scales(weight_EOI, grid), plain_EOG)
    )

    assert (found_EO <= plain_EO * (1 + 1e-5)).all()  # errors are summed in float32
    assert found_EO.sum() < 0.9 * plain_EO.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_float_codes_already_are_kept_on_the_scale_that_they_came_with(dtype: torch.dtype):
    weight_EOI = (e4m3() * 2**-6).to(dtype).view(1, 1, -1)  # 448 among them, and subnormals that no larger scale reaches

    scale_EOG = search_scales(weight_EOI, FloatGrid())

    assert scale_EOG.item() == 2**-6
    assert torch.equal(dequantize(quantize(weight_EOI, scale_EOG, FloatGrid()), scale_EOG), weight_EOI)


def slow_weighted_scales(weight_EOI: Tensor, grid: AnyGrid, importance_EI: Tensor) -> tuple[Tensor, Tensor]:
    """Every candidate of every group, one after the other, in float64; also by how much the second best loses more."""
    experts, outputs, inputs = weight_EOI.shape
    size = inputs // grid.groups(inputs)
    scale_EOG = weight_EOI.new_empty(experts, outputs, grid.groups(inputs))
    margin_EOG = torch.empty(scale_EOG.shape, dtype=torch.float64)
    for e, o, g in torch.cartesian_prod(*(torch.arange(count) for count in scale_EOG.shape)).tolist():
        group_N = weight_EOI[e, o, g * size : (g + 1) * size]
        candidates = [(group_N.float().abs().max() * share).to(weight_EOI.dtype) for share in grid.shares]
        losses = []
        for scale in candidates:
            if isinstance(grid, FloatGrid):
                code_N = e4m3()[(group_N.double()[:, None] / scale.double() - e4m3()).abs().argmin(dim=1)]
            else:
                code_N = (group_N.double() / scale.double()).round().clamp(grid.lowest, grid.highest)
            error_N = (code_N * scale.double() - group_N.double()).square()
            losses.append((error_N * importance_EI[e, g * size : (g + 1) * size].double()).sum().item())
        scale_EOG[e, o, g] = candidates[losses.index(min(losses))]
        others = [loss for loss, scale in zip(losses, candidates, strict=True) if scale != scale_EOG[e, o, g]]
        margin_EOG[e, o, g] = min(others) / min(losses) - 1
    return scale_EOG, margin_EOG


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [Grid(2, 16), Grid(4, 32), Grid(8, -1), FloatGrid()], ids=repr)
def test_scales_weighted_by_importance_are_those_of_a_slow_search(dtype: torch.dtype, grid: AnyGrid):
    weight_EOI = weights(3, 5, 64, dtype=dtype)
    importance_EI = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).mul(2).exp()

    scale_EOG = search_scales(weight_EOI, grid, importance_EI)

    expected_EOG, margin_EOG = slow_weighted_scales(weight_EOI, grid, importance_EI)
    clear_EOG = margin_EOG > 1e-4  # errors are summed in float32, and a tie between two codes may fall either way
    assert clear_EOG.float().mean() > 0.9
    assert torch.equal(scale_EOG[clear_EOG], expected_EOG[clear_EOG])
    assert not torch.equal(scale_EOG, search_scales(weight_EOI, grid))


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, -1), FloatGrid()], ids=repr)
@pytest.mark.parametrize("importance", [1.0, 2.0**20, 2.0**-20])
def test_inputs_of_equal_importance_have_the_scales_of_none(grid: AnyGrid, importance: float):
    weight_EOI = weights(2, 300, 128)

    weighted_EOG = search_scales(weight_EOI, grid, torch.full((2, 128), importance, dtype=torch.float64))

    assert torch.equal(weighted_EOG, search_scales(weight_EOI, grid))


def test_importance_is_each_experts_own_wherever_a_block_of_the_search_ends():
    # 1,200 rows of 128: blocks of the search end inside an expert.
    weight_EOI, grid = weights(4, 300, 128), Grid(4, 64)
    importance_EI = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).mul(2).exp()

    together_EOG = search_scales(weight_EOI, grid, importance_EI)

    alone = [search_scales(weight_EOI[e, None], grid, importance_EI[e, None]) for e in range(4)]
    assert torch.equal(together_EOG, torch.cat(alone))


def test_a_group_in_which_no_input_counts_still_gets_a_scale():
    weight_EOI, importance_EI = weights(1, 4, 64), torch.ones(1, 64)
    importance_EI[:, 32:] = 0

    scale_EOG = search_scales(weight_EOI, Grid(4, 32), importance_EI)

    assert (scale_EOG > 0).all()
    assert torch.equal(scale_EOG[:, :, :1], search_scales(weight_EOI, Grid(4, 32))[:, :, :1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_stays_zero_on_the_float_grid(dtype: torch.dtype):
    weight_EOI = weights(1, 2, 64, dtype=dtype)
    weight_EOI[0, 1] = 0

    scale_EOG = search_scales(weight_EOI, FloatGrid())

    assert (scale_EOG >= torch.finfo(dtype).tiny).all()
    assert (dequantize(quantize(weight_EOI, scale_EOG, FloatGrid()), scale_EOG)[0, 1] == 0).all()
