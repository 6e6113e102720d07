"""Where a criterion for dropping experts is known to fail: a table of what was measured, published or here.

A row holds for a range of experts in a layer and from a share dropped on, for some families or for all. What no row names is
not thereby safe: it has not been measured.
"""

from __future__ import annotations

from typing import NamedTuple

FEW_EXPERTS = 16
"""Up to so many in a layer, a model counts as one of few experts; what is known of those is known of eight."""
_MANY_EXPERTS = 64
_ANY = 2**31
_LATENT = ("deepseek_v2", "deepseek_v3")


class Collapse(NamedTuple):
    """One measured failure."""

    criteria: tuple[str, ...]
    least: int
    most: int
    """The experts that a layer has: at least, at most."""
    share: float
    """Of the experts dropped, from which on it holds."""
    fact: str
    instead: str
    families: tuple[str, ...] = ()
    """The ``model_type``s that it holds for; empty: any."""


_SEARCH = "reconstruction, which searches over sets of experts, kept most there"
COLLAPSES: tuple[Collapse, ...] = (
    Collapse(
        ("frequency",), _MANY_EXPERTS, _ANY, 0.0,
        "it ruins generation on models of many experts: with half of them Qwen3-30B-A3B scores .452 on code and .541 by reap, "
        "Qwen3-Coder-480B .010 and .619 (arXiv:2510.13999)",
        "reap keeps far more",
    ),
    Collapse(
        ("reap",), 1, _MANY_EXPERTS, 0.25,
        "Moonlight-16B-A3B keeps 80 % of its GSM8K score without a quarter of its 64 experts and 17 % without half "
        "(llm-compressor's example of REAP)",
        "take fewer bits before fewer experts",
        _LATENT,
    ),
    Collapse(
        ("reap",), 1, FEW_EXPERTS, 0.375,
        "with 5 of 8 experts Mixtral-8x7B scored .031 on GSM8K, and .386 with experts merged (arXiv:2603.02217)",
        "reconstruction, which searches over sets of experts, is made for so few",
    ),
    Collapse(
        ("man", "msan"), 1, FEW_EXPERTS, 0.25,
        "it keeps rare and loud experts: without 2 of 8 a small Mixtral went from perplexity 40.1 to 64.2, and to 40.5 by "
        "reconstruction (docs/experiments.md)",
        _SEARCH,
    ),
    Collapse(
        ("hope", "aimer"), 1, FEW_EXPERTS, 0.5,
        "without 4 of 8 experts a small Mixtral went from perplexity 40.1 to 169.0 by hope and 87.5 by aimer, and to 43.9 by "
        "reconstruction (docs/experiments.md)",
        _SEARCH,
    ),
)  # fmt: skip


def collapse_of(criterion: str, *, experts: int, share: float, model_type: str) -> Collapse | None:
    """Return the first known failure of a criterion on such a model with such a share of its experts dropped."""
    return next(
        (
            row
            for row in COLLAPSES
            if criterion in row.criteria
            and row.least <= experts <= row.most
            and share >= row.share
            and (not row.families or model_type in row.families)
        ),
        None,
    )
