"""The request headers that change an answer: Accept, Prefer, Range, the conditions, Idempotency-Key,
Last-Event-ID.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers

from api.errors import Problem

LONGEST_WAIT_S = 60
_VISIBLE = re.compile(r"[!-~]{1,255}")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?(?=$|[,;\s])", re.IGNORECASE)


def require_accept(headers: Headers, offered: str) -> None:
    """Refuse a request that does not accept what is offered."""
    preferred(headers, offered)


def preferred(headers: Headers, *offered: str) -> str:
    """Return which of the forms is accepted most, the first one when it does not matter; refuse when none is."""
    accepted = _accepted(", ".join(headers.getlist("accept")))
    if not accepted:
        return offered[0]
    best = max(offered, key=lambda kind: _quality_of(accepted, kind))
    if _quality_of(accepted, best) <= 0.0:
        raise Problem("not_acceptable", f"this answer is {' or '.join(offered)} and nothing else")
    return best


def last_event_id_of(headers: Headers) -> int | None:
    """Return the number of the event that the client saw last; None without one."""
    values = headers.getlist("last-event-id")
    if not values or values == [""]:
        return None
    if len(values) > 1 or not values[0].isascii() or not values[0].isdecimal() or len(values[0]) > 15:
        raise Problem("invalid_header", f"Last-Event-ID is the id of an event, a number, not {values[0][:100]!r}")
    return int(values[0])


def wait_of(headers: Headers) -> int | None:
    """Return the seconds that ``Prefer: wait=N`` asks for, 60 at most; None without it. Other preferences are ignored."""
    match = _WAIT.search(", ".join(headers.getlist("prefer")))
    return None if match is None else min(int(match[1]), LONGEST_WAIT_S)


def idempotency_key_of(headers: Headers) -> str | None:
    """Return the ``Idempotency-Key``, bare or as a quoted string; None without one."""
    values = headers.getlist("idempotency-key")
    if not values:
        return None
    key = values[0]
    if len(key) > 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if len(values) > 1 or not _VISIBLE.fullmatch(key):
        raise Problem("invalid_header", "Idempotency-Key must be given once, with 1 to 255 visible ASCII characters")
    return key


def is_key(text: str) -> bool:
    """Say whether the text can be an ``Idempotency-Key``."""
    return _VISIBLE.fullmatch(text) is not None


def names_tag(header: str | None, tag: str, *, weakly: bool) -> bool:
    """Say whether an If-Match or If-None-Match header names the tag; a weak tag never matches strongly (RFC 9110, 8.8.3)."""
    if header is None:
        return False
    named = [part.strip() for part in header.split(",")]
    if "*" in named:
        return True
    if weakly:
        return tag.removeprefix("W/") in [part.removeprefix("W/") for part in named]
    return not tag.startswith("W/") and tag in named


def range_of(headers: Headers, size: int, tag: str) -> tuple[int, int] | None:
    """Return the bytes ``start <= i < stop`` that are asked for; None for the whole file.

    What is not one range of bytes is ignored, as RFC 9110 14.2 allows. ``If-Range`` with another tag means: whole.
    """
    match = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if match is None or (headers.get("if-range") is not None and headers["if-range"] != tag):
        return None
    first, last = match[1][:20], match[2][:20]
    if not first and not last:
        return None
    if first and last and int(first) > int(last):
        return None
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size or (not first and int(last) == 0):
        raise Problem(
            "range_not_satisfiable", f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}", "ETag": tag}
        )
    return start, stop


def _accepted(header: str) -> dict[str, float]:
    """Return media range -> quality."""
    accepted: dict[str, float] = {}
    for part in header.split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        if kind:
            accepted[kind.lower()] = _quality(parameters)
    return accepted


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _quality_of(accepted: dict[str, float], offered: str) -> float:
    """Return the quality of the most specific range that covers what is offered."""
    family = offered.partition("/")[0]
    return next((accepted[kind] for kind in (offered, f"{family}/*", "*/*") if kind in accepted), 0.0)
