from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import inf, isclose
from typing import Any

import pytest

from compression.planner.milp import Minimum, Row, minimise
from compression.planner.options import Action, Option
from compression.planner.pairs import PairCharges
from compression.planner.prices import Drop
from compression.planner.program import CLOSE, GAP, Apart, Program, Solution

NOTHING = PairCharges({}, {}, 0.0)


def option(block: int, size: int, cost: float, *, action: Action = "keep", kept: int = 8, scheme: str = "W4A16") -> Option:
    return Option(block, action, kept, scheme, "keep", None, size, cost, cost)


def random_menus(draw: random.Random, blocks: int, options: int = 4, *, unit: int = 1) -> list[list[Option]]:
    """Each block's options fall in price as they grow; half of the blocks may go."""
    menus: list[list[Option]] = []
    for block in range(blocks):
        sizes = sorted(draw.sample(range(10, 1000), options))
        costs = sorted((draw.lognormvariate(-5, 2) for _ in sizes), reverse=True)
        menu = [
            option(block, unit * size, cost, kept=place + 1) for place, (size, cost) in enumerate(zip(sizes, costs, strict=True))
        ]
        if draw.random() < 0.7:
            menu.append(option(block, 0, draw.lognormvariate(-4, 1), action="drop_block"))
            menu.append(option(block, unit * 5, draw.lognormvariate(-4.5, 1), action="drop_layer"))
        menus.append(sorted(menu, key=lambda o: (o.bytes, o.cost)))
    return menus


def random_charges(draw: random.Random, menus: Sequence[Sequence[Option]]) -> PairCharges:
    drops = [o.drop for menu in menus for o in menu if o.drop is not None]
    pairs = [(a, b) for a, b in combinations(drops, 2) if a.block != b.block and draw.random() < 0.6]
    return PairCharges({pair: draw.lognormvariate(-4, 1) for pair in pairs}, {d: draw.choice((0.0, 0.01)) for d in drops}, 0.01)


def program(menus: Sequence[Sequence[Option]], charges: PairCharges = NOTHING, *, most_drops: int = 99) -> Program:
    return Program(menus, charges, most_drops=most_drops, quantizes_experts=False)


def plans(menus: Sequence[Sequence[Option]], most_drops: int) -> Iterator[tuple[Option, ...]]:
    for options in product(*menus):
        if sum(o.drop is not None for o in options) <= most_drops:
            yield options


def price(options: Sequence[Option], charges: PairCharges) -> float:
    drops = {o.drop for o in options if o.drop is not None}
    pairs = sum(loss for (a, b), loss in charges.pairs.items() if a in drops and b in drops)
    return sum(o.cost for o in options) + sum(charges.single.get(d, 0.0) for d in drops) + pairs


def size(options: Sequence[Option]) -> int:
    return sum(o.bytes for o in options)


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_trying_everything_finds(seed: int):
    draw = random.Random(seed)
    menus = random_menus(draw, blocks=draw.randint(2, 5), options=3)
    charges = random_charges(draw, menus)
    most = len(menus) - 1
    everything = [(size(options), price(options, charges)) for options in plans(menus, most)]
    found = program(menus, charges, most_drops=most)

    for room in draw.sample(sorted({total for total, _ in everything}), 8):
        solution = found.solve(room)
        assert solution is not None
        least = min(cost for total, cost in everything if total <= room)
        assert solution.price <= least * (1 + GAP)
        assert isclose(solution.price, price(solution.options, charges))
        assert size(solution.options) <= room


@pytest.mark.parametrize("unit", [1, 48, 7_340_033])
def test_a_budget_is_kept_to_the_byte(unit: int):
    for seed in range(20):
        draw = random.Random(seed)
        menus = random_menus(draw, blocks=12, options=6, unit=unit)
        reachable = size([draw.choice([o for o in menu if o.drop is None]) for menu in menus])
        for room in (reachable, reachable - 1):
            solution = program(menus, most_drops=3).solve(room)
            assert solution is not None
            assert size(solution.options) <= room


def test_what_the_solver_returns_is_added_up_again(monkeypatch: pytest.MonkeyPatch):
    menus = random_menus(random.Random(1), blocks=12, options=10)
    room, asked = 4079, 0

    def generous(costs: Sequence[float], rows: Sequence[Row], **settings: Any) -> Minimum | None:
        """Solve as if the budget were a tenth larger."""
        nonlocal asked
        asked += 1
        *others, budget = rows
        return minimise(costs, [*others, budget._replace(high=1.1 * budget.high)], **settings)

    right = program(menus).solve(room)
    monkeypatch.setattr("compression.planner.program.minimise", generous)
    solution = program(menus).solve(room)

    assert asked > 1
    assert right is not None
    assert solution is not None
    assert size(solution.options) <= room
    assert solution.price >= right.price


