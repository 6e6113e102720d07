"""The choice of one option in every block, least in price under a budget of bytes, as an integer program.

    minimise   sum c[l,o] x[l,o] + sum w[a,b] y[a,b]
    where      sum_o x[l,o] = 1                              in every block l
               sum bytes[l,o] x[l,o] <= room
               y[a,b] >= x[a] + x[b] - 1                     for drops a and b that cost w together; y needs no integrality
               sum over drops x <= most                      one of the blocks that are alike stays whole
               sum over options that quantize experts >= 1   where something else is quantized too

Without pairs and with parts of options this is a knapsack: per block the lower convex hull of (bytes, price), all segments sorted
by slope, filled until the room is used up. That bound is looked up in a list, whatever the room, and it does more than order
programs. Its slope prices bytes, and whatever option costs more at that price than a plan that is known leaves no plan better
than that one; most options go before the solver sees them. Bytes are Python integers; what the solver returns is added up again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from math import inf
from typing import NamedTuple

from compression.planner.hulls import Hulls
from compression.planner.milp import Minimum, Row, minimise
from compression.planner.options import Option
from compression.planner.pairs import PairCharges
from compression.planner.prices import Drop
from compression.planner.table import Table

GAP = 1e-4
"""The part of a plan's price by which a better one may be missed: exact solutions take many times as long."""
CLOSE = 2e-3
"""And where there are many options, and for all but the best plan: predictions are a hundred times further off."""
SECONDS = 2.0
"""For one program; what was found by then stands, with its gap."""
_MANY = 1000
"""Options beyond which drops are chosen first."""
_TRIES = 8
_ROUNDING = 1e-6


class Apart(NamedTuple):
    """A plan that is taken: others must drop something else, or do something else with so many blocks."""

    options: tuple[Option, ...]
    blocks: int

    def distance(self, option: Option) -> int:
        """Return what an option of a block adds to the distance; ``blocks`` in all are enough."""
        mine = self.options[option.block]
        return self.blocks if option.drop != mine.drop else int(option.kind != mine.kind)


class Solution(NamedTuple):
    """One option for every block, and what they cost with all charges."""

    options: tuple[Option, ...]
    price: float
    gap: float


