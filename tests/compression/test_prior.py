from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from compression.planner.inventory import take_inventory
from compression.planner.levers import levers_of
from compression.planner.prices import LEVERS, Drop
from compression.planner.prior import usual_prices
from compression.planner.search import Search
from compression.request import Serving
from tests.compression.made_checkpoints import checkpoint, deepseek, gpt_oss, mixtral, qwen


@pytest.mark.parametrize("family", [mixtral, qwen, deepseek, gpt_oss])
def test_usual_prices_cover_every_lever_and_say_that_nothing_was_measured(family: Any):
    inventory = take_inventory(checkpoint(*family()))
    levers = levers_of(inventory)
    prices = usual_prices(inventory, levers)

    assert not prices.measured
    assert {price.drop for price in prices.drops} == set(levers.drops)
    assert {(s.lever, s.scheme) for s in prices.schemes} == {(lever, s) for lever, named in levers.schemes.items() for s in named}
    assert [count.experts_kept for count in prices.counts] == list(levers.counts)


def test_stronger_settings_usually_cost_more():
    inventory = take_inventory(checkpoint(*mixtral()))
    levers = levers_of(inventory)
    prices = usual_prices(inventory, levers)

    for lever in levers.schemes:
        assert lever in LEVERS
        for gentle, strong in pairwise(levers.schemes[lever]):
            assert 0 < prices.of_scheme(1, lever, gentle) < prices.of_scheme(1, lever, strong)
    counts = [prices.of_count(1, levers.criteria[0], kept) for kept in levers.counts]
    assert counts == sorted(counts)
    assert counts[0] > 0


def test_the_first_and_the_last_block_usually_cost_more_than_those_between():
    inventory = take_inventory(checkpoint(*mixtral(blocks=8)))
    prices = usual_prices(inventory, levers_of(inventory))
    blocks = [prices.of_drop(Drop("block", block)) for block in range(8)]

    assert blocks[0] > blocks[7] > blocks[1] == blocks[6]
    assert prices.of_drop(Drop("layer", 3)) < blocks[3]


def test_only_blocks_that_have_a_lever_pay_for_it():
    inventory = take_inventory(checkpoint(*qwen(dense=(0,))))
    levers = levers_of(inventory)
    prices = usual_prices(inventory, levers)

    assert prices.of_count(0, levers.criteria[0], 4) == prices.of_scheme(0, "experts", "W4A16") == 0
    assert prices.of_scheme(0, "others", "W4A16") > 0
    whole = sum(prices.of_scheme(block, "experts", "W4A16") for block in range(4))
    assert whole == pytest.approx(0.001)


def test_with_usual_prices_bits_go_before_experts_and_experts_before_blocks():
    inventory = take_inventory(checkpoint(*mixtral(blocks=8, hidden=256, width=384, kv=128)))
    search = Search(inventory, Serving(), "portable", usual_prices(inventory, levers_of(inventory)))
    names = [[step.step for step in search.steps_of(plan)] for plan in search.frontier()]

    assert names[0] == ["block_drop", "expert_drop", "quantize"]
    assert ["quantize"] in names
    assert ["expert_drop", "quantize"] in names
    assert names.index(["expert_drop", "quantize"]) < names.index(["quantize"])
    assert names[-1] == []
