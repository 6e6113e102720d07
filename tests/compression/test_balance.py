"""AWQ's scales move through a block without changing one bit of what it computes.

Shapes: E experts, O outputs, I inputs, D width, F expert width, T tokens, G groups.
"""

from __future__ import annotations

import pytest
import torch

from compression.architectures import ARCHITECTURES
from compression.balance import balance_block_, balance_down
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.collect import collect
from compression.moe import moe_layer
from compression.recipe import Quantize
from compression.slim import Slimming, _Work
from compression.slimming.awq import best_exponents
from compression.slimming.grid import FloatGrid, Grid, dequantize
from compression.slimming.hessian import Gram
from compression.stacks import Treatment, slim_stack
from compression.sweep import Stream
from tests.tiny_models import MODEL_TYPES

UNFUSED = [model_type for model_type in MODEL_TYPES if model_type != "gpt_oss"]
IDS_NS = torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(5))
EVERYTHING = Slimming(None, Quantize(method="awq", group_size=32, attention="W4A16", shared_experts="W8A16", dense="FP8_DYNAMIC"))
W4 = Treatment(None, None, "awq", "W4A16", Grid(4, 32), None)


class Standing:
    """A stream that stands before one block, some channels loud and some faint, and what balancing needs to know."""

    def __init__(self, folder, model_type, index, slimming=EVERYTHING):
        self.architecture, self.index, self.slimming = ARCHITECTURES[model_type], index, slimming
        reader = Reader(folder)
        self.shell, self.saved = Shell(reader.config, reader.outside()), reader.block(index)
        self.stream = Stream(self.shell, IDS_NS)
        for hidden_BSD in self.stream.hidden:
            hidden_BSD[..., 5:9] *= 23
            hidden_BSD[..., 40] /= 19

    def outputs(self, block):
        return [output_BSD.clone() for _, output_BSD in self.stream.peek(self.index, block)]

    def collect(self, block):
        work = _Work(self.saved, block, self.slimming, self.architecture, self.index)
        way = {"new": Gram, "architecture": self.architecture, "advance": False}
        return collect(self.index, block, self.stream, work.linears, **way)

    def balance_(self, block, collected):
        balance_block_(self.saved, block, collected, self.architecture, self.index, self.slimming.treatment)


@pytest.fixture
def standing(tiny_model_factory):
    def stand(model_type, dtype, index, **settings):
        folder = tiny_model_factory(model_type, dtype=dtype, num_hidden_layers=2, **settings)
        return Standing(folder, model_type, index)

    return stand


def always(exponent):
    return lambda loss_AE: [exponent] * loss_AE.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("model_type", UNFUSED)
def test_balancing_changes_not_one_bit_of_what_a_block_computes(standing, monkeypatch, model_type, index, dtype):
    monkeypatch.setattr("compression.balance.best_exponents", always(1.0))
    at = standing(model_type, dtype, index)
    before = dict(at.saved)
    with at.shell.live(index, at.saved) as block:
        expected = at.outputs(block)

        at.balance_(block, at.collect(block))

    with at.shell.live(index, at.saved) as block:
        assert all(torch.equal(got, right) for got, right in zip(at.outputs(block), expected, strict=True))
    moved = {name for name in before if not torch.equal(at.saved[name], before[name])}
    norms = {name for name in before if "layernorm" in name}
    assert norms <= moved
    assert {at.architecture.component_of(name) for name in moved} >= {"attention", "other"}


@torch.no_grad()
def test_half_precision_rounds_only_what_falls_below_its_smallest_normal_number(standing, monkeypatch):
    monkeypatch.setattr("compression.balance.best_exponents", always(1.0))
    at = standing("mixtral", "float16", 0)
    before = dict(at.saved)

    with at.shell.live(0, at.saved) as block:
        at.balance_(block, at.collect(block))

    for name, old in before.items():
        normal = at.saved[name].abs() >= torch.finfo(torch.float16).tiny
        assert torch.equal(torch.frexp(at.saved[name].float()).mantissa[normal], torch.frexp(old.float()).mantissa[normal])
        assert normal.double().mean() > 0.9


