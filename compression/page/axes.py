"""Axes: ticks at round numbers, and numbers as people read them."""

from __future__ import annotations

import math

_BYTES = ("bytes", "kB", "MB", "GB", "TB", "PB")


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) that cover low to high."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def in_bytes(value: float, digits: int = 2) -> str:
    """Return a size with its unit, powers of 1000: ``43.06 MB``."""
    power = 0 if abs(value) < 1000 else min(int(math.log10(abs(value)) // 3), len(_BYTES) - 1)
    if power == 0:
        return f"{value:,.0f} bytes"
    return f"{value / 1000**power:.{digits}f} {_BYTES[power]}"


def short(value: float) -> str:
    """Return a number with four digits that matter, without a trailing zero."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def bytes_scale(high: float) -> tuple[float, str]:
    """Return by what an axis of sizes divides, and the unit that it then has."""
    power = 0 if high < 1000 else min(int(math.log10(high) // 3), len(_BYTES) - 1)
    return 1000.0**power, _BYTES[power]
