"""The search for the subset of experts that a loss likes best: by trying all of them, or greedily with swaps.

A loss here values what *stays*. All subsets are tried when there are fewer than EXHAUSTIVE of them; ties keep the set that
comes first in the order of ids dropped, as NAEE does. Otherwise the cheapest expert goes, one at a time, and then kept and
dropped experts are swapped as long as that helps. Group-limited routers keep equally many of each group throughout: there one
expert of each group goes in every round, and swaps stay inside groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from math import comb, prod
from typing import NamedTuple

from compression.trimming import Routing, by_group

EXHAUSTIVE = 20_000
"""Subsets from which on the search is greedy."""
_SWEEPS = 4
"""Rounds of swaps, at most: each tries every pair once and takes what helps as it goes."""

Loss = Callable[[tuple[int, ...]], float]
"""What it costs to keep exactly these experts, given ascending."""


class Round(NamedTuple):
    """Experts that go together, one of each group, and what their going costs."""

    cost: float
    experts: tuple[int, ...]


def best(loss: Loss, among: Sequence[int], count: int, routing: Routing) -> tuple[int, ...]:
    """Return the ``count`` expert ids among these with the least loss, ascending."""
    members = by_group(among, routing.experts, routing.groups)
    per_group = count // routing.groups
    if prod(comb(len(group), per_group) for group in members) < EXHAUSTIVE:
        return min(_all_kept(members, per_group), key=loss)  # min keeps the first of equals
    kept = set(among)
    for going in rounds(loss, among, len(members[0]) - per_group, routing):
        kept -= set(going.experts)
    return _swapped(loss, kept, members)


def rounds(loss: Loss, among: Sequence[int], count: int, routing: Routing) -> list[Round]:
    """Return the order in which experts go greedily, for ``count`` rounds, each with the loss that it adds."""
    left = by_group(among, routing.experts, routing.groups)
    order: list[Round] = []
    before = loss(tuple(sorted(among)))
    for _ in range(count):
        going: list[int] = []
        for place, group in enumerate(left):
            # The other groups stand in with their first, or with what has been chosen for them: counts stay equal.
            others = [going[other] if other < place else rest[0] for other, rest in enumerate(left) if other != place]
            everyone = {expert for rest in left for expert in rest} - set(others)
            going.append(min(group, key=lambda expert: loss(tuple(sorted(everyone - {expert})))))
        left = [[expert for expert in group if expert not in going] for group in left]
        after = loss(tuple(sorted(expert for group in left for expert in group)))
        order.append(Round(after - before, tuple(going)))
        before = after
    return order


def _all_kept(members: list[list[int]], per_group: int) -> Iterator[tuple[int, ...]]:
    """Yield every set to keep, in the order of the ids dropped."""
    whole = sorted(expert for group in members for expert in group)
    gone = (combinations(group, len(group) - per_group) for group in members)
    for parts in product(*gone):
        dropped = {expert for part in parts for expert in part}
        yield tuple(expert for expert in whole if expert not in dropped)


def _swapped(loss: Loss, kept: set[int], members: list[list[int]]) -> tuple[int, ...]:
    lowest = loss(tuple(sorted(kept)))
    for _ in range(_SWEEPS):
        improved = False
        for group in members:
            for out, back in product([e for e in group if e in kept], [e for e in group if e not in kept]):
                if out not in kept or back in kept:
                    continue
                swapped = (kept - {out}) | {back}
                value = loss(tuple(sorted(swapped)))
                if value < lowest:
                    kept, lowest, improved = swapped, value, True
        if not improved:
            break
    return tuple(sorted(kept))
