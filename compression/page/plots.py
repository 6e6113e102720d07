"""Size against quality, as inline SVG that needs no script.

Colours are custom properties of the page around (``--original``, ``--artifact``, ``--other``) with a fallback, and the text's own
colour otherwise, so dark and light both work. Every plot has a title and a description, and its numbers in a table behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from markupsafe import Markup

from compression.page.axes import bytes_scale, in_bytes, short, ticks

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 20, 48

Kind = Literal["original", "artifact", "other"]


class Point(Protocol):
    """A plan, or a model, of so many bytes."""

    @property
    def bytes(self) -> int:
        """Of its tensors, as ``target_memory`` bounds them."""
        ...

    @property
    def predicted_loss(self) -> float:
        """In nats per token."""
        ...


@dataclass(frozen=True, slots=True)
class Mark:
    """A named point of a plot."""

    name: str
    bytes: int
    loss: float
    kind: Kind


def frontier_plot(
    points: Sequence[Point],
    *,
    chosen: tuple[int, float] | None,
    target_bytes: int | None,
    original_bytes: int | None,
) -> Markup:
    """Return size against quality: every plan that could have been chosen, and the one that was."""
    marks = [] if chosen is None else [Mark("chosen plan", *chosen, "artifact")]
    if original_bytes is not None:
        marks.append(Mark("original", original_bytes, 0.0, "original"))
    line = [(point.bytes, point.predicted_loss) for point in points]
    what = "Predicted loss in nats per token against bytes, for every plan on the frontier. Lower and further left is better."
    return _scatter("Size against quality", what, "predicted loss, nats per token", line, marks, target_bytes)


def measured_plot(marks: Sequence[Mark], *, target_bytes: int | None) -> Markup:
    """Return measured loss against bytes of a few models that were really made."""
    what = "Measured loss in nats per token on held-out text against bytes of tensors. Lower and further left is better."
    return _scatter("Size against quality", what, "measured loss, nats per token", [], marks, target_bytes)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where on the drawing a number lies."""

    x: Sequence[float]
    y: Sequence[float]

    def across(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[-1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y[0]) / (self.y[-1] - self.y[0]) * (_HEIGHT - _TOP - _BOTTOM)


def _scatter(
    title: str, what: str, unit: str, line: Sequence[tuple[int, float]], marks: Sequence[Mark], target: int | None
) -> Markup:
    everything = [*line, *((mark.bytes, mark.loss) for mark in marks)]
    if not everything:
        return Markup("")
    sizes = [*(size for size, _ in everything), *([] if target is None else [target])]
    divisor, of_bytes = bytes_scale(max(sizes))
    losses = [loss for _, loss in everything]
    low = 0.0 if line else min(losses) - 0.1 * (max(losses) - min(losses))
    frame = _Frame([tick * divisor for tick in ticks(0, max(sizes) / divisor)], ticks(low, max(losses)))
    inside = [*_grid(frame, divisor, of_bytes, unit), *_target(frame, target), *_line(frame, line), *_marks(frame, marks)]
    table = [*((mark.name, mark.bytes, mark.loss) for mark in marks), *(("frontier", *point) for point in line)]
    return Markup(
        '<figure class="plot"><svg viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>{}</figure>'
    ).format(_WIDTH, _HEIGHT, title, what, Markup("").join(inside), _numbers(unit, table))


def _grid(frame: _Frame, divisor: float, of_bytes: str, unit: str) -> Iterable[Markup]:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    label = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" font-size="12" fill="currentColor" opacity=".75">{}</text>')
    rule = Markup('<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}" stroke="currentColor" opacity=".12"/>')
    for tick in frame.y:
        yield rule.format(_LEFT, frame.up(tick), right, frame.up(tick))
        yield label.format(_LEFT - 8, frame.up(tick) + 4, "end", short(tick))
    for tick in frame.x:
        yield rule.format(frame.across(tick), _TOP, frame.across(tick), floor)
        yield label.format(frame.across(tick), floor + 18, "middle", short(tick / divisor))
    yield label.format(right, floor + 38, "end", of_bytes)
    yield label.format(_LEFT, 12, "start", unit)


def _target(frame: _Frame, target: int | None) -> Iterable[Markup]:
    if target is not None:
        x = frame.across(target)
        yield Markup('<path d="M{:.1f} {}V{}" stroke="currentColor" stroke-dasharray="4 4" opacity=".6"/>').format(
            x, _TOP, _HEIGHT - _BOTTOM
        )
        yield Markup('<text x="{:.1f}" y="{}" font-size="12" fill="currentColor" text-anchor="{}">target</text>').format(
            x + (-6 if x > _WIDTH - 120 else 6), _TOP + 12, "end" if x > _WIDTH - 120 else "start"
        )


def _line(frame: _Frame, line: Sequence[tuple[int, float]]) -> Iterable[Markup]:
    if not line:
        return
    path = " ".join(f"{frame.across(size):.1f},{frame.up(loss):.1f}" for size, loss in sorted(line))
    yield Markup('<polyline points="{}" fill="none" stroke="var(--other, #888)" stroke-width="2"/>').format(path)
    for size, loss in line:
        yield Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="var(--other, #888)"><title>{}: {}</title></circle>').format(
            frame.across(size), frame.up(loss), in_bytes(size), short(loss)
        )


def _marks(frame: _Frame, marks: Sequence[Mark]) -> Iterable[Markup]:
    fallback = {"original": "#5b7083", "artifact": "#c2571a", "other": "#888"}
    for mark in marks:
        x, y, left = frame.across(mark.bytes), frame.up(mark.loss), frame.across(mark.bytes) > _WIDTH / 2
        yield Markup(
            '<circle cx="{:.1f}" cy="{:.1f}" r="7" fill="var(--{}, {})"><title>{}: {}, {}</title></circle>'
            '<text x="{:.1f}" y="{:.1f}" font-size="13" fill="currentColor" text-anchor="{}">{}</text>'
        ).format(
            x, y, mark.kind, fallback[mark.kind], mark.name, in_bytes(mark.bytes), short(mark.loss),
            x + (-12 if left else 12), y - 8, "end" if left else "start", mark.name,
        )  # fmt: skip


def _numbers(unit: str, rows: Iterable[tuple[str, int, float]]) -> Markup:
    cells = Markup("").join(
        Markup('<tr><th scope="row">{}</th><td>{:,}</td><td>{}</td></tr>').format(name, size, short(loss))
        for name, size, loss in rows
    )
    return Markup(
        '<details><summary>Numbers</summary><table><thead><tr><th scope="col">point</th><th scope="col">bytes</th>'
        '<th scope="col">{}</th></tr></thead><tbody>{}</tbody></table></details>'
    ).format(unit, cells)
