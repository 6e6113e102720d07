"""A number on the page and the number in the JSON are one: every figure is asked for by its path and written by one rule.

The page marks each with ``data-from`` (the path) and ``data-as`` (the rule), so that a reader, or a test, can go back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from compression.page.axes import in_bytes

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def resolve(data: Any, path: str) -> Any:
    """Return what a path such as ``quality.domains[0].retention`` leads to; None where it ends early at what was not measured.

    Raises KeyError for a name that is not in the data: a mistyped path must not look like a missing measurement.
    """
    for name, place in _STEP.findall(path):
        if data is None:
            return None
        data = data[name] if name else data[int(place)]
    return data


def in_seconds(seconds: float) -> str:
    """Return a time with its unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


RULES: dict[str, Callable[[Any], str]] = {
    "bytes": in_bytes,
    "seconds": in_seconds,
    "count": lambda value: f"{value:,}",
    "percent": lambda value: f"{value:.1%}",
    "small percent": lambda value: f"{value:.3%}",
    "times": lambda value: f"{value:.2f}×",
    "perplexity": lambda value: f"{value:.2f}" if value < 1e5 else f"{value:.3g}",
    "nats": lambda value: f"{value:.4f}",
    "score": lambda value: f"{value:.3f}",
    "rate": lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
    "difference": lambda value: f"{value:.3g}",
    "text": str,
}
"""How each kind of figure is written."""


class Figures:
    """The data of one page, and how its figures are written."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def __call__(self, path: str, rule: str) -> Markup:
        """Return a figure, its path and rule beside it; a dash for what was not measured."""
        value = resolve(self.data, path)
        if value is None:
            return Markup('<span class="none" title="not measured">–</span>')
        exact = f"{value:,} bytes" if rule == "bytes" else str(value)
        told = Markup('<data data-from="{}" data-as="{}" title="{}" value="{}">{}</data>')
        return told.format(path, rule, exact, value, RULES[rule](value))
