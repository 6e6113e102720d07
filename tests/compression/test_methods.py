"""Methods one after the other: what pruning set to zero no rounding brings back, and pruning nothing changes nothing.

Shapes: E experts, O output features, I input features, S tokens of one expert.
"""

import pytest
import torch
from torch import Tensor

from compression.methods import NEEDS, PRUNERS, QUANTIZERS, STATISTICS, pattern_of
from compression.recipe import Prune
from compression.slimming.grid import AnyGrid, FloatGrid, Grid, dequantize
from compression.slimming.hessian import Gram
from compression.slimming.masks import NOfM, Pattern, Unstructured
from tests.compression.test_gptq import correlated_tokens, relative_error, weights

EXPERTS, OUTPUTS, INPUTS = 3, 8, 128

pruners = pytest.mark.parametrize("pruner", sorted(PRUNERS))
quantizers = pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
grids = pytest.mark.parametrize("grid", [Grid(2, 32), Grid(3, -1), Grid(4, 64), Grid(8, 32), FloatGrid()], ids=repr)
patterns = pytest.mark.parametrize("pattern", [Unstructured(0.5), NOfM(2, 4)], ids=repr)


def seen() -> Gram:
    """Tokens of two experts; the third saw none."""
    gram = Gram(EXPERTS, INPUTS)
    for expert in range(EXPERTS - 1):
        gram.add_rows(expert, correlated_tokens(2 * INPUTS, INPUTS, seed=expert))
    return gram


def pruned_and_quantized(
    weight_EOI: Tensor, gram: Gram, *, pruner: str, pattern: Pattern, quantizer: str, grid: AnyGrid
) -> tuple[Tensor, Tensor]:
    pruned_EOI, _ = PRUNERS[pruner].run(weight_EOI, gram, pattern)
    quantized, _ = QUANTIZERS[quantizer].run(pruned_EOI, gram, grid)
    return pruned_EOI, dequantize(quantized.codes_EOI, quantized.scale_EOG)


@grids
@quantizers
@patterns
@pruners
def test_a_weight_that_pruning_set_to_zero_stays_zero_on_every_grid(pruner: str, pattern: Pattern, quantizer: str, grid: AnyGrid):
    weight_EOI = weights(EXPERTS, OUTPUTS, INPUTS).bfloat16()

    pruned_EOI, stored_EOI = pruned_and_quantized(
        weight_EOI, seen(), pruner=pruner, pattern=pattern, quantizer=quantizer, grid=grid
    )

    gone_EOI = pruned_EOI == 0
    assert gone_EOI.sum(dim=(1, 2)).min() >= OUTPUTS * INPUTS // 2
    assert (stored_EOI[gone_EOI] == 0).all()
    assert (stored_EOI[~gone_EOI] != 0).any()


@grids
@pruners
def test_gptq_repairs_a_pruned_weight_within_what_was_kept(pruner: str, grid: AnyGrid):
    weight_EOI, gram = weights(EXPERTS, OUTPUTS, INPUTS), seen()

    pruned_EOI, repaired_EOI = pruned_and_quantized(
        weight_EOI, gram, pruner=pruner, pattern=NOfM(2, 4), quantizer="gptq", grid=grid
    )

    rounded, _ = QUANTIZERS["rtn"].run(pruned_EOI, gram, grid)
    rounded_EOI = dequantize(rounded.codes_EOI, rounded.scale_EOG)
    heard = slice(EXPERTS - 1)
    repaired_E, rounded_E = (
        relative_error(pruned_EOI[heard], became_EOI[heard], gram.value[heard]) for became_EOI in (repaired_EOI, rounded_EOI)
    )
    assert (repaired_E < 0.8 * rounded_E).all()
    assert torch.equal(repaired_EOI[-1], rounded_EOI[-1])


@pruners
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_sparsity_zero_every_weight_keeps_its_bits(dtype: torch.dtype, pruner: str):
    weight_EOI = weights(EXPERTS, OUTPUTS, INPUTS).to(dtype)

    pruned_EOI, _ = PRUNERS[pruner].run(weight_EOI, seen(), Unstructured(0.0))

    assert pruned_EOI.dtype == dtype
    assert torch.equal(pruned_EOI, weight_EOI)


@pruners
@patterns
def test_an_expert_without_tokens_is_pruned_without_naming_a_damping_that_was_not_used(pruner: str, pattern: Pattern):
    _, damping_E = PRUNERS[pruner].run(weights(EXPERTS, OUTPUTS, INPUTS), seen(), pattern)

    assert damping_E.tolist() == ([0.01, 0.01, torch.inf] if pruner == "sparsegpt" else [0.0] * 3)


@quantizers
def test_an_expert_without_tokens_is_rounded_to_nearest_by_every_method(quantizer: str):
    weight_EOI, grid = weights(EXPERTS, OUTPUTS, INPUTS), Grid(4, 32)

    quantized, damping_E = QUANTIZERS[quantizer].run(weight_EOI, seen(), grid)

    nearest, _ = QUANTIZERS["rtn"].run(weight_EOI, None, grid)
    assert damping_E.tolist() == ([0.01, 0.01, torch.inf] if quantizer == "gptq" else [0.0] * 3)
    assert torch.equal(quantized.codes_EOI[-1], nearest.codes_EOI[-1])
    assert torch.equal(quantized.scale_EOG[-1], nearest.scale_EOG[-1])
    assert (quantizer == "rtn") == torch.equal(quantized.scale_EOG[:-1], nearest.scale_EOG[:-1])


@pytest.mark.parametrize("method", [*PRUNERS.items(), *QUANTIZERS.items()], ids=lambda method: method[0])
def test_a_method_is_content_with_the_least_statistic_that_it_names(method: tuple[str, object]):
    run, needs = method[1].run, method[1].needs
    choice = NOfM(2, 4) if method[0] in PRUNERS else Grid(4, 32)
    statistic = None if needs == "nothing" else STATISTICS[needs](1, INPUTS)
    if statistic is not None:
        statistic.add_rows(0, correlated_tokens(2 * INPUTS, INPUTS))

    became, damping_E = run(weights(1, OUTPUTS, INPUTS), statistic, choice)

    assert needs in NEEDS
    assert (became if method[0] in PRUNERS else became.codes_EOI).shape == (1, OUTPUTS, INPUTS)
    assert damping_E.isfinite().all()


def test_a_step_names_its_pattern_or_its_sparsity():
    assert pattern_of(Prune(method="wanda", pattern="2:4")) == NOfM(2, 4)
    assert pattern_of(Prune(method="wanda", sparsity=0.5)) == Unstructured(0.5)
