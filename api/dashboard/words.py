"""Figures and times as people read them. Sizes are decimal: 1 GB is 10^9 bytes, with GiB beside the exact bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from markupsafe import Markup

_SHORT = 80
_SILENT: tuple[Any, ...] = (None, False, {}, [], (), "keep")
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: int | None) -> str:
    """Return bytes in the decimal unit that leaves one to three digits before the point."""
    if count is None:
        return "–"
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def exact_size(count: int | None) -> str:
    """Return every byte, and how much that is in the binary unit that fits, such as GiB (2^30)."""
    if count is None:
        return "not known"
    unit, name = next(((2**e, name) for e, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if count >= 2**e), (1, "B"))
    return f"{count:,} bytes = {count / unit:,.2f} {name}"


def sized(count: int | None) -> Markup:
    """Return a size with its exact bytes to be seen on asking."""
    return Markup('<span class="n" title="{}">{}</span>').format(exact_size(count), size(count))


def share(value: float | None, digits: int = 1) -> str:
    """Return a fraction in percent."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits behind the point."""
    return "–" if value is None else f"{value:.{digits}f}"


def moment_of(value: str | datetime | None) -> datetime | None:
    """Return a time, whether it was stored as text or not."""
    if value is None or isinstance(value, datetime):
        return value
    return datetime.fromisoformat(value)


def timed(value: str | datetime | None) -> Markup:
    """Return a time in UTC, short to read and exact for programs."""
    time = moment_of(value)
    if time is None:
        return Markup("–")
    utc = time.astimezone(UTC)
    exact, short = utc.isoformat(timespec="seconds").replace("+00:00", "Z"), f"{utc:%d %b %Y, %H:%M} UTC"
    return Markup('<time class="n" datetime="{}" title="{}">{}</time>').format(exact, exact, short)


def span(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    whole = max(0, round(seconds))
    for unit, length, lesser, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length} {unit} {rest} {lesser}" if rest else f"{whole // length} {unit}"
    return f"{whole} s"


def left(value: str | None) -> str | None:
    """Return how long it is until then, when it is not past."""
    time = moment_of(value)
    seconds = 0.0 if time is None else (time - datetime.now(UTC)).total_seconds()
    return f"about {span(seconds)} left" if seconds > 0 else None


def between(start: str | None, end: str | None) -> str | None:
    """Return how long something took."""
    first, last = moment_of(start), moment_of(end)
    return None if first is None or last is None else span((last - first).total_seconds())


def step_words(step: dict[str, Any]) -> str:
    """Return a step as one line: its name, and the settings that say something."""
    return f"{step.get('step', '?')}: " + _settings({name: value for name, value in step.items() if name != "step"})


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items() if value not in _SILENT)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + _settings(cast("dict[str, Any]", value)) + ")"
    return "yes" if value is True else str(value)


def clock(value: str | datetime | None) -> Markup:
    """Return the time of day in UTC, with the date to be seen on asking."""
    time = moment_of(value)
    if time is None:
        return Markup("–")
    utc = time.astimezone(UTC)
    exact = utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Markup('<time class="n" datetime="{}" title="{}">{}</time>').format(exact, exact, f"{utc:%H:%M:%S}")


def told(data: dict[str, Any]) -> str:
    """Return an event's data as one line: its message where it has one, else what is short enough to say."""
    if isinstance(data.get("message"), str):
        code = data.get("code")
        return f"{code}: {data['message']}" if code else data["message"]
    short = (
        f"{name} {value}" for name, value in data.items() if isinstance(value, str | int | float) and len(str(value)) <= _SHORT
    )
    return ", ".join(short)
