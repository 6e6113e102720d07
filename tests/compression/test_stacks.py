"""A stack of experts: who is slimmed without calibration, and under which names it is saved.

Shapes: E experts, O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import pytest
import torch

from compression.checkpoint.packing import unpack
from compression.recipe import Pattern
from compression.runtime.slimtrim_runtime import unpack_sparse
from compression.slimming import magnitude, rtn
from compression.slimming.grid import FloatGrid, Grid, dequantize
from compression.slimming.hessian import Gram, InputNorm
from compression.slimming.masks import NOfM, Unstructured
from compression.stacks import Treatment, slim_stack, store_

INPUTS = 64
ENOUGH = INPUTS // 2
"""Tokens from which a method may look at them: half a token per input, decision record 0015."""
HALF, PAIRS, W4 = Unstructured(0.5), NOfM(2, 4), Grid(4, 32)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(experts=3, outputs=16):
    return (noise(experts, outputs, INPUTS) / 8).bfloat16()


def fed(new, *tokens):
    """A statistic of experts that saw so many tokens, some inputs louder than others and all of them alike."""
    statistic = new(len(tokens), INPUTS)
    for expert, count in enumerate(tokens):
        x_TI = (noise(count, INPUTS, seed=expert + 1) + noise(count, 1, seed=99)) * torch.logspace(-1, 1, INPUTS)
        if count:
            statistic.add_rows(expert, x_TI)
    return statistic


def treatment(prune=None, quantize=None, *, pattern=None, grid=None, packed=None):
    return Treatment(prune, pattern, quantize, "keep" if quantize is None else "some", grid, packed)


def same(left, right):
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("grid", [W4, Grid(3, -1), FloatGrid()], ids=["W4", "W3", "FP8"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_with_too_few_tokens_is_rounded_and_says_so(method, grid):
    weight_EOI = weights()
    plain = rtn.round_to_nearest(weight_EOI, grid)

    slimmed = slim_stack(weight_EOI, fed(Gram, ENOUGH - 1, ENOUGH, 0), treatment(quantize=method, grid=grid))

    assert slimmed.used == (("rtn",), (method,), ("rtn",))
    for expert in (0, 2):
        assert same(slimmed.quantized.codes_EOI[expert], plain.codes_EOI[expert])
        assert torch.equal(slimmed.quantized.scale_EOG[expert], plain.scale_EOG[expert])
    assert not same(slimmed.quantized.codes_EOI[1], plain.codes_EOI[1])
    assert torch.equal(slimmed.became_EOI, dequantize(slimmed.quantized.codes_EOI, slimmed.quantized.scale_EOG))


@pytest.mark.parametrize("pattern", [HALF, PAIRS], ids=["half", "2:4"])
@pytest.mark.parametrize(("method", "new"), [("sparsegpt", Gram), ("wanda", InputNorm), ("wanda", Gram)])
def test_an_expert_with_too_few_tokens_is_pruned_by_magnitude_and_says_so(method, new, pattern):
    weight_EOI = weights()
    plain_EOI = magnitude.prune(weight_EOI, pattern)

    slimmed = slim_stack(weight_EOI, fed(new, ENOUGH - 1, ENOUGH, 0), treatment(method, pattern=pattern))

    assert slimmed.used == (("magnitude",), (method,), ("magnitude",))
    assert torch.equal(slimmed.became_EOI[0], plain_EOI[0])
    assert torch.equal(slimmed.became_EOI[2], plain_EOI[2])
    assert not torch.equal(slimmed.became_EOI[1], plain_EOI[1])
    assert slimmed.quantized is None


def test_with_two_steps_each_falls_back_by_its_own_name_and_zeros_stay():
    weight_EOI = weights()
    both = treatment("sparsegpt", "gptq", pattern=PAIRS, grid=W4)
    plain = rtn.round_to_nearest(magnitude.prune(weight_EOI, PAIRS), W4)

    slimmed = slim_stack(weight_EOI, fed(Gram, 3, 2 * INPUTS, 2 * INPUTS), both)

    assert both.methods == ("sparsegpt", "gptq")
    assert slimmed.used == (("magnitude", "rtn"), ("sparsegpt", "gptq"), ("sparsegpt", "gptq"))
    assert torch.equal(slimmed.quantized.codes_EOI[0], plain.codes_EOI[0])
    assert ((slimmed.became_EOI.unflatten(2, (-1, 4)) != 0).sum(3) <= 2).all()


def test_the_damping_told_is_the_larger_of_what_two_steps_took():
    statistic = fed(Gram, 2 * INPUTS)

    pruned = slim_stack(weights(1), statistic, treatment("sparsegpt", "rtn", pattern=PAIRS, grid=W4))
    rounded = slim_stack(weights(1), statistic, treatment("magnitude", "gptq", pattern=PAIRS, grid=W4))

    assert pruned.damping_E.tolist() == rounded.damping_E.tolist() == [0.01]


@pytest.mark.parametrize(
    ("way", "fallback"),
    [
        (treatment(quantize="gptq", grid=W4), ("rtn",)),
        (treatment("sparsegpt", pattern=PAIRS), ("magnitude",)),
        (treatment("sparsegpt", "gptq", pattern=HALF, grid=W4), ("magnitude", "rtn")),
    ],
)
def test_an_expert_whose_gram_matrix_is_of_no_use_falls_back_as_well(way, fallback):
    statistic = fed(Gram, 2 * INPUTS, 2 * INPUTS)
    statistic.value[0].fill_(torch.inf)

    slimmed = slim_stack(weights(2), statistic, way)

    assert slimmed.used == (fallback, way.methods)
    assert slimmed.damping_E[0] == 0
    assert slimmed.damping_E[1] > 0


def test_the_stack_that_was_given_stays_as_it_was():
    weight_EOI = weights()
    before = weight_EOI.clone()

    for way in (treatment("magnitude", pattern=HALF), treatment("sparsegpt", "gptq", pattern=PAIRS, grid=W4)):
        slim_stack(weight_EOI, fed(Gram, 3, 2 * INPUTS, 2 * INPUTS), way)

    assert torch.equal(weight_EOI, before)


def test_some_of_the_outputs_are_views_of_the_same():
    slimmed = slim_stack(weights(), None, treatment(quantize="rtn", grid=W4))

    part = slimmed.outputs(slice(4, 8))
    part.quantized.scale_EOG.fill_(3)
    part.became_EOI.fill_(5)

    assert torch.equal(part.weight_EOI, slimmed.weight_EOI[:, 4:8])
    assert torch.equal(part.quantized.codes_EOI, slimmed.quantized.codes_EOI[:, 4:8])
    assert (slimmed.quantized.scale_EOG == 3).all(dim=(0, 2)).nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert (slimmed.became_EOI == 5).all(dim=(0, 2)).nonzero().flatten().tolist() == [4, 5, 6, 7]


STORED = {
    "integers": (treatment(quantize="rtn", grid=W4), {"weight_packed", "weight_scale", "weight_shape"}, 16 * (32 + 2 * 2) + 16),
    "floats": (treatment(quantize="rtn", grid=FloatGrid()), {"weight", "weight_scale"}, 16 * (64 + 2)),
    "zeros": (treatment("magnitude", pattern=PAIRS), {"weight"}, 16 * 64 * 2),
    "no zeros": (
        treatment("magnitude", pattern=PAIRS, packed=Pattern(2, 4)),
        {"compressed", "bitmask", "shape"},
        16 * (32 * 2 + 8) + 16,
    ),
}


@pytest.mark.parametrize("kind", STORED)
def test_what_is_stored_stands_in_the_weights_place_takes_what_it_says_and_gives_the_weight_back(kind):
    way, suffixes, size = STORED[kind]
    slimmed = slim_stack(weights(), None, way)
    saved = {"x.weight": slimmed.weight_EOI[1], "y.weight": torch.zeros(1)}

    stored = store_(saved, "x", slimmed, 1)

    assert saved.keys() == {"y.weight", *(f"x.{suffix}" for suffix in suffixes)}
    assert stored == size == sum(tensor.nbytes for name, tensor in saved.items() if name != "y.weight")
    assert torch.equal(weight_of(saved, kind), slimmed.became_EOI[1])


def weight_of(saved, kind):
    if kind == "zeros":
        return saved["x.weight"]
    if kind == "no zeros":
        return unpack_sparse(saved["x.compressed"], saved["x.bitmask"], saved["x.shape"])
    codes_OI = saved["x.weight"] if kind == "floats" else unpack(saved["x.weight_packed"], 4, int(saved["x.weight_shape"][1]))
    return dequantize(codes_OI, saved["x.weight_scale"])
