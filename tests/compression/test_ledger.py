"""The ledger's numbers, by hand.

Shapes: E experts, O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import pytest
import torch

from compression.ledger import entries
from compression.recipe import Pattern
from compression.slimming.grid import FloatGrid, Grid
from compression.slimming.hessian import Gram
from compression.slimming.masks import NOfM, Unstructured
from compression.stacks import Slimmed, Treatment, slim_stack, store_

PRUNED = Treatment("sparsegpt", Unstructured(0.5), None, "keep", None, None)
NO_DAMPING = torch.zeros(1, dtype=torch.float64)


def slimmed(weight_EOI, became_EOI, statistic=None, *, treatment=PRUNED, used=(("sparsegpt",),), damping_E=NO_DAMPING):
    return Slimmed(treatment, weight_EOI, became_EOI, None, statistic, used, damping_E)


def only(rows):
    (row,) = rows
    return row


# The weight (3, 4) became (3, 0); by magnitude it would have been (0, 4).
@pytest.mark.parametrize(
    ("statistic", "of", "before", "after"),
    [
        (None, "weights", 9 / 25, 16 / 25),
        (torch.tensor([[1.0, 4.0]]), "weights_times_inputs", 9 / 73, 64 / 73),
        (torch.tensor([[[1.0, 0.5], [0.5, 2.0]]]), "outputs", 9 / 53, 32 / 53),
    ],
)
def test_errors_are_relative_to_the_whole_weight_in_the_measure_that_calibration_allows(statistic, of, before, after):
    what = slimmed(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]]), statistic)

    row = only(entries(["x"], what, [4], own_E=None, shown_E=None))

    assert row.error_of == of
    assert row.error_before == pytest.approx(before)
    assert row.error_after == pytest.approx(after)
    assert (row.zeros, row.bits) == (0.5, 16)
    assert (row.tensor, row.scheme, row.tokens, row.tokens_topped_up, row.damping) == ("x.weight", "keep", None, 0, None)


def test_before_calibration_is_rounding_to_nearest():
    # Scales of 4 bits hold (7, 4) exactly; what the method made of it is (7, 3).
    grid = Treatment(None, None, "gptq", "W4A16", Grid(4, -1), None)
    what = slimmed(torch.tensor([[[7.0, 4.0]]]), torch.tensor([[[7.0, 3.0]]]), treatment=grid, used=(("gptq",),))

    row = only(entries(["x"], what, [4], own_E=None, shown_E=None))

    assert (row.error_before, row.error_after) == (0.0, pytest.approx(1 / 65))


def test_before_calibration_with_two_steps_is_magnitude_and_then_rounding():
    both = Treatment("sparsegpt", Unstructured(0.5), "gptq", "W4A16", Grid(4, -1), None)
    what = slimmed(torch.tensor([[[7.0, 4.0]]]), torch.tensor([[[0.0, 4.0]]]), treatment=both, used=(("magnitude", "gptq"),))

    row = only(entries(["x"], what, [4], own_E=None, shown_E=None))

    assert (row.error_before, row.error_after) == (pytest.approx(16 / 65), pytest.approx(49 / 65))
    assert (row.method_asked, row.method_used) == ("sparsegpt+gptq", "magnitude+gptq")


def test_of_many_outputs_every_second_third_or_so_is_looked_at():
    weight_EOI = torch.ones(1, 257, 2)
    became_EOI = weight_EOI.clone()
    became_EOI[0, 1::3] = 0
    became_EOI[0, 3] = 0  # of 257 outputs every third is looked at: 0, 3, ... 255, which are 86

    row = only(entries(["x"], slimmed(weight_EOI, became_EOI), [1028], own_E=None, shown_E=None))

    assert row.error_after == pytest.approx(1 / 86)
    assert row.zeros == pytest.approx(87 / 257)  # of all of them


def test_tokens_of_its_own_and_those_it_was_topped_up_with_are_told_apart():
    what = slimmed(
        torch.ones(3, 1, 2), torch.ones(3, 1, 2), used=(("sparsegpt",),) * 3, damping_E=torch.tensor([0.01, 0.0, torch.inf])
    )
    own_E, shown_E = torch.tensor([9, 0, 4]), torch.tensor([9, 8, 8])

    rows = entries(["a.0", "a.1", "a[2]"], what, [4, 4, 2], own_E=own_E, shown_E=shown_E)

    assert [(row.tokens, row.tokens_topped_up) for row in rows] == [(9, 0), (0, 8), (4, 4)]
    assert [row.damping for row in rows] == [pytest.approx(0.01), None, None]
    assert [row.tensor for row in rows] == ["a.0.weight", "a.1.weight", "a[2]"]
    assert [row.bits for row in rows] == [16, 16, 8]


PAIRS = NOfM(2, 4)
# 8 outputs of 64 inputs: 512 entries of two bytes each.
BITS = {
    "four bits in groups": (Treatment(None, None, "gptq", "W4A16", Grid(4, 32), None), 4 + 2 * 16 / 64 + 8 * 16 / 512),
    "three bits a row": (Treatment(None, None, "gptq", "W3A16", Grid(3, -1), None), 3 + 16 / 64 + 8 * 16 / 512),
    "floats": (Treatment(None, None, "gptq", "FP8_DYNAMIC", FloatGrid(), None), 8 + 16 / 64),
    "pruned": (Treatment("sparsegpt", PAIRS, None, "keep", None, None), 16),
    "pruned and packed": (Treatment("sparsegpt", PAIRS, None, "keep", None, Pattern(2, 4)), 8 + 1 + 8 * 16 / 512),
}


@pytest.mark.parametrize("kind", BITS)
def test_the_bits_of_an_entry_are_all_that_is_stored_over_all_that_there_are(kind):
    treatment, bits = BITS[kind]
    generator, statistic = torch.Generator().manual_seed(7), Gram(1, 64)
    x_TI = torch.randn(200, 64, generator=generator)
    statistic.add_rows(0, x_TI)
    what = slim_stack((torch.randn(1, 8, 64, generator=generator) / 8).bfloat16(), statistic, treatment)
    size = store_({}, "x", what, 0)

    row = only(entries(["x"], what, [size], own_E=statistic.tokens_E, shown_E=statistic.tokens_E))

    assert row.bits == bits
    assert row.zeros == (what.became_EOI == 0).double().mean().item()
    weight_OI, became_OI = what.weight_EOI[0].float(), what.became_EOI[0].float()
    lost = (x_TI @ (weight_OI - became_OI).T).square().sum() / (x_TI @ weight_OI.T).square().sum()
    # The sum over 200 tokens in the one order and in the other, in float32: 200 * 2^-24.
    assert row.error_after == pytest.approx(lost.item(), rel=1.2e-5)
    assert (row.method_asked, row.method_used) == ("+".join(treatment.methods),) * 2
