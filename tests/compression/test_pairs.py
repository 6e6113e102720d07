from __future__ import annotations

import random
from itertools import combinations

import pytest

from compression.planner.pairs import beyond_single, pair_charges, pairs_to_measure, unmeasured_pairs
from compression.planner.prices import Drop, DropPrice, PairPrice, Prices

LAYERS = [Drop("layer", block) for block in range(6)]
BLOCKS = [Drop("block", block) for block in range(6)]


def prices(singles: dict[Drop, float], pairs: dict[tuple[Drop, Drop], float]) -> Prices:
    return Prices(
        measured=True,
        tokens=1,
        text="",
        loss=1.0,
        group_size=128,
        counts=(),
        schemes=(),
        drops=tuple(DropPrice(drop=drop, loss=loss) for drop, loss in singles.items()),
        pairs=tuple(PairPrice(first=a, second=b, loss=loss) for (a, b), loss in pairs.items()),
    )


def test_a_measured_pair_is_charged_what_it_costs_beyond_its_two():
    a, b, c = LAYERS[:3]
    priced = prices({a: 0.1, b: 0.2, c: 0.3}, {(a, b): 0.5, (a, c): 0.3, (b, c): 0.9})

    charges = pair_charges(priced, [a, b, c])

    assert charges.pairs == {(a, b): pytest.approx(0.2), (b, c): pytest.approx(0.4)}  # a and c: less than their two, so nothing
    assert charges.single == {}


def test_two_measured_drops_that_were_not_measured_together_pay_the_dearest_pair():
    a, b, c, d = LAYERS[:4]
    priced = prices(dict.fromkeys((a, b, c, d), 0.1), {(a, b): 0.5, (c, d): 0.3})

    charges = pair_charges(priced, [a, b, c, d])

    assert charges.pairs[a, b] == pytest.approx(0.3)
    assert charges.pairs[a, c] == charges.unmeasured == pytest.approx(0.3)


def test_without_any_pair_drops_pay_the_median_single_drop_by_rank():
    a, b, c = LAYERS[:3]
    priced = prices({a: 9.0, b: 0.2, c: 0.1}, {})

    charges = pair_charges(priced, [a, b, c])

    assert charges.unmeasured == 0.2
    assert charges.single == {c: 0.0, b: pytest.approx(0.2), a: pytest.approx(0.4)}


def test_pairs_that_all_cost_nothing_do_not_make_the_others_free():
    a, b, c = LAYERS[:3]
    priced = prices(dict.fromkeys((a, b, c), 0.1), {(a, b): 0.1})

    assert pair_charges(priced, [a, b, c]).unmeasured == 0.1


@pytest.mark.parametrize("seed", range(20))
def test_no_set_of_drops_is_charged_less_than_its_pairs(seed: int):
    draw = random.Random(seed)
    drops = draw.sample([*LAYERS, *BLOCKS], 9)
    singles = {drop: draw.random() for drop in drops}
    candidates = draw.sample(drops, draw.choice((0, 3, 5)))
    pairs = {(a, b): singles[a] + singles[b] + draw.gauss(0.1, 0.3) for a, b in combinations(candidates, 2) if a.block != b.block}
    priced = prices(singles, pairs)
    charges = pair_charges(priced, drops)

    for size in range(len(drops) + 1):
        for going in combinations(drops, size):
            if len({drop.block for drop in going}) == size:  # a block goes one way only
                charged = sum(charges.single.get(drop, 0.0) for drop in going)
                charged += sum(loss for (a, b), loss in charges.pairs.items() if a in going and b in going)
                assert charged >= beyond_single(priced, charges, going) - 1e-9


def test_no_unmeasured_pair_is_free():
    a, b, c = LAYERS[:3]
    priced = prices(dict.fromkeys((a, b, c), 0.1), {(a, b): 0.3})
    charges = pair_charges(priced, [a, b, c])

    assert beyond_single(priced, charges, [a, c]) == pytest.approx(0.1)
    assert beyond_single(priced, charges, [a, b, c]) == pytest.approx(0.3)
    assert charges.single[c] == pytest.approx(0.2)  # with either of the two


def test_pairs_worth_measuring_are_all_among_the_cheapest_of_each_kind_and_no_more_than_asked():
    singles = {drop: 0.1 * (1 + drop.block) + (drop.kind == "block") for drop in (*LAYERS, *BLOCKS)}

    pairs = pairs_to_measure(prices(singles, {}), 20)

    # Of 3 blocks' drops of either kind, 15 pairs less the 3 within a block; 4 blocks' would be 24.
    assert len(pairs) == 12
    assert {drop.block for pair in pairs for drop in pair} == {0, 1, 2}
    assert {drop.kind for pair in pairs for drop in pair} == {"block", "layer"}
    assert all(first.block < second.block for first, second in pairs)


def test_pairs_of_a_plan_that_were_not_measured_are_named_in_the_order_of_blocks():
    a, b, c = LAYERS[:3]
    known = prices(dict.fromkeys((a, b, c), 0.1), {(a, b): 0.3})

    assert unmeasured_pairs(known, [c, b, a]) == [(a, c), (b, c)]
