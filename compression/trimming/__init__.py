"""Trimming removes whole experts or whole blocks and leaves what stays untouched.

Choosing and cutting never share a function. Every module here but ``surgery.py`` chooses: it takes the study of
the untouched model, a step's settings and the cuts decided so far, and returns the cuts that hold from then on.
``surgery.py`` cuts. Ids are those of the source model throughout, so steps compose in any order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cuts:
    """What stays of a model, by the source's own indices, ascending."""

    blocks: tuple[int, ...]
    experts: dict[int, tuple[int, ...]]
    """Kept expert ids of every kept MoE block."""