@torch.no_grad()
def test_without_a_compressed_query_the_queries_read_the_blocks_own_norm(standing, monkeypatch):
    monkeypatch.setattr("compression.balance.best_exponents", always(0.5))
    at = standing("deepseek_v2", "bfloat16", 1, q_lora_rank=None)
    before = at.saved["model.layers.1.self_attn.q_proj.weight"]
    with at.shell.live(1, at.saved) as block:
        expected = at.outputs(block)

        at.balance_(block, at.collect(block))

    with at.shell.live(1, at.saved) as block:
        assert all(torch.equal(got, right) for got, right in zip(at.outputs(block), expected, strict=True))
    assert not torch.equal(at.saved["model.layers.1.self_attn.q_proj.weight"], before)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "phimoe"])
def test_a_balanced_block_is_fed_what_the_balanced_statistics_say(standing, monkeypatch, model_type):
    monkeypatch.setattr("compression.balance.best_exponents", always(0.5))
    at = standing(model_type, "float32", 1)
    with at.shell.live(1, at.saved) as block:
        collected = at.collect(block)
        at.balance_(block, collected)
        balanced_EOI = moe_layer(at.architecture, block).stack("gate_up_proj", range(8))

        with at.shell.live(1, at.saved) as opened:
            again = at.collect(opened)
            opened_EOI = moe_layer(at.architecture, opened).stack("gate_up_proj", range(8))

    assert torch.equal(balanced_EOI, opened_EOI)
    assert torch.equal(collected.routed.x_TD, again.routed.x_TD)
    assert collected.linears.keys() == again.linears.keys()
    for name, statistic in collected.linears.items():
        assert torch.equal(statistic.value, again.linears[name].value), name


@torch.no_grad()
def test_the_exponent_that_is_chosen_loses_less_than_none(standing, monkeypatch):
    losses = []
    at = standing("mixtral", "float32", 1)

    def watched(loss_AE):
        losses.append(loss_AE)
        return best_exponents(loss_AE)

    monkeypatch.setattr("compression.balance.best_exponents", watched)
    before = at.saved["model.layers.1.post_attention_layernorm.weight"]
    with at.shell.live(1, at.saved) as block:
        at.balance_(block, at.collect(block))

    assert [tuple(loss_AE.shape) for loss_AE in losses] == [(11, 1), (11, 1)]  # attention's norm, and the experts'
    assert all(loss_AE.min() < loss_AE[0] for loss_AE in losses)
    assert not torch.equal(at.saved["model.layers.1.post_attention_layernorm.weight"], before)


@torch.no_grad()
def test_a_component_that_is_kept_gets_the_scale_and_has_no_say_in_it(standing, monkeypatch):
    monkeypatch.setattr("compression.balance.best_exponents", always(1.0))
    at = standing("qwen2_moe", "bfloat16", 0)
    at.slimming = Slimming(None, Quantize(method="awq", group_size=32))
    before = dict(at.saved)
    with at.shell.live(0, at.saved) as block:
        expected = at.outputs(block)

        at.balance_(block, at.collect(block))

    with at.shell.live(0, at.saved) as block:
        assert all(torch.equal(got, right) for got, right in zip(at.outputs(block), expected, strict=True))
    moved = {name for name in before if not torch.equal(at.saved[name], before[name])}
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in moved
    assert not any("self_attn" in name or "input_layernorm" in name for name in moved)


