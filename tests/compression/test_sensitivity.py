"""Prices equal what a stock model loses when it is changed by hand, and measuring them leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.observer import Observer
from compression.planner.inventory import take_inventory
from compression.planner.levers import levers_of
from compression.planner.prices import Drop
from compression.recipe import ExpertDrop
from compression.sensitivity import Sensitivity, measure_pairs, measure_prices
from compression.slimming.grid import Grid, dequantize
from compression.slimming.rtn import round_to_nearest
from compression.sweep import Push, Stream, sweep
from compression.trimming import Cuts, Routing, expert_drop
from compression.trimming.routers import Routers
from compression.tryout import Trial, try_plans

CALIBRATION_NS = torch.randint(3, 300, (8, 24), generator=torch.Generator().manual_seed(1))
PRICED_NS = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(2))
SUM = 1e-5
"""Divergences agree up to the order in which float32 sums are taken, relative to the largest of them."""


class Measured:
    """One model, its prices and its study."""

    def __init__(self, folder) -> None:
        self.folder, self.reader = folder, Reader(folder)
        self.inventory = take_inventory(self.reader.checkpoint)
        self.levers = levers_of(self.inventory)
        self.routing = Routing(
            self.inventory.experts, self.inventory.top_k, self.inventory.groups, router=Routers(self.reader.config)
        )
        self.shell = self.new_shell()
        observer = self.observer()
        clean, probe = Stream(self.shell, PRICED_NS), Stream(self.shell, PRICED_NS)
        sensitivity = Sensitivity(self.reader, self.levers, self.routing, clean, probe)
        calibration = Stream(self.shell, CALIBRATION_NS)
        self.prices = measure_prices(self.shell, self.reader, calibration, observer, sensitivity, lambda *_: None)
        self.study = observer.study

    def new_shell(self) -> Shell:
        return Shell(self.reader.config, self.reader.outside())

    def observer(self) -> Observer:
        return Observer(self.reader.architecture, ("text",), torch.zeros(8, dtype=torch.long), ("tokens", "sample"))

    def stock(self):
        return AutoModelForCausalLM.from_pretrained(self.folder)


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "deepseek_v3"])
def measured(request, tiny_model_factory):
    return Measured(tiny_model_factory(request.param))


@torch.no_grad()
def divergence(model, changed) -> float:
    right, other = (m(input_ids=PRICED_NS, use_cache=False).logits[:, :-1].float().log_softmax(-1) for m in (model, changed))
    return float((right.exp() * (right - other)).sum(-1).double().mean())


def blocks(model):
    return model.get_decoder().layers


@torch.no_grad()
def rounded_(weight, scheme_bits, group_size):
    grid = Grid(scheme_bits, group_size)
    quantized = round_to_nearest(weight[None] if weight.dim() == 2 else weight, grid)
    weight.copy_(dequantize(quantized.codes_EOI, quantized.scale_EOG).view_as(weight))


def test_rounding_every_expert_costs_what_the_stock_model_loses_by_it(measured):
    changed = measured.stock()
    for block in blocks(changed):
        if hasattr(block.mlp, "experts"):
            rounded_(block.mlp.experts.gate_up_proj, 3, measured.levers.group_size)
            rounded_(block.mlp.experts.down_proj, 3, measured.levers.group_size)

    priced = next(s for s in measured.prices.schemes if (s.lever, s.scheme) == ("experts", "W3A16"))

    assert priced.rounded.whole == pytest.approx(divergence(measured.stock(), changed), rel=1e-4)


def test_rounding_all_attention_costs_what_the_stock_model_loses_by_it(measured):
    changed = measured.stock()
    for block in blocks(changed):
        for module in block.self_attn.modules():
            if isinstance(module, torch.nn.Linear):
                rounded_(module.weight, 2, measured.levers.group_size)

    priced = next(s for s in measured.prices.schemes if (s.lever, s.scheme) == ("attention", "W2A16"))

    assert priced.rounded.whole == pytest.approx(divergence(measured.stock(), changed), rel=1e-4)


def remove_(model, block) -> None:
    del blocks(model)[block]
    if kinds := getattr(model.config, "layer_types", None):  # by which stock models choose each block's mask
        del kinds[block]


@torch.no_grad()
def silence_(model, block) -> None:
    layer = blocks(model)[block].mlp
    layer.forward = lambda x, *_: torch.zeros_like(x)


def drop_(model, *drops) -> None:
    for drop in drops:
        if drop.kind == "layer":
            silence_(model, drop.block)
    for drop in sorted(drops, reverse=True, key=lambda drop: drop.block):
        if drop.kind == "block":
            remove_(model, drop.block)


@pytest.mark.parametrize("kind", ["block", "layer"])
def test_a_drop_costs_what_the_stock_model_loses_by_it(measured, kind):
    priced = [price for price in measured.prices.drops if price.drop.kind == kind]

    assert len(priced) == len(measured.inventory.droppable)
    for price in priced:
        changed = measured.stock()
        drop_(changed, price.drop)
        assert price.loss == pytest.approx(divergence(measured.stock(), changed), rel=1e-4)


def test_a_pair_of_drops_costs_what_the_stock_model_loses_without_both(measured):
    first, second = [price.drop for price in measured.prices.drops if price.drop.kind == "block"][:2]
    shell = measured.new_shell()
    pairs = [(first, second), (Drop("layer", first.block), second), (first, Drop("layer", second.block))]

    found = measure_pairs(shell, measured.reader, Stream(shell, PRICED_NS), pairs, lambda *_: None)

    assert [(price.first, price.second) for price in found] == pairs
    for pair, price in zip(pairs, found, strict=True):
        changed = measured.stock()
        drop_(changed, *pair)
        assert price.loss == pytest.approx(divergence(measured.stock(), changed), rel=1e-4)


def test_pricing_leaves_the_study_as_a_plain_sweep_takes_it(measured):
    observer, shell = measured.observer(), measured.new_shell()
    sweep(shell, measured.reader, Stream(shell, CALIBRATION_NS), observer, lambda *_: None)

    for block, statistics in observer.study.experts.items():
        assert torch.equal(statistics.count_ME, measured.study.experts[block].count_ME)
        assert torch.allclose(statistics.weighted_norm_ME, measured.study.experts[block].weighted_norm_ME, rtol=1e-6)


def test_the_clean_stream_goes_through_the_model_as_it_is(measured):
    logits = measured.stock()(input_ids=PRICED_NS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), PRICED_NS[:, 1:].flatten())

    assert measured.prices.loss == pytest.approx(loss.item(), rel=1e-6)


def test_what_has_no_expert_and_no_shared_expert_has_no_share_in_their_price(measured):
    mixtures = set(measured.study.experts)

    for count in measured.prices.counts:
        assert set(count.price.errors) == mixtures
    for scheme in measured.prices.schemes:
        if scheme.lever == "experts":
            assert set(scheme.price.errors) == mixtures


def test_blocks_share_the_whole_price_among_them(measured):
    for count in measured.prices.counts:
        shares = [count.price.of(block) for block in range(len(measured.inventory.blocks))]

        assert sum(shares) == pytest.approx(max(0.0, count.price.whole), rel=1e-9)


def everything(measured) -> Cuts:
    blocks_ = tuple(range(len(measured.inventory.blocks)))
    return Cuts(blocks_, {block: tuple(range(measured.inventory.experts)) for block in measured.study.experts})


def tried(measured, *trials):
    shell = measured.new_shell()
    found = try_plans(shell, measured.reader, Stream(shell, PRICED_NS), trials, measured.levers, lambda *_: None)
    return [float(loss_N.mean()) for loss_N in found]


def test_a_plan_that_changes_nothing_loses_nothing_when_it_is_tried(measured):
    assert tried(measured, Trial(everything(measured), {})) == [0.0]


def test_a_tried_plan_of_one_setting_or_one_drop_loses_what_that_was_priced_at(measured):
    whole = everything(measured)
    w2 = {block: {"experts": "W2A16"} for block in whole.blocks}
    block, layer = (next(p for p in measured.prices.drops if p.drop.kind == kind) for kind in ("block", "layer"))
    drops = whole.without(frozenset({block.drop.block})), whole.without(layers=frozenset({layer.drop.block}))

    losses = tried(measured, Trial(whole, w2), *(Trial(cuts, {}) for cuts in drops))

    priced = next(s for s in measured.prices.schemes if (s.lever, s.scheme) == ("experts", "W2A16"))
    assert losses == pytest.approx([priced.rounded.whole, block.loss, layer.loss], rel=SUM)


def test_a_tried_plan_with_fewer_experts_loses_what_that_count_was_priced_at(measured):
    count = measured.prices.counts[0]
    step = ExpertDrop.model_validate({"criterion": count.criterion, "experts_kept": count.experts_kept})
    cuts = expert_drop.choose(measured.study, step, everything(measured), measured.routing)

    assert tried(measured, Trial(cuts, {})) == pytest.approx([count.price.whole], rel=SUM)


def test_a_sweep_of_pairs_needs_no_more_than_the_blocks(measured):
    shell = measured.new_shell()
    stream = Stream(shell, PRICED_NS)
    plain = stream.fork()

    measure_pairs(shell, measured.reader, stream, [], lambda *_: None)

    shell = measured.new_shell()
    sweep(shell, measured.reader, plain, Push(), lambda *_: None)
    assert torch.equal(stream.hidden[0], plain.hidden[0])
