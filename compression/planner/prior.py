"""Prices as they usually are, for a plan before anything was measured: which levers come first, and about what they cost.

All figures are divergences in nats per token, measured on one trained 21.5 M Mixtral of 8 blocks with 8 experts, by GPTQ in
groups of 128, with another implementation than this one. One small model is no law, so a plan from them is provisional. Blocks
share errors evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compression.planner.inventory import Inventory
from compression.planner.levers import Levers
from compression.planner.prices import Count, Drop, DropPrice, Lever, Prices, SchemeOf, Setting

_SCHEMES: Mapping[Lever, Mapping[str, float]] = {
    # All experts at once. 8 bits everywhere cost 1e-4, half of it here.
    "experts": {"W8A16": 0.00005, "W4A16": 0.0010, "W3A16": 0.0042, "W2A16": 0.0402},
    # Everything at 4 bits costs .0015, at 3 bits .012: what experts leave of that is attention's. .080 at 2 bits: measured.
    "attention": {"W8A16": 0.00005, "W4A16": 0.0005, "W3A16": 0.0078, "W2A16": 0.080},
    # Not measured: that model has neither shared experts nor dense layers. Every token uses them, as it does attention.
    "others": {"W8A16": 0.00005, "W4A16": 0.0005, "W3A16": 0.0078, "W2A16": 0.080},
}
_ROUNDING = 3.2
"""Rounding to nearest costs so many times what GPTQ does: factors of .27 to .35 between them, .31 over all levers."""
_BY_SHARE = ((0.0, 0.0), (1 / 8, 0.0024), (1 / 4, 0.029), (3 / 8, 0.047), (1 / 2, 0.178), (5 / 8, 0.361), (1.0, 1.5))
"""The share of experts dropped by REAP, and what that costs; above 5/8 a guess on the same curve."""
_ALL_BLOCKS = 8 * 0.17
"""The median block of 8 costs .17 to drop. A model of more blocks does less in each: .05 for one of 32 are published."""
_FIRST = 4.5
"""The first block cannot go: 4.54."""
_LAST = 2.0
"""The last block costs so many times what the median one does: .25 against .17, and more in deeper models."""
_LAYER = 0.5
"""The MoE layer's part of what its block costs: .25 to .9, by how many go."""


def usual_prices(inventory: Inventory, levers: Levers) -> Prices:
    """Return usual prices for a model that was not measured: of the first criterion alone, and of no pairs."""
    return Prices(
        measured=False,
        tokens=0,
        text="",
        loss=0.0,
        group_size=levers.group_size,
        counts=tuple(_counts(inventory, levers)),
        schemes=tuple(_schemes(inventory, levers)),
        drops=tuple(DropPrice(drop=drop, loss=_drop(drop, len(inventory.blocks))) for drop in levers.drops),
    )


def _counts(inventory: Inventory, levers: Levers) -> Iterable[Count]:
    mixtures = {block.index: 1.0 for block in inventory.blocks if block.is_mixture}
    for kept in levers.counts:
        loss = _of_share(1 - kept / inventory.experts)
        yield Count(criterion=levers.criteria[0], experts_kept=kept, price=Setting(whole=loss, errors=mixtures))


def _of_share(dropped: float) -> float:
    """Return what dropping a share of the experts costs, in a straight line between the shares that were measured."""
    place = next(place for place, (share, _) in enumerate(_BY_SHARE) if dropped <= share)
    (left, low), (right, high) = _BY_SHARE[max(0, place - 1)], _BY_SHARE[max(1, place)]
    return low + (high - low) * (dropped - left) / (right - left)


def _schemes(inventory: Inventory, levers: Levers) -> Iterable[SchemeOf]:
    for lever, schemes in levers.schemes.items():
        components = levers.components[lever]
        has = {block.index: 1.0 for block in inventory.blocks if any(part.component in components for part in block.parts)}
        for scheme in schemes:
            loss = _SCHEMES[lever][scheme]
            rounded = Setting(whole=_ROUNDING * loss, errors=has)
            yield SchemeOf(lever=lever, scheme=scheme, price=Setting(whole=loss, errors=has), rounded=rounded)


def _drop(drop: Drop, blocks: int) -> float:
    loss = _ALL_BLOCKS / blocks
    if drop.block == 0:
        loss = _FIRST
    elif drop.block == blocks - 1:
        loss *= _LAST
    return loss if drop.kind == "block" else _LAYER * loss
