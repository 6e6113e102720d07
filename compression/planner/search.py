"""Recipe "auto": the plan that costs least of all that fit, its rivals, and the frontier from the smallest to the untouched.

What a whole model agrees on (``Common``) is tried one by one, everything else is one integer program each. They are solved in the
order of their bounds, and none whose bound is no better than what was found: one to three of a hundred.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from math import exp, inf, log

from compression.planner.inventory import Inventory
from compression.planner.options import Common, Options, Selection, unbeaten
from compression.planner.pairs import beyond_single, pair_charges
from compression.planner.prices import Prices
from compression.planner.program import Apart, Program, Solution
from compression.planner.steps import steps_of
from compression.recipe import AnyStep, Profile
from compression.request import Serving

NEAR_SHARE, NEAR_NATS = 1.05, 0.02
"""Rivals of a plan cost at most so many times as much, or so much more."""
_FEWEST_POINTS = 12


class Search:
    """All plans for one model, one way of serving it, one profile and one set of prices."""

    def __init__(self, inventory: Inventory, serving: Serving, profile: Profile, prices: Prices) -> None:
        self._inventory, self.prices = inventory, prices
        self._options = Options(inventory, serving, profile, prices)
        self._charges = pair_charges(prices, self._options.drops)

    def best(self, target: int) -> Selection | None:
        """Return the plan that costs least within ``target`` bytes; None where none fits."""
        untouched = self._options.untouched
        if untouched.bytes <= target:
            return untouched
        found = self._cheapest(target, inf, ())
        return None if found is None else self._selection(*found)

    def rivals(self, target: int, most: int = 6) -> list[Selection]:
        """Return the best plan and, cheapest first, those that are about as good and differ from each other in kind.

        They drop other blocks, or a quarter of the blocks that stay keep other counts or schemes of experts.
        """
        if self._options.untouched.bytes <= target:
            return [self._options.untouched]
        found: list[Selection] = []
        taken: list[Apart] = []
        limit = inf
        while len(found) < most and (plan := self._cheapest(target, limit, taken)) is not None:
            common, solution = plan
            if not found:
                limit = max(NEAR_SHARE * solution.price, solution.price + NEAR_NATS)
            kept = sum(option.experts_kept is not None for option in solution.options)
            taken.append(Apart(solution.options, max(1, kept // 4)))
            found.append(self._selection(common, solution))
        return found

    def smallest(self) -> Selection:
        """Return the plan of the fewest bytes; of several, the one that costs least."""
        for total in sorted({program.least for program in self._programs.values()}):
            if (found := self.best(self._options.fixed + total)) is not None:
                return found
        return self._options.untouched

    def frontier(self, points: int = 16) -> list[Selection]:
        """Return plans from the smallest to the untouched, each larger and cheaper than the one before.

        Budgets are spread evenly in the logarithm of bytes. Where that finds fewer than 12 plans and there are more, the widest
        gaps are filled.
        """
        smallest, untouched = self.smallest(), self._options.untouched
        step = log(untouched.bytes / smallest.bytes) / max(1, points - 1)
        targets = [round(smallest.bytes * exp(step * place)) for place in range(1, points - 1)]
        found = _falling([smallest, *filter(None, map(self.best, targets)), untouched])
        closed: set[int] = set()
        while len(found) < min(points, _FEWEST_POINTS):
            gaps = [(b.bytes / a.bytes, place) for place, (a, b) in enumerate(pairwise(found))]
            gaps = [(ratio, place) for ratio, place in gaps if found[place + 1].bytes not in closed]
            if not gaps:
                break
            place = max(gaps)[1]
            more = self._between(found[place], found[place + 1])
            if more is None:
                closed.add(found[place + 1].bytes)
            else:
                found = _falling([*found, more])
        return found

    def steps_of(self, selection: Selection) -> tuple[AnyStep, ...]:
        """Return a plan's steps in normal form; none for the untouched model."""
        return steps_of(selection, self._inventory, self._options.levers)

    @cached_property
    def _programs(self) -> dict[Common, Program]:
        options = self._options
        return {
            common: Program(
                options.of(common),
                self._charges,
                most_drops=options.most_drops,
                quantizes_experts=common.scheme is None,
            )
            for common in options.commons()
        }

    def _cheapest(self, target: int, below: float, apart: Sequence[Apart]) -> tuple[Common, Solution] | None:
        """Return the cheapest choice of all programs that is cheaper than ``below``."""
        room = target - self._options.fixed
        best: tuple[Common, Solution] | None = None
        bounds = [(program.bound(room), place) for place, program in enumerate(self._programs.values())]
        commons = list(self._programs)
        for bound, place in sorted(bounds):
            if bound >= below:
                break
            found = self._programs[commons[place]].solve(room, below=below, apart=apart)
            if found is not None:
                best, below = (commons[place], found), found.price
        return best

    def _selection(self, common: Common, solution: Solution) -> Selection:
        options = solution.options
        drops = [option.drop for option in options if option.drop is not None]
        together = beyond_single(self.prices, self._charges, drops)
        fewer = any(option.experts_kept not in (None, self._inventory.experts) for option in options)
        return Selection(
            options,
            common.criterion if fewer else None,
            self._options.fixed + sum(option.bytes for option in options),
            sum(option.cost for option in options) + together,
            sum(option.rounded_cost for option in options) + together,
            solution.gap,
        )

    def _between(self, small: Selection, large: Selection) -> Selection | None:
        """Return a plan between two of a frontier; None where there is none that belongs there."""
        for target in (round((small.bytes * large.bytes) ** 0.5), large.bytes - 1):
            found = self.best(target) if small.bytes < target < large.bytes else None
            if found is not None and found.bytes > small.bytes and small.loss > found.loss > large.loss:
                return found
        return None


def _falling(plans: Iterable[Selection]) -> list[Selection]:
    """Return plans by size, without those that cost no less than a smaller one."""
    return unbeaten(plans, lambda plan: plan.loss)