def a_stack(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_scale_goes_from_up_into_down_and_their_product_is_the_same_in_every_bit(monkeypatch, stored):
    monkeypatch.setattr("compression.balance.best_exponents", always(1.0))
    gate_up_EOI, down_EDF, x_TI = a_stack(2, 128, 32).to(stored), a_stack(2, 32, 64, seed=1).to(stored), a_stack(200, 32, seed=2)
    gate_up_EOI[:, 70:75] *= 30
    both = slim_stack(gate_up_EOI, None, Treatment(None, None, "rtn", "W4A16", Grid(4, 32), None))
    gate, up = slice(0, 64), slice(64, 128)
    gate_before, up_before = both.became_EOI[:, gate].clone(), both.became_EOI[:, up].clone()
    statistic, again = Gram(2, 64), Gram(2, 64)

    def inside(up_EFI, expert):
        return (x_TI @ gate_before[expert].float().T) * (x_TI @ up_EFI[expert].float().T)

    for expert in range(2):
        statistic.add_rows(expert, inside(up_before, expert))

    scaled_EDF = balance_down(down_EDF, statistic, W4, both, up)

    assert torch.equal(both.became_EOI[:, gate], gate_before)
    assert not torch.equal(both.became_EOI[:, up], up_before)
    assert torch.equal(dequantize(both.quantized.codes_EOI, both.quantized.scale_EOG), both.became_EOI)
    for expert in range(2):
        before_TD = inside(up_before, expert) @ down_EDF[expert].float().T
        after_TD = inside(both.became_EOI[:, up], expert) @ scaled_EDF[expert].float().T
        assert torch.equal(after_TD, before_TD)
        again.add_rows(expert, inside(both.became_EOI[:, up], expert))
    assert torch.equal(statistic.value, again.value)


@torch.no_grad()
def test_an_expert_that_saw_too_few_tokens_is_not_balanced(monkeypatch):
    monkeypatch.setattr("compression.balance.best_exponents", always(1.0))
    gate_up_EOI, down_EDF = a_stack(2, 128, 32), a_stack(2, 32, 64, seed=1)
    both = slim_stack(gate_up_EOI, None, Treatment(None, None, "rtn", "W4A16", Grid(4, 32), None))
    before_EOI, statistic = both.became_EOI.clone(), Gram(2, 64)
    loud_F = torch.logspace(-2, 2, 64)
    statistic.add_rows(0, a_stack(31, 64, seed=3) * loud_F)  # one token less than half the inputs
    statistic.add_rows(1, a_stack(32, 64, seed=4) * loud_F)

    scaled_EDF = balance_down(down_EDF, statistic, W4, both, slice(64, 128))

    assert torch.equal(scaled_EDF[0], down_EDF[0])
    assert torch.equal(both.became_EOI[0], before_EOI[0])
    assert not torch.equal(scaled_EDF[1], down_EDF[1])


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [Grid(4, 32), FloatGrid()], ids=["W4", "FP8"])
def test_no_scale_of_up_becomes_subnormal_and_every_weight_is_what_a_loader_makes_of_it(monkeypatch, stored, grid):
    monkeypatch.setattr("compression.balance.best_exponents", always(1.0))
    gate_up_EOI, down_EDF = a_stack(1, 128, 64).to(stored), a_stack(1, 32, 64, seed=1).to(stored)
    gate_up_EOI[:, 64:96, :32] = 0  # a group of zeros in half of the rows of up,
    gate_up_EOI[:, 68] = 0  # and a row of nothing else
    both = slim_stack(gate_up_EOI, None, Treatment(None, None, "rtn", "any", grid, None))
    before_EOI, statistic = both.became_EOI.clone(), Gram(1, 64)
    # Loud where zeros are.
    statistic.add_rows(0, a_stack(64, 64, seed=4) * torch.logspace(2, -2, 64))

    scaled_EDF = balance_down(down_EDF, statistic, W4, both, slice(64, 128))

    scale_EOG = both.quantized.scale_EOG
    assert (both.became_EOI.unflatten(2, (scale_EOG.shape[2], -1)) == 0).all(3).any()
    assert (scale_EOG >= torch.finfo(stored).tiny).all()
    assert torch.equal(dequantize(both.quantized.codes_EOI, scale_EOG), both.became_EOI)
    factor_F = scaled_EDF[0, 0].double() / down_EDF[0, 0].double()
    assert factor_F.max() > 2
    expected_FI = before_EOI[0, 64:].double() / factor_F.log2().round().exp2()[:, None]
    # Half precision rounds weights, not scales, below its smallest normal number: to half of 2^-24.
    torch.testing.assert_close(
        both.became_EOI[0, 64:].double(), expected_FI, rtol=0, atol=2**-25 if stored == torch.float16 else 0
    )
