"""What one block weighs, lever by lever: bytes that add up to the artifact's, whatever is chosen for each lever.

Only levers change bytes, and no lever those of another, so a block is the sum of its parts; what holds experts, routers
included, is a line in their number. Blocks that are exactly alike share their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from compression.architectures import Component
from compression.planner.inventory import Block, Inventory
from compression.planner.levers import COMPONENTS_OF, Levers
from compression.planner.prices import LEVERS, Lever
from compression.planner.sizes import Cut, moe_layer_bytes, planned_tensors
from compression.recipe import Profile
from compression.request import Serving
from compression.trimming.dense_layers import zero_dense_width

KEEP = "keep"
"""The scheme of weights that stay as they are."""


class Line(NamedTuple):
    """Bytes that grow with the experts kept."""

    fixed: int
    each: int

    def at(self, experts: int) -> int:
        """Return the bytes of so many experts."""
        return self.fixed + self.each * experts


@dataclass(frozen=True)
class Weights:
    """The tensor bytes of a block: of each lever's matrices by scheme, and of the rest.

    Where a block has no matrix that a lever could quantize, the lever's only scheme is None.
    """

    levers: Mapping[Lever, Mapping[str | None, Line]]
    rest: Line
    """Router, norms, biases."""


def weights_of(inventory: Inventory, levers: Levers, block: Block) -> Weights:
    """Return what a block weighs."""
    kept, _, rest = _parts(inventory, levers, block, KEEP)
    names = {scheme for schemes in levers.schemes.values() for scheme in schemes}
    slim = {scheme: _parts(inventory, levers, block, scheme) for scheme in sorted(names)}
    by_lever: dict[Lever, dict[str | None, Line]] = {}
    for lever in LEVERS:
        found: dict[str | None, Line] = {s: slim[s][0][lever] for s in levers.schemes.get(lever, ()) if lever in slim[s][1]}
        by_lever[lever] = {KEEP: kept[lever], **found} if found else {None: kept[lever]}
    return Weights(by_lever, rest)


def layerless(
    inventory: Inventory, levers: Levers, serving: Serving, profile: Profile
) -> Mapping[tuple[str | None, str | None], int]:
    """Return the bytes of a block that lost its MoE layer, by the scheme of its attention and of what stands for the layer.

    For a stock class a dense layer of zeros stands there, stored as the model's dense layers are, where it has any; a scheme
    costs such a layer nothing. Else nothing stands there, and the scheme is None.
    """
    everyone = range(len(inventory.blocks))
    portable = profile == "portable"
    config, parallel = inventory.config, serving.tensor_parallel
    width = zero_dense_width(inventory.architecture, config, everyone, tensor_parallel=parallel) if portable else None
    block = inventory.blocks[inventory.droppable[0]]
    attention = weights_of(inventory, levers, block).levers["attention"]
    has_dense = any(not other.is_mixture for other in inventory.blocks)
    slims = width is not None and has_dense and "dense" in levers.components.get("others", ())
    standing = (KEEP, *levers.schemes["others"]) if slims else (None,)
    return {(a, z): _layerless(inventory, levers, a, z, width) for a in attention for z in standing}


def _layerless(inventory: Inventory, levers: Levers, attention: str | None, standing: str | None, width: int | None) -> int:
    block = inventory.blocks[inventory.droppable[0]]
    wanted: dict[Component, str | None] = {"attention": attention, "dense": standing}
    schemes: dict[Component, str] = {part: scheme for part, scheme in wanted.items() if scheme is not None and scheme != KEEP}
    cut = Cut(1, schemes=schemes, group_size=levers.group_size, zero_dense_width=width)
    whole = sum(tensor.bytes for tensor in planned_tensors(inventory, cut, block))
    return whole - sum(moe_layer_bytes(inventory, cut).values())


def _parts(inventory: Inventory, levers: Levers, block: Block, scheme: str) -> tuple[dict[Lever, Line], set[Lever], Line]:
    """Return the bytes by lever with one scheme for all of them, the levers that slim something here, and all other bytes."""
    lever_of: dict[Component, Lever] = {component: lever for lever in LEVERS for component in COMPONENTS_OF[lever]}
    quantizable: list[Component] = [part for parts in levers.components.values() for part in parts]
    slim: dict[Component, str] = dict.fromkeys(quantizable, scheme)
    totals: list[dict[Lever | None, int]] = []
    touched: set[Lever] = set()
    for experts in (0, 1):
        cut = Cut(experts, schemes={} if scheme == KEEP else slim, group_size=levers.group_size)
        sums: dict[Lever | None, int] = dict.fromkeys((*LEVERS, None), 0)
        for tensor in planned_tensors(inventory, cut, block):
            lever = lever_of.get(tensor.component)
            sums[lever] += tensor.bytes
            if lever is not None and tensor.scheme is not None:
                touched.add(lever)
        totals.append(sums)
    none, one = totals
    lines = {lever: Line(size, one[lever] - size) for lever, size in none.items()}
    return {lever: lines[lever] for lever in LEVERS}, touched, lines[None]
