"""Prices made up at random, shaped as measured ones are: fewer bits and experts cost more, some blocks are dear."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from compression.planner.inventory import Inventory
from compression.planner.levers import Levers
from compression.planner.prices import Count, Drop, DropPrice, PairPrice, Prices, SchemeOf, Setting
from compression.planner.prior import usual_prices


def made_prices(inventory: Inventory, levers: Levers, *, seed: int = 0, measured: int = 12) -> Prices:
    """Return prices for a model; of drops, the ``measured`` cheapest are priced in pairs."""
    draw = random.Random(seed)
    usual = usual_prices(inventory, levers)
    counts = [
        Count(criterion=criterion, experts_kept=count.experts_kept, price=_uneven(count.price, draw))
        for criterion in levers.criteria
        for count in usual.counts
    ]
    schemes = [
        SchemeOf(lever=s.lever, scheme=s.scheme, price=_uneven(s.price, draw), rounded=_uneven(s.rounded, draw))
        for s in usual.schemes
    ]
    drops = [DropPrice(drop=price.drop, loss=price.loss * draw.lognormvariate(0, 0.5)) for price in usual.drops]
    cheapest = sorted(drops, key=lambda price: price.loss)[:measured]
    return usual.model_copy(
        update={
            "measured": True,
            "loss": 3.0,
            "counts": tuple(counts),
            "schemes": tuple(schemes),
            "drops": tuple(drops),
            "pairs": tuple(_pairs(cheapest, draw)),
        }
    )


def _uneven(setting: Setting, draw: random.Random) -> Setting:
    errors = {block: error * draw.lognormvariate(0, 1) for block, error in setting.errors.items()}
    return Setting(whole=setting.whole * draw.lognormvariate(0, 0.2), errors=errors)


def _pairs(drops: Sequence[DropPrice], draw: random.Random) -> list[PairPrice]:
    return [
        PairPrice(first=a.drop, second=b.drop, loss=a.loss + b.loss + draw.gauss(0.3, 0.5) * (a.loss + b.loss))
        for a, b in combinations(drops, 2)
        if a.drop.block != b.drop.block
    ]


def pair(first: Drop, second: Drop, loss: float) -> PairPrice:
    """Return what two drops cost together."""
    return PairPrice(first=first, second=second, loss=loss)