def test_the_fewest_bytes_are_reached_and_one_less_is_refused():
    draw = random.Random(5)
    menus = random_menus(draw, blocks=5, options=3)
    least = min(map(size, plans(menus, 2)))
    small = program(menus, most_drops=2)

    solution = small.solve(least)

    assert small.least == least
    assert solution is not None
    assert size(solution.options) == least
    assert small.solve(least - 1) is None
    assert small.bound(least - 1) == inf


def test_the_bound_is_below_every_plan():
    draw = random.Random(2)
    menus = random_menus(draw, blocks=4, options=3)
    charges = random_charges(draw, menus)
    bounded = program(menus, charges, most_drops=3)

    for options in plans(menus, 3):
        assert bounded.bound(size(options)) <= price(options, charges) + 1e-12


def test_of_two_blocks_that_replace_each_other_only_one_goes():
    # Either goes for nothing, both for a nat. The room is that of one block dropped and one whole, or of two halves.
    menus = [[option(b, 0, 0.0, action="drop_block"), option(b, 50, 0.3), option(b, 100, 0.0)] for b in range(2)]
    both = (Drop("block", 0), Drop("block", 1))

    apart = program(menus, PairCharges({both: 1.0}, {}, 1.0)).solve(50)
    blind = program(menus).solve(0)

    assert apart is not None
    assert blind is not None
    assert sum(o.drop is not None for o in apart.options) == 1
    assert apart.price == pytest.approx(0.3)
    assert sum(o.drop is not None for o in blind.options) == 2


def test_a_plan_dearer_than_asked_for_is_none():
    menus = random_menus(random.Random(3), blocks=4)
    found = program(menus).solve(1500)

    assert found is not None
    assert program(menus).solve(1500, below=found.price) is None
    assert program(menus).solve(1500, below=found.price * 1.01) == found


def test_plans_apart_drop_something_else_or_change_enough_blocks():
    draw = random.Random(7)
    menus = random_menus(draw, blocks=5, options=3)
    charges = random_charges(draw, menus)
    taken: list[Apart] = []
    prices: list[float] = []
    for _ in range(5):
        solution = program(menus, charges, most_drops=4).solve(1200, apart=taken)
        assert solution is not None
        allowed = [
            options
            for options in plans(menus, 4)
            if size(options) <= 1200 and all(_far(options, plan.options, plan.blocks) for plan in taken)
        ]
        assert solution.price <= min(price(options, charges) for options in allowed) * (1 + CLOSE)
        assert all(_far(solution.options, plan.options, plan.blocks) for plan in taken)
        taken.append(Apart(solution.options, 2))
        prices.append(solution.price)

    assert prices == pytest.approx(sorted(prices), rel=CLOSE)


def _far(options: Sequence[Option], others: Sequence[Option], blocks: int) -> bool:
    if [o.drop for o in options] != [o.drop for o in others]:
        return True
    return sum(a.kind != b.kind for a, b in zip(options, others, strict=True)) >= blocks


def test_where_something_else_is_quantized_experts_are_too_in_some_block():
    menus = [[option(b, 10, 0.0, scheme="keep"), option(b, 8, 0.5, scheme="W8A16")] for b in range(3)]

    free = program(menus).solve(30)
    bound = Program(menus, NOTHING, most_drops=0, quantizes_experts=True).solve(30)

    assert free is not None
    assert bound is not None
    assert not any(o.quantizes_experts for o in free.options)
    assert sum(o.quantizes_experts for o in bound.options) == 1


@pytest.mark.parametrize("seed", range(4))
def test_choosing_drops_first_misses_nothing_that_matters(monkeypatch: pytest.MonkeyPatch, seed: int):
    draw = random.Random(seed)
    menus = random_menus(draw, blocks=16, options=20)
    charges = random_charges(draw, menus[:6])
    least, whole = program(menus, charges).least, size([menu[-1] for menu in menus])
    for share in (0.1, 0.3, 0.6):
        room = least + round(share * (whole - least))
        solutions: list[Solution | None] = []
        for many in (0, 10**9):
            monkeypatch.setattr("compression.planner.program._MANY", many)
            solutions.append(program(menus, charges, most_drops=23).solve(room))
        first, all_at_once = solutions
        assert first is not None
        assert all_at_once is not None
        assert first.price <= all_at_once.price * (1 + CLOSE)
        assert first.gap <= CLOSE


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]):
    import ctypes

    import scipy.optimize

    def noisy(*_: object, **__: object) -> object:
        ctypes.CDLL(None).puts(b"a line of C")
        return original(*_, **__)

    original = scipy.optimize.milp
    scipy.optimize.milp = noisy
    try:
        minimise([1.0, 2.0], [Row({0: 1.0, 1: 1.0}, 1, inf)], whole=[True, True], gap=0.0, seconds=1.0)
    finally:
        scipy.optimize.milp = original

    captured = capfd.readouterr()
    assert captured.out == ""
    assert "a line of C" in captured.err
