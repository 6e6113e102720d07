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

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import gcd, inf
from typing import NamedTuple

from compression.planner.milp import Row, minimise
from compression.planner.options import Option
from compression.planner.pairs import PairCharges
from compression.planner.prices import Drop

GAP = 1e-4
"""The part of a plan's price by which a better one may be missed: exact solutions take many times as long."""
SECONDS = 5.0
"""For one program; what was found by then stands, with its gap."""
_TRIES = 8


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


class _Segment(NamedTuple):
    """A step on a block's hull: to a larger and cheaper option."""

    slope: float
    block: int
    option: Option
    bytes: int
    price: float


@dataclass(frozen=True)
class _Hull:
    start: tuple[Option, ...]
    segments: tuple[_Segment, ...]
    """Steepest first."""
    bytes: tuple[int, ...]
    """Of all blocks, after so many segments."""
    prices: tuple[float, ...]


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
        if room < self.least:
            return inf
        place = bisect_right(self._hull.bytes, room) - 1
        left = room - self._hull.bytes[place]
        return self._hull.prices[place] + self._slope(room) * left

    def solve(self, room: int, *, below: float = inf, apart: Sequence[Apart] = ()) -> Solution | None:
        """Return the cheapest choice within ``room`` bytes; None where none is cheaper than ``below``."""
        bound = self.bound(room)
        if bound >= below:
            return None
        known = self._filled(room, apart)
        best = known if known is not None and known.price < below else None
        if best is None or best.price > bound * (1 + GAP):
            found = self._solved(room, bound, best.price if best is not None else below, apart)
            if found is not None and found.price < (best.price if best is not None else below):
                best = found
        return best

    def price(self, options: Sequence[Option]) -> float:
        """Return what a choice costs with all charges."""
        dropped = {option.drop for option in options}
        pairs = sum(loss for pair, loss in self._charges.pairs.items() if dropped.issuperset(pair))
        return sum(map(self._charged, options)) + pairs

    def _charged(self, option: Option) -> float:
        drop = option.drop
        return option.cost if drop is None else option.cost + self._charges.single.get(drop, 0.0)

    @cached_property
    def _smallest(self) -> tuple[Option, ...]:
        kept = [min((o for o in menu if o.drop is None), key=self._size) for menu in self._menus]
        smaller = [min(menu, key=self._size) for menu in self._menus]
        saving = [(kept[block].bytes - smaller[block].bytes, block) for block in range(len(kept)) if smaller[block].drop]
        for saved, block in sorted(saving, reverse=True)[: self._most_drops]:
            if saved > 0:
                kept[block] = smaller[block]
        return tuple(kept)

    def _size(self, option: Option) -> tuple[int, float]:
        return option.bytes, self._charged(option)

    @cached_property
    def _hull(self) -> _Hull:
        start: list[Option] = []
        segments: list[_Segment] = []
        for block, menu in enumerate(self._menus):
            corners = _corners(sorted((option.bytes, self._charged(option), place) for place, option in enumerate(menu)))
            start.append(menu[corners[0][2]])
            for (size, price, _), (larger, cheaper, place) in pairwise(corners):
                step = _Segment((cheaper - price) / (larger - size), block, menu[place], larger - size, cheaper - price)
                segments.append(step)
        segments.sort(key=lambda segment: segment.slope)
        sizes = accumulate((segment.bytes for segment in segments), initial=sum(option.bytes for option in start))
        prices = accumulate((segment.price for segment in segments), initial=sum(map(self._charged, start)))
        return _Hull(tuple(start), tuple(segments), tuple(sizes), tuple(prices))

    def _slope(self, room: int) -> float:
        """Return the price of the last byte; at most 0."""
        place = bisect_right(self._hull.bytes, room) - 1
        return self._hull.segments[place].slope if place < len(self._hull.segments) else 0.0

    def _filled(self, room: int, apart: Sequence[Apart]) -> Solution | None:
        """Return a good choice: whole segments as long as they fit, in each block without a gap."""
        choice, left = list(self._hull.start), room - self._hull.bytes[0]
        stuck: set[int] = set()
        for segment in self._hull.segments:
            if segment.block in stuck:
                continue
            if segment.bytes > left:
                stuck.add(segment.block)
            else:
                choice[segment.block], left = segment.option, left - segment.bytes
        for options in (tuple(choice), self._smallest):
            if self._allows(options, apart) and sum(option.bytes for option in options) <= room:
                return Solution(options, self.price(options), 0.0)
        return None

    def _allows(self, options: Sequence[Option], apart: Sequence[Apart]) -> bool:
        if sum(option.drop is not None for option in options) > self._most_drops:
            return False
        if self._quantizes_experts and not any(option.quantizes_experts for option in options):
            return False
        return all(sum(map(plan.distance, options)) >= plan.blocks for plan in apart)

    def _solved(self, room: int, bound: float, ceiling: float, apart: Sequence[Apart]) -> Solution | None:
        """Return what the solver finds among the options that can be part of a plan cheaper than ``ceiling``."""
        menus = self._worthwhile(room, ceiling)
        if not all(menus):
            return None
        table = _Table(menus, self._charges.pairs)
        unit = max(bound, ceiling * 1e-3) if ceiling < inf else max(bound, 1.0)
        costs = [1e3 * price / unit for price in (*map(self._charged, table.options), *table.losses)]
        rows = [*table.one_each(), *table.both(), *self._conditions(table, apart)]
        limit = room
        for _ in range(_TRIES):
            budget = table.budget(limit)
            found = (
                None if budget is None else minimise(costs, [*rows, *budget], binary=len(table.options), gap=GAP, seconds=SECONDS)
            )
            if found is None:
                return None
            options = table.choice(found.values)
            excess = sum(option.bytes for option in options) - room
            if excess <= 0:
                return Solution(options, self.price(options), found.gap)
            limit -= excess  # the solver's arithmetic is not exact
        return None

    def _worthwhile(self, room: int, ceiling: float) -> list[list[Option]]:
        """Leave out what is dearer than the ceiling even if everything else were free to be in part."""
        slope = self._slope(room)
        priced = [[self._charged(option) - slope * option.bytes for option in menu] for menu in self._menus]
        least = [min(prices) for prices in priced]
        spare = ceiling * (1 + 1e-6) - (sum(least) + slope * room)
        return [
            [option for option, price in zip(menu, prices, strict=True) if price - lowest <= spare]
            for menu, prices, lowest in zip(self._menus, priced, least, strict=True)
        ]

    def _conditions(self, table: _Table, apart: Sequence[Apart]) -> Iterator[Row]:
        dropped = {column: 1.0 for column, option in enumerate(table.options) if option.drop is not None}
        if dropped:
            yield Row(dropped, 0, self._most_drops)
        if self._quantizes_experts:
            yield Row({column: 1.0 for column, option in enumerate(table.options) if option.quantizes_experts}, 1, inf)
        for plan in apart:
            distances = ((column, float(plan.distance(option))) for column, option in enumerate(table.options))
            yield Row({column: distance for column, distance in distances if distance}, plan.blocks, inf)


