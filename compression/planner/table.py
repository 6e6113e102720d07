"""A program's options and pairs of drops as columns, and the rows that hold for every plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import gcd, inf

from compression.planner.milp import Row
from compression.planner.options import Option
from compression.planner.prices import Drop


class Table:
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
        """Yield a row for every block: one option of it."""
        for start, stop in pairwise(self._starts):
            yield Row(dict.fromkeys(range(start, stop), 1.0), 1, 1)

    def both(self) -> Iterator[Row]:
        """Yield a row for every pair: its column is 1 where both go."""
        for column, pair in enumerate(self._pairs, len(self.options)):
            yield Row({**{own: -1.0 for drop in pair for own in self._columns[drop]}, column: 1.0}, -1, inf)

    def few_drops(self, most: int) -> Iterator[Row]:
        """Yield the row that bounds what goes, where anything can."""
        dropped = {column: 1.0 for columns in self._columns.values() for column in columns}
        if dropped:
            yield Row(dropped, 0, most)

    def row(self, weight: Callable[[Option], float], *, at_least: float) -> Row:
        """Return the row that demands so much weight of the options chosen."""
        weights = ((column, float(weight(option))) for column, option in enumerate(self.options))
        return Row({column: weight for column, weight in weights if weight}, at_least, inf)

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

    def drops(self, values: Sequence[float]) -> frozenset[Drop]:
        """Return what goes, even where options are taken in part."""
        return frozenset(drop for drop, columns in self._columns.items() if sum(values[column] for column in columns) > 0.5)
