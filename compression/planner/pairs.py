"""What drops cost together beyond each by itself, so that a linear program can count it.

Pairs that were measured are charged what they cost, one by one. What was not measured must not look free, or the program goes
there (decision 0021): each such pair is charged p, the dearest measured pair, and where no pair was measured, the median single
drop. A measured drop is one that is in any measured pair. Two of them that were not measured together are charged p as a pair.

The others are too many for that: all pairs of 120 drops are 7 000 rows. Each is charged alone, and no less than its pairs:
the k-th cheapest block of them pays p (k - 1 + B), with B the blocks that have measured drops, its own not counted. Of any n
such drops the ranks add up to n (n - 1) / 2 or more, the pairs among them; and a plan drops at most B measured ones, each a
pair with each of the n. A plan is chosen by that upper bound and then counted pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from compression.planner.prices import Drop, Prices


@dataclass(frozen=True)
class PairCharges:
    """What is added to single prices of drops, in nats per token."""

    pairs: Mapping[tuple[Drop, Drop], float]
    """If both go; only what is above zero."""
    single: Mapping[Drop, float]
    """For drops in no measured pair: no less than all their pairs cost, whichever else go."""
    unmeasured: float
    """p, for each pair that was not measured."""


def pair_charges(prices: Prices, drops: Iterable[Drop]) -> PairCharges:
    """Return the charges for plans out of these drops."""
    candidates = sorted(set(drops), key=lambda drop: (prices.of_drop(drop), drop))
    unmeasured = _unmeasured(prices, candidates)
    in_pairs = {drop for pair in prices.pairs for drop in (pair.first, pair.second)}
    measured = [drop for drop in candidates if drop in in_pairs]
    charged: dict[tuple[Drop, Drop], float] = {}
    for first, second in combinations(measured, 2):
        if first.block != second.block:
            beyond = prices.beyond(first, second)
            charged[first, second] = unmeasured if beyond is None else beyond
    single: dict[Drop, float] = {}
    with_measured = {drop.block for drop in measured}
    ranks: dict[int, int] = {}
    for drop in candidates:
        if drop not in in_pairs:
            rank = ranks.setdefault(drop.block, len(ranks))
            single[drop] = unmeasured * (rank + len(with_measured - {drop.block}))
    return PairCharges({pair: loss for pair, loss in charged.items() if loss > 0}, single, unmeasured)


def beyond_single(prices: Prices, charges: PairCharges, dropped: Iterable[Drop]) -> float:
    """Return what these drops cost together beyond each by itself, pair by pair."""
    total = 0.0
    for first, second in combinations(dropped, 2):
        beyond = prices.beyond(first, second)
        total += charges.unmeasured if beyond is None else beyond
    return total


def pairs_to_measure(prices: Prices, most: int) -> list[tuple[Drop, Drop]]:
    """Return the pairs worth measuring: all among the cheapest drops of each kind, as many of them as make ``most`` pairs.

    The first of a pair lies before the second. A solver goes where too little is known: what is cheap alone must be known best.
    """
    ranked = sorted((price.drop for price in prices.drops), key=lambda drop: (prices.of_drop(drop), drop))
    by_kind = [[drop for drop in ranked if drop.kind == kind] for kind in ("block", "layer")]
    chosen: list[tuple[Drop, Drop]] = []
    for count in range(2, max(map(len, by_kind)) + 1):
        among = sorted((drop for drops in by_kind for drop in drops[:count]), key=lambda drop: (drop.block, drop.kind))
        pairs = [(first, second) for first, second in combinations(among, 2) if first.block != second.block]
        if len(pairs) > most:
            break
        chosen = pairs
    return chosen


def unmeasured_pairs(prices: Prices, dropped: Iterable[Drop]) -> list[tuple[Drop, Drop]]:
    """Return the pairs of these drops whose price together is not known, the first before the second."""
    ordered = sorted(dropped, key=lambda drop: drop.block)
    return [pair for pair in combinations(ordered, 2) if prices.beyond(*pair) is None]


def _unmeasured(prices: Prices, candidates: Iterable[Drop]) -> float:
    beyond = [prices.beyond(pair.first, pair.second) or 0.0 for pair in prices.pairs]
    if any(loss > 0 for loss in beyond):
        return max(beyond)
    # The median: one vital block at 4.7 nats, as there was in the one model measured, says nothing about the others.
    return median([prices.of_drop(drop) for drop in candidates] or [0.0])