class Program:
    """All options of a model, for any budget. ``menus``: the options of each block."""

    def __init__(
        self, menus: Sequence[Sequence[Option]], charges: PairCharges, *, most_drops: int, quantizes_experts: bool
    ) -> None:
        """``quantizes_experts``: at least one block must."""
        self._menus, self._charges = menus, charges
        self._most_drops, self._quantizes_experts = most_drops, quantizes_experts

    @property
    def least(self) -> int:
        """The fewest bytes that any choice takes."""
        return sum(option.bytes for option in self._smallest)

    def bound(self, room: int) -> float:
        """Return a price that no choice within ``room`` bytes goes below; infinite where there is no choice."""
        return inf if room < self.least else self._hulls.bound(room)

    def solve(self, room: int, *, below: float = inf, apart: Sequence[Apart] = ()) -> Solution | None:
        """Return the cheapest choice within ``room`` bytes; None where none is cheaper than ``below``."""
        bound = self.bound(room)
        if bound >= below:
            return None
        best = _cheaper(self._filled(room, apart), below)
        ceiling = below if best is None else best.price
        if ceiling <= bound * (1 + GAP):
            return best
        beyond = self._beyond_best(room)
        if self._charges.pairs and _within(beyond, ceiling * (1 + _ROUNDING) - bound) > _MANY:
            found, bound = self._by_drops(room, below=ceiling, apart=apart)
            best = found or best
            ceiling = ceiling if found is None else found.price
            if ceiling <= bound * (1 + CLOSE):
                return best
        spare = ceiling * (1 + _ROUNDING) - self.bound(room)
        if apart and _within(beyond, spare) > _MANY:  # the second best need not be exactly that
            spare = sorted(price for prices in beyond for price in prices)[_MANY]
        found = self._solved(room, beyond, spare, apart)
        if found is not None and best is not None and found.price >= best.price:
            return best._replace(gap=min(best.gap, found.gap))
        return best if found is None else _cheaper(found, below)

    def price(self, options: Sequence[Option]) -> float:
        """Return what a choice costs with all charges."""
        return sum(map(self._charged, options)) + self._together(frozenset(option.drop for option in options))

    def _together(self, drops: frozenset[Drop | None]) -> float:
        return sum(loss for pair, loss in self._charges.pairs.items() if drops.issuperset(pair))

    def _charged(self, option: Option) -> float:
        drop = option.drop
        return option.cost if drop is None else option.cost + self._charges.single.get(drop, 0.0)

    @cached_property
    def _hulls(self) -> Hulls:
        return Hulls([[(option.bytes, self._charged(option)) for option in menu] for menu in self._menus])

    @cached_property
    def _smallest(self) -> tuple[Option, ...]:
        smaller = [min(menu, key=self._size) for menu in self._menus]
        kept = [min((o for o in menu if o.drop is None), key=self._size, default=menu[0]) for menu in self._menus]
        saving = [(kept[block].bytes - smaller[block].bytes, block) for block in range(len(kept)) if smaller[block].drop]
        for saved, block in sorted(saving, reverse=True)[: self._most_drops]:
            if saved > 0:
                kept[block] = smaller[block]
        return tuple(kept)

    def _size(self, option: Option) -> tuple[int, float]:
        return option.bytes, self._charged(option)

    def _filled(self, room: int, apart: Sequence[Apart]) -> Solution | None:
        """Return a choice that fits, from the hulls; the smallest where that drops too much."""
        filled = [menu[place] for menu, place in zip(self._menus, self._hulls.filled(room), strict=True)]
        for options in (filled, self._smallest):
            if self._allows(options, apart) and sum(option.bytes for option in options) <= room:
                return _solution(options, self.price(options), self.bound(room))
        return None

    def _allows(self, options: Sequence[Option], apart: Sequence[Apart]) -> bool:
        if sum(option.drop is not None for option in options) > self._most_drops:
            return False
        if self._quantizes_experts and not any(option.quantizes_experts for option in options):
            return False
        return all(sum(map(plan.distance, options)) >= plan.blocks for plan in apart)

    def _beyond_best(self, room: int) -> list[list[float]]:
        """Return by how much each option is dearer than the best of its block, with bytes at the price of the last one.

        A plan with the option is that much dearer than the bound or more, even if all else were free to be in part.
        """
        slope = self._hulls.slope(room)
        priced = [[self._charged(option) - slope * option.bytes for option in menu] for menu in self._menus]
        return [[price - min(prices) for price in prices] for prices in priced]

    def _by_drops(self, room: int, *, below: float, apart: Sequence[Apart]) -> tuple[Solution | None, float]:
        """Return the best choice with the drops that are best if all else is free to be in part, and a better bound.

        In deep models that is a hair's breadth from the best choice of all, and far fewer columns are whole numbers.
        """
        table = Table(self._corners, self._charges.pairs)
        found = self._minimum(table, room, (), whole=[option.drop is not None for option in table.options])
        if found is None:
            return None, self.bound(room)
        drops = table.drops(found.values)
        alike = [[option for option in menu if option.drop is None or option.drop in drops] for menu in self._menus]
        those = [[option for option in menu if option.drop in drops] or menu for menu in alike]
        together = self._together(drops)
        rest = Program(
            those,
            PairCharges({}, self._charges.single, 0.0),
            most_drops=self._most_drops,
            quantizes_experts=self._quantizes_experts,
        )
        best = rest.solve(room, below=below - together, apart=apart)
        bound = max(found.bound, self.bound(room))
        return None if best is None else _solution(best.options, best.price + together, bound), bound

    @cached_property
    def _corners(self) -> list[list[Option]]:
        """The options on each block's hull, drops left out, and all drops."""
        kept = [[option for option in menu if option.drop is None] for menu in self._menus]
        hulls = Hulls([[(option.bytes, option.cost) for option in menu] for menu in kept])
        return [
            [menu[corner.place] for corner in corners] + [option for option in every if option.drop is not None]
            for every, menu, corners in zip(self._menus, kept, hulls.corners, strict=True)
        ]

    def _solved(self, room: int, beyond: Sequence[Sequence[float]], spare: float, apart: Sequence[Apart]) -> Solution | None:
        """Return what the solver makes of the options that are no more than ``spare`` dearer than the best of their block."""
        menus = [
            [option for option, price in zip(menu, prices, strict=True) if price <= spare]
            for menu, prices in zip(self._menus, beyond, strict=True)
        ]
        table = Table(menus, self._charges.pairs)
        limit = room
        for _ in range(_TRIES):
            found = self._minimum(
                table, limit, self._conditions(table, apart), whole=[True] * len(table.options), gap=CLOSE if apart else GAP
            )
            if found is None:
                return None
            options = table.choice(found.values)
            excess = sum(option.bytes for option in options) - room
            if excess <= 0:
                return Solution(options, self.price(options), found.gap)
            limit -= excess  # the solver's arithmetic is not exact
        return None

    def _minimum(
        self, table: Table, room: int, rows: Iterable[Row], *, whole: Sequence[bool], gap: float = GAP
    ) -> Minimum | None:
        if (budget := table.budget(room)) is None:
            return None
        costs = [*map(self._charged, table.options), *table.losses]
        unit = max(self.bound(room), 1e-3 * max(costs), 1e-12) / 1e3  # the solver's tolerances are absolute
        rows = [*table.one_each(), *table.both(), *table.few_drops(self._most_drops), *rows, *budget]
        whole = [*whole, *[False] * len(table.losses)]
        found = minimise([cost / unit for cost in costs], rows, whole=whole, gap=gap, seconds=SECONDS)
        return None if found is None else found._replace(bound=found.bound * unit)

    def _conditions(self, table: Table, apart: Sequence[Apart]) -> Iterator[Row]:
        if self._quantizes_experts:
            yield table.row(lambda option: option.quantizes_experts, at_least=1)
        for plan in apart:
            yield table.row(plan.distance, at_least=plan.blocks)


def _solution(options: Sequence[Option], price: float, bound: float) -> Solution:
    return Solution(tuple(options), price, max(0.0, 1 - bound / price) if price > 0 else 0.0)


def _within(beyond: Sequence[Sequence[float]], spare: float) -> int:
    return sum(price <= spare for prices in beyond for price in prices)


def _cheaper(solution: Solution | None, below: float) -> Solution | None:
    return solution if solution is not None and solution.price < below else None
