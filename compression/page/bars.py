"""Bars as inline SVG, in the colours of the page around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from compression.page.axes import ticks

_ACCENT = "var(--artifact, currentColor)"
_COLOURS = {"original": "var(--original, currentColor)", "rounded to nearest": "var(--original, currentColor)"}
_COLOURS["for comparison"] = "var(--other, currentColor)"
"""Of a series by its name; the artifact's is the accent."""
_WIDTH, _LEFT, _RIGHT, _TOP, _HEIGHT, _FOOT = 640, 56, 8, 12, 190, 36


def columns(
    names: Sequence[str], series: Mapping[str, Sequence[float | None]], *, across: str, up: str, write: Callable[[float], str]
) -> Markup:
    """Return upright bars, side by side for each name; None leaves a gap."""
    steps = ticks(0.0, max((value for values in series.values() for value in values if value is not None), default=0.0), 4)
    room = (_WIDTH - _LEFT - _RIGHT) / max(1, len(names))
    thick = room * 0.8 / len(series)
    floor = _HEIGHT - _FOOT

    def y(value: float) -> float:
        return floor - (floor - _TOP) * value / steps[-1]

    parts = [_level(y(step), write(step)) for step in steps]
    for place, (label, values) in enumerate(series.items()):
        for number, value in enumerate(values):
            if value is not None:
                x, told = _LEFT + room * (number + 0.1) + thick * place, f"{across} {names[number]}, {label}: {write(value)}"
                size = f'width="{max(thick, 0.8):.1f}" height="{max(floor - y(value), 0.5):.1f}"'
                bar = f'<rect x="{x:.1f}" y="{y(value):.1f}" {size} fill="{_COLOURS.get(label, _ACCENT)}">'
                parts.append(f"{bar}<title>{escape(told)}</title></rect>")
    every = math.ceil(len(names) / 16)
    for number in range(0, len(names), every):
        middle = _LEFT + room * (number + 0.5)
        parts.append(f'<text x="{middle:.1f}" y="{floor + 15}" text-anchor="middle">{escape(names[number])}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(across)}</text>')
    return _drawn(f"{up} by {across}: {', '.join(series)}", _HEIGHT, parts)


def rows(names: Sequence[str], series: Mapping[str, Sequence[float | None]], *, up: str, write: Callable[[float], str]) -> Markup:
    """Return lying bars with their figures, one below the other for each name."""
    most = max((value for values in series.values() for value in values if value is not None), default=0.0) or 1.0
    wide_all, thick, gap, left, right = 480, 17, 12, 140, 80
    parts, top = list[str](), 6
    for number, name in enumerate(names):
        present = [place for place, values in enumerate(series.values()) if values[number] is not None]
        middle = top + thick * max(1, len(present)) / 2 + 4
        parts.append(f'<text x="{left - 10}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for label, values in series.items():
            value = values[number]
            if value is None:
                continue
            wide, told = (wide_all - left - right) * value / most, f"{name}, {label}: {write(value)}"
            size = f'width="{max(wide, 1):.1f}" height="{thick - 3}" rx="2" fill="{_COLOURS.get(label, _ACCENT)}"'
            parts.append(f'<rect x="{left}" y="{top + 1}" {size}><title>{escape(told)}</title></rect>')
            parts.append(f'<text x="{left + wide + 6:.1f}" y="{top + thick - 5}">{escape(write(value))}</text>')
            top += thick
        top += gap
    return _drawn(f"{up}: {', '.join(series)}", top, parts, width=wide_all)


def _level(y: float, text: str) -> str:
    return (
        f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="currentColor" stroke-opacity=".15"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _drawn(name: str, height: float, parts: Sequence[str], *, width: int = _WIDTH) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}" font-size="12" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )
