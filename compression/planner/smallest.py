"""The fewest bytes that any recipe can leave: what a target is measured against before it is called unreachable.

Fewest experts and blocks in any case; in the custom profile, where layers may keep different counts, one expert in all.
Then either every component takes the scheme that makes it smallest, or, in the custom profile, experts are pruned to the
sparsest pattern that divides their inputs and stored packed. Not both: zeros in quantized weights save nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd

from compression.architectures import Component
from compression.planner.inventory import Inventory
from compression.planner.sizes import FLOAT, QUANTIZABLE, Cut, artifact_sizes, matrices_to_prune
from compression.planner.trims import workable_counts
from compression.recipe import LONGEST_PATTERN, Pattern, Profile
from compression.request import Serving

_SMALLEST_SCHEMES: dict[Profile, tuple[str, ...]] = {"portable": ("W4A16", FLOAT), "custom": ("W2A16", FLOAT)}
"""The fewest bits, and floats for matrices so tiny that the packed shape outweighs what fewer bits save."""


def smallest_cut(inventory: Inventory, serving: Serving, profile: Profile = "portable") -> Cut:
    """Return the cut that leaves the fewest bytes of all that a recipe can ask for."""
    counts = workable_counts(inventory, expert_parallel=serving.expert_parallel) or [inventory.experts]
    refused = inventory.architecture.refuses
    kept = Cut(counts[0], 0 if "block_drop" in refused else len(inventory.droppable) - 1)
    if profile == "custom" and inventory.groups == 1 and serving.expert_parallel == 1:
        mixtures = sum(block.is_mixture for block in inventory.blocks) - kept.blocks_dropped
        kept = replace(kept, experts_dropped=mixtures * kept.experts_kept - 1)
    if inventory.architecture.fused_on_disk:
        return kept
    options = [kept]
    if "quantize" not in refused:
        options.append(_quantized(inventory, kept, profile))
    if profile == "custom":
        options += _pruned(inventory, kept)
    return min(options, key=lambda cut: artifact_sizes(inventory, cut).total)


def _quantized(inventory: Inventory, kept: Cut, profile: Profile) -> Cut:
    """Return the smallest cut with a quantize step: it always takes the experts, even where tiny ones grow by it."""
    before = artifact_sizes(inventory, kept).components
    after = {
        scheme: artifact_sizes(inventory, replace(kept, schemes=dict.fromkeys(QUANTIZABLE, scheme))).components
        for scheme in _SMALLEST_SCHEMES[profile]
    }
    schemes: dict[Component, str] = {}
    for part in QUANTIZABLE:
        if part in inventory.architecture.refuses:
            continue
        best = min(after, key=lambda scheme, part=part: after[scheme][part])
        if part == "experts" or after[best][part] < before[part]:
            schemes[part] = best
    return replace(kept, schemes=schemes)


def _pruned(inventory: Inventory, kept: Cut) -> Iterator[Cut]:
    choices: tuple[frozenset[Component], ...] = (frozenset({"experts"}), frozenset({"experts", "shared_experts"}))
    for pruned in choices[: 1 if "shared_experts" in inventory.architecture.refuses else 2]:
        cut = replace(kept, pruned=pruned)
        common = gcd(*(inputs for _, inputs in matrices_to_prune(inventory, cut)))
        fitting = [length for length in range(2, LONGEST_PATTERN + 1) if common % length == 0]
        if fitting:
            yield replace(cut, pattern=Pattern(1, fitting[-1]))
