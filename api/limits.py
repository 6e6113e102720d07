"""How often one may call: a bucket of tokens per name, filled at a steady rate. Kept in this process's memory.

Several API processes count apart, so a caller may reach the limit in each of them; what it guards is the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_MOST_NAMES = 10_000
"""Buckets that are kept; beyond it those are let go that are full again, which lose nothing."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What came of asking for one more."""

    is_granted: bool
    left: int
    wait_s: float
    """Seconds until there is one more."""


class RateLimiter:
    """At most ``per_minute`` in the long run, and as many at once after a minute's rest."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}
        """Name -> tokens at a time, and that time."""

    def take(self, name: str) -> Allowance:
        """Take a token if there is one."""
        with self._lock:
            tokens = self._tokens(name)
            granted = tokens >= 1.0
            if granted:
                tokens -= 1.0
            self._keep(name, tokens)
        wait_s = 0.0 if tokens >= 1.0 else (1.0 - tokens) * 60.0 / self.per_minute
        return Allowance(granted, int(tokens), wait_s)

    def is_empty(self, name: str) -> bool:
        """Say whether nothing is left, without taking anything."""
        with self._lock:
            return self._tokens(name) < 1.0

    def _tokens(self, name: str) -> float:
        tokens, at = self._buckets.get(name, (float(self.per_minute), self._clock()))
        return min(float(self.per_minute), tokens + (self._clock() - at) * self.per_minute / 60.0)

    def _keep(self, name: str, tokens: float) -> None:
        if name not in self._buckets and len(self._buckets) >= _MOST_NAMES:
            self._let_go()
        self._buckets[name] = tokens, self._clock()

    def _let_go(self) -> None:
        full = [name for name in self._buckets if self._tokens(name) >= self.per_minute - 0.5]
        # When all of them are in use, the oldest half goes: memory is bounded before anything else.
        for name in full or list(self._buckets)[: _MOST_NAMES // 2]:
            del self._buckets[name]
