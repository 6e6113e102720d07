"""Trimming removes whole experts, MoE layers or blocks and leaves what stays untouched.

Choosing and cutting never share a function. Every module here but ``surgery.py`` chooses: it takes the study of
the untouched model, a step's settings and the cuts decided so far, and returns the cuts that hold from then on.
``surgery.py`` cuts. Ids are those of the source model throughout, so steps compose in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
