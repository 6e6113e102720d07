"""Plots as inline SVG, in the colour of the text around them; no script, no style sheet, no outside reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 260, 52, 16, 14, 40


def frontier_plot(
    points: Sequence[Mapping[str, Any]], *, chosen: int | None, target_bytes: int | None, original_bytes: int
) -> Markup:
    """Return the plans that could be chosen: bytes across, predicted loss up; with the target, and the one that was chosen."""
    most_bytes = max([original_bytes, *(point["bytes"] for point in points)])
    most_loss = max((point["predicted_loss"] for point in points), default=0.0) or 1.0

    def x(count: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * count / most_bytes, 1)

    def y(loss: float) -> float:
        # The square root: losses span orders of magnitude, and the small ones are those that are chosen.
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * math.sqrt(max(0.0, loss) / most_loss), 1)

    path = " ".join(f"{'L' if number else 'M'}{x(p['bytes'])} {y(p['predicted_loss'])}" for number, p in enumerate(points))
    marks = [f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity=".55" stroke-width="1.5"/>']
    for point in points:
        is_chosen = point["bytes"] == chosen
        told = f"{point['bytes']:,} bytes, {point['predicted_loss']:.4f} nats per token"
        radius, fill = (6, "var(--accent, currentColor)") if is_chosen else (2.5, "currentColor")
        at = f'cx="{x(point["bytes"])}" cy="{y(point["predicted_loss"])}"'
        marks.append(f'<circle {at} r="{radius}" fill="{fill}"><title>{escape(told)}</title></circle>')
    if target_bytes is not None and target_bytes <= most_bytes:
        marks.append(_upright(x(target_bytes), "target"))
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Predicted loss of {len(points)} plans by their size" '
        f'font-size="12" fill="currentColor">{_axes(most_bytes, most_loss, x, y)}{"".join(marks)}</svg>'
    )


def _axes(most_bytes: float, most_loss: float, x: Any, y: Any) -> str:
    foot, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<path d="M{_LEFT} {_TOP}V{foot}H{end}" fill="none" stroke="currentColor" stroke-opacity=".35"/>']
    unit, name = next(((10**e, n) for e, n in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")) if most_bytes >= 10**e), (1, "B"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = f"{share * most_bytes / unit:.3g}"
        parts.append(f'<text x="{x(share * most_bytes)}" y="{foot + 17}" text-anchor="middle">{text}</text>')
        loss = most_loss * share**2
        parts.append(f'<text x="{_LEFT - 6}" y="{y(loss) + 4}" text-anchor="end">{loss:.2g}</text>')
    middle = (_LEFT + end) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{name}; upward: predicted loss, nats per token</text>'
    )
    return "".join(parts)


def _upright(at: float, name: str) -> str:
    side, shift = ("end", -5) if at > _WIDTH / 2 else ("start", 5)
    line = f'<path d="M{at} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="currentColor" stroke-dasharray="5 4"/>'
    return f'{line}<text x="{at + shift}" y="{_TOP + 10}" text-anchor="{side}">{name}</text>'
