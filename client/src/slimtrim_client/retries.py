"""When to send a request again, and how long to wait before. No clock and no socket here."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from slimtrim_client.messages import TOO_MANY, Answer, Failed

_AGAIN = frozenset({TOO_MANY, 502, 503, 504})
_CONFLICT = 409


@dataclass(frozen=True)
class Patience:
    """How long to go on trying."""

    tries: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 20.0
    longest_asked_s: float = 120.0
    """A service that asks for a longer pause than this is not waited for."""
    lot: Callable[[], float] = field(default=random.random, repr=False)
    """Draws from 0 to 1: many clients that were cut at once must not come back at once."""

    def while_a_job_runs(self) -> Patience:
        """Return more patience: a job of hours outlives a restart of its service."""
        return replace(self, tries=2 * self.tries, longest_wait_s=1.5 * self.longest_wait_s)

    def pause(self, failures: int) -> float:
        """Return the seconds to wait after so many failures in a row: between half and all of a doubling span."""
        span = min(self.first_wait_s * 2 ** min(failures - 1, 30), self.longest_wait_s)
        return span * (0.5 + 0.5 * self.lot())


class Tries:
    """The tries of one request."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.failures = 0

    def next_wait(self, reply: Answer | Failed) -> float | None:
        """Return the seconds after which to try again; None when the reply is to be taken as it is."""
        if not may_be_retried(reply):
            return None
        self.failures += 1
        if self.failures >= self.patience.tries:
            return None
        pause = self.patience.pause(self.failures)
        asked = retry_after(reply) if isinstance(reply, Answer) else None
        if asked is None:
            return pause
        # Spread, never earlier than asked.
        return None if asked > self.patience.longest_asked_s else asked + 0.1 * pause

    def start_again(self) -> None:
        """Forget the failures: something went forward."""
        self.failures = 0


def may_be_retried(reply: Answer | Failed) -> bool:
    """Say whether the same request may succeed in a moment."""
    if isinstance(reply, Failed) or reply.status in _AGAIN:
        return True
    # idempotency_in_flight: the first sending of this very request is still being worked on.
    return reply.status == _CONFLICT and "retry-after" in reply.headers


def retry_after(answer: Answer) -> float | None:
    """Return the seconds that a service asks to be left alone."""
    value = answer.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        when = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