class _Table:
    """Options as columns, then pairs of drops as columns."""

    def __init__(self, menus: Sequence[Sequence[Option]], pairs: Mapping[tuple[Drop, Drop], float]) -> None:
        self.options = tuple(option for menu in menus for option in menu)
        self._starts = tuple(accumulate(map(len, menus), initial=0))
        self._columns: dict[Drop, list[int]] = {}
        for column, option in enumerate(self.options):
            if option.drop is not None:
                self._columns.setdefault(option.drop, []).append(column)
        self._pairs = [pair for pair in pairs if all(drop in self._columns for drop in pair)]
        self.losses = [pairs[pair] for pair in self._pairs]

    def one_each(self) -> Iterator[Row]:
        for start, stop in pairwise(self._starts):
            yield Row(dict.fromkeys(range(start, stop), 1.0), 1, 1)

    def both(self) -> Iterator[Row]:
        for column, pair in enumerate(self._pairs, len(self.options)):
            yield Row({**{own: -1.0 for drop in pair for own in self._columns[drop]}, column: 1.0}, -1, inf)

    def budget(self, room: int) -> list[Row] | None:
        """Return the budget's row, if it needs one; None where nothing fits. Scaling it is exact."""
        blocks = [range(start, stop) for start, stop in pairwise(self._starts)]
        least = [min(self.options[column].bytes for column in block) for block in blocks]
        over = {c: self.options[c].bytes - low for block, low in zip(blocks, least, strict=True) for c in block}
        left, unit = room - sum(least), gcd(*over.values())
        if left < 0:
            return None
        if unit == 0:
            return []
        scale = 2.0 ** -max(0, (left // unit).bit_length() - 24)  # within 2^24, a unit is still far above the solver's tolerance
        return [Row({c: size // unit * scale for c, size in over.items() if size}, 0, left // unit * scale)]

    def choice(self, values: Sequence[float]) -> tuple[Option, ...]:
        """Return the options that a solution means."""
        return tuple(self.options[max(range(start, stop), key=values.__getitem__)] for start, stop in pairwise(self._starts))


def _corners(points: Sequence[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Return the lower convex hull of (bytes, price) as far as it falls, smallest first; ``points`` are sorted."""
    hull: list[tuple[int, float, int]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(left: tuple[int, float, int], middle: tuple[int, float, int], right: tuple[int, float, int]) -> bool:
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])
