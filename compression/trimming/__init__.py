"""Trimming removes whole experts, MoE layers or blocks and leaves what stays untouched.

Choosing and cutting never share a function. Every module here but ``surgery.py`` chooses: it takes the study of
the untouched model, a step's settings and the cuts decided so far, and returns the cuts that hold from then on.
``surgery.py`` cuts. Ids are those of the source model throughout, so steps compose in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Cuts:
    """What stays of a model, by the source's own indices, ascending."""

    blocks: tuple[int, ...]
    experts: Mapping[int, tuple[int, ...]]
    """Kept expert ids of every kept block that still has its MoE layer; none at all where the layer has lost its router."""
    layers_dropped: frozenset[int] = frozenset()
    """Kept blocks whose MoE layer is gone, with its norm and its shared experts."""
    merged: Mapping[int, Mapping[int, tuple[int, ...]]] = field(default_factory=dict[int, Mapping[int, tuple[int, ...]]])
    """Of blocks whose experts were merged: every kept expert's group, itself included, ascending."""
    skip: Mapping[int, float] = field(default_factory=dict[int, float])
    """Blocks that skip experts at run time, with their beta."""

    def keeping(self, experts: Mapping[int, tuple[int, ...]]) -> Cuts:
        """Return the cuts with these experts; the groups of merged experts go with their centroid."""
        merged = {
            block: {centroid: group for centroid, group in groups.items() if centroid in experts[block]}
            for block, groups in self.merged.items()
            if block in experts
        }
        return replace(self, experts=dict(experts), merged=merged)

    def without(self, blocks: frozenset[int] = frozenset(), *, layers: frozenset[int] = frozenset()) -> Cuts:
        """Return the cuts without these blocks, and without the MoE layers of those others."""
        kept = tuple(block for block in self.blocks if block not in blocks)
        whole = {block: experts for block, experts in self.experts.items() if block not in blocks | layers}
        return Cuts(
            blocks=kept,
            experts=whole,
            layers_dropped=(self.layers_dropped | layers) - blocks,
            merged={block: groups for block, groups in self.merged.items() if block in whole},
            skip={block: beta for block, beta in self.skip.items() if block in whole},
        )


@dataclass(frozen=True)
class Routing:
    """What a family's router is, and what it demands of the experts that stay."""

    experts: int
    """Of a layer of the source."""
    top_k: int
    groups: int = 1
    least_per_group: int = 0
    """Experts that every group must keep in any layer."""
    router: Callable[[int], Any] | None = None
    """Makes the stock router of so many experts, to be asked again about what it would choose among fewer."""


def by_group(among: Sequence[int], experts: int, groups: int) -> list[list[int]]:
    """Return the expert ids ``among``, by the router's groups: equal runs of the layer's ``experts`` ids."""
    per_group = experts // groups
    return [[expert for expert in among if expert // per_group == group] for group in range(groups)]
