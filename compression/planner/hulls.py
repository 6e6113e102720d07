"""The knapsack without its whole numbers: per block the lower convex hull of bytes and price, filled steepest first.

What it costs when the last step is taken in part is a bound on every choice, and is looked up in a list, whatever the room.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Corner(NamedTuple):
    """An option on a hull; ``place``: which of its block's."""

    bytes: int
    price: float
    place: int


class _Step(NamedTuple):
    slope: float
    block: int
    place: int
    bytes: int
    price: float


class Hulls:
    """The hulls of all blocks."""

    def __init__(self, points: Sequence[Sequence[tuple[int, float]]]) -> None:
        """``points``: bytes and price of every option of every block."""
        self.corners = [_corners(block) for block in points]
        steps = [
            _Step((to.price - at.price) / (to.bytes - at.bytes), block, to.place, to.bytes - at.bytes, to.price - at.price)
            for block, corners in enumerate(self.corners)
            for at, to in pairwise(corners)
        ]
        self._steps = sorted(steps, key=lambda step: step.slope)
        smallest = [corners[0] for corners in self.corners]
        self._bytes = list(accumulate((step.bytes for step in self._steps), initial=sum(corner.bytes for corner in smallest)))
        self._prices = list(accumulate((step.price for step in self._steps), initial=sum(corner.price for corner in smallest)))

    def bound(self, room: int) -> float:
        """Return what no choice within ``room`` bytes costs less than; ``room`` holds the smallest options."""
        place = bisect_right(self._bytes, room) - 1
        return self._prices[place] + self.slope(room) * (room - self._bytes[place])

    def slope(self, room: int) -> float:
        """Return the price of the last byte; at most 0."""
        place = bisect_right(self._bytes, room) - 1
        return self._steps[place].slope if place < len(self._steps) else 0.0

    def filled(self, room: int) -> list[int]:
        """Return the place of an option for every block: whole steps as long as they fit, and after one that does not, none."""
        choice, left = [corners[0].place for corners in self.corners], room - self._bytes[0]
        stuck: set[int] = set()
        for step in self._steps:
            if step.block not in stuck and step.bytes <= left:
                choice[step.block], left = step.place, left - step.bytes
            else:
                stuck.add(step.block)
        return choice


def _corners(points: Sequence[tuple[int, float]]) -> list[Corner]:
    """Return the lower convex hull as far as it falls, smallest first."""
    hull: list[Corner] = []
    for point in sorted(Corner(size, price, place) for place, (size, price) in enumerate(points)):
        if hull and point.price >= hull[-1].price:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(left: Corner, middle: Corner, right: Corner) -> bool:
    return (middle.price - left.price) * (right.bytes - left.bytes) >= (right.price - left.price) * (middle.bytes - left.bytes)
