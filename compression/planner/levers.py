"""What recipe "auto" may choose among for one model: counts of experts, schemes, drops.

Everything that the sensitivity sweep prices, whatever the profile, so that one study answers for every request; and what of it
a request leaves open. Not among them: FP8_DYNAMIC, whose activations engines round at run time, which no weight shows; 2:4,
which costs more than 2 bits at four times the bytes wherever both were measured; merging and skipping (decision 0021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compression.architectures import Component, Refusable
from compression.planner.inventory import Inventory
from compression.planner.prices import Drop, Lever
from compression.planner.resolve import group_size_for
from compression.planner.trims import workable_counts
from compression.recipe import Profile
from compression.request import Serving
from compression.trimming.dense_layers import stock_layer_drop

_SCHEMES = ("W8A16", "W4A16", "W3A16", "W2A16")
_PORTABLE = ("W8A16", "W4A16")
_FEW = 16
"""Experts up to which every count is tried, and subsets are searched."""
_SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
COMPONENTS_OF: Mapping[Lever, tuple[Component, ...]] = {
    "experts": ("experts",),
    "attention": ("attention",),
    "others": ("shared_experts", "dense"),
}


@dataclass(frozen=True)
class Levers:
    """The settings of each lever, gentlest first; leaving a block as it is goes without saying."""

    counts: tuple[int, ...]
    criteria: tuple[str, ...]
    schemes: Mapping[Lever, tuple[str, ...]]
    components: Mapping[Lever, tuple[Component, ...]]
    """What each lever's scheme is for, of what this model has and allows to quantize."""
    drops: tuple[Drop, ...]
    group_size: int


def levers_of(inventory: Inventory, serving: Serving | None = None, profile: Profile = "custom") -> Levers:
    """Return what a request of this profile leaves open; with neither, all that is priced."""
    serving = serving or Serving()
    schemes = _schemes(inventory, profile)
    components: dict[Lever, tuple[Component, ...]] = {lever: components_of(lever, inventory) for lever in schemes}
    return Levers(
        counts=_counts(inventory, serving),
        criteria=("reconstruction" if inventory.experts <= _FEW else "reap", "expert_norm"),
        schemes=schemes,
        components=components,
        drops=tuple(_drops(inventory, profile)),
        group_size=group_size_for(inventory, serving, [part for parts in components.values() for part in parts]),
    )


def components_of(lever: Lever, inventory: Inventory) -> tuple[Component, ...]:
    """Return the components that a lever's scheme is for, of those that this model has and allows to quantize."""
    present = {part.component for block in inventory.blocks for part in block.parts}
    refused = inventory.architecture.refuses
    return tuple(part for part in COMPONENTS_OF[lever] if part in present and part not in refused)


def _counts(inventory: Inventory, serving: Serving) -> tuple[int, ...]:
    workable = [n for n in workable_counts(inventory, expert_parallel=serving.expert_parallel) if n < inventory.experts]
    if inventory.experts > _FEW:
        wanted = {min(workable, key=lambda n: abs(n - share * inventory.experts)) for share in _SHARES if workable}
        workable = sorted({*wanted, *workable[:1]})
    return tuple(reversed(workable))


def _schemes(inventory: Inventory, profile: Profile) -> dict[Lever, tuple[str, ...]]:
    if "quantize" in inventory.architecture.refuses or inventory.architecture.fused_on_disk:
        return {}
    schemes = _SCHEMES if profile == "custom" else _PORTABLE
    levers: tuple[Lever, ...] = ("experts", "attention", "others")
    return {lever: schemes for lever in levers if components_of(lever, inventory)}


def _drops(inventory: Inventory, profile: Profile) -> list[Drop]:
    refused: Mapping[Refusable, str] = inventory.architecture.refuses
    if len(inventory.droppable) < 2:
        return []
    drops = [] if "block_drop" in refused else [Drop("block", block) for block in inventory.droppable]
    spelling = stock_layer_drop(inventory.architecture, inventory.config)
    if "layer_drop" not in refused and (profile == "custom" or spelling in ("list", "types")):
        drops += [Drop("layer", block) for block in inventory.droppable]
    return drops
