"""Who calls: keys of the settings and of the database, remembered for a moment, and how often each may call.

A key that was good is not looked up again for a few seconds, so polling costs one query and not two; a revoked key works
that much longer. Wrong keys are counted per address, and an address that showed many has no more of them looked up.
"""

from __future__ import annotations

import hmac
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from api.errors import Problem
from api.limits import Allowance, RateLimiter
from jobs.database import OpenSession, reading
from jobs.key_rows import KnownKey
from jobs.keys import SCOPES, digest
from jobs.settings import Settings, is_loopback

ANONYMOUS = "anonymous"
"""The one caller of a service without keys; owns all its jobs."""
REMEMBERED_S = 3.0
"""Seconds for which a key that was good counts as good; also how soon a first key closes an open service."""
FAILURES_PER_MINUTE = 60
"""Wrong or missing keys that an address may show."""
_MOST_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what they may do."""

    name: str
    scopes: frozenset[str]


class Callers:
    """The keys of a service, and the count of who came how often."""

    def __init__(self, settings: Settings, open_reader: OpenSession, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._open_reader = open_reader
        self._clock = clock
        self._lock = threading.Lock()
        self._remembered: dict[str, tuple[Caller, float]] = {}
        """Hash of a key of the database -> whose it is, and until when that is taken for true."""
        self._requests = RateLimiter(settings.rate_limit, clock) if settings.rate_limit else None
        self._failures = RateLimiter(FAILURES_PER_MINUTE, clock)
        self.is_open = not settings.api_keys and is_loopback(settings.host)
        """Whether nobody needs a key, as far as is known."""
        self._looked_at = -math.inf

    @property
    def must_look(self) -> bool:
        """Whether it is time to see if the service still has no key."""
        return self.is_open and self._clock() - self._looked_at >= REMEMBERED_S

    def look(self) -> None:
        """See whether there is a key in the database by now. Once there is, the service never opens again."""
        self._looked_at = self._clock()
        try:
            with reading(self._open_reader) as work:
                self.is_open = self.is_open and not work.keys.are_there_any()
        except SQLAlchemyError:  # whatever was asked will meet the same database and say so
            return

    def recall(self, presented: str | None) -> Caller | None:
        """Return who calls, if that takes no look into the database; None when it may take one."""
        if self.is_open:
            return Caller(ANONYMOUS, frozenset(SCOPES))
        if not presented:
            return None
        found: Caller | None = None
        for key in self._settings.api_keys:  # all of them, so that the time says nothing about which one fits
            if key.matches(presented):
                found = Caller(key.name, key.scopes)
        if found is not None:
            return found
        known = self._remembered.get(digest(presented))
        return known[0] if known is not None and known[1] > self._clock() else None

    def identify(self, presented: str | None, address: str) -> Caller:
        """Return who calls, or refuse; looks into the database for a key that is not known yet."""
        caller = self.recall(presented)
        if caller is not None:
            return caller
        if not presented:
            raise self._failed(address, Problem("missing_api_key", "send Authorization: Bearer <key>"))
        sha256 = digest(presented)
        # A key that was good lately is looked up whatever else came from its address, which many may share.
        if sha256 not in self._remembered and self._failures.is_empty(address):
            raise self._failed(address, Problem("invalid_api_key", ""))
        with reading(self._open_reader) as work:
            key = work.keys.find(sha256)
        if key is None:
            with self._lock:
                self._remembered.pop(sha256, None)
            raise self._failed(address, Problem("invalid_api_key", "this API key is not one of this service's"))
        return self._remember(sha256, key)

    def holder(self, sha256: str) -> Caller | None:
        """Return whose key has this hash, if it is valid now. Nothing is remembered: a session ends with its key."""
        for key in self._settings.api_keys:
            if hmac.compare_digest(key.sha256, sha256):
                return Caller(key.name, key.scopes)
        with reading(self._open_reader) as work:
            known = work.keys.find(sha256)
        return None if known is None else Caller(known.owner, known.scopes)

    def count(self, caller: Caller) -> dict[str, str]:
        """Count a request; return the headers that say how many more there may be, or refuse it."""
        if self._requests is None:
            return {}
        allowance = self._requests.take(caller.name)
        headers = _headers(self._requests.per_minute, allowance)
        if not allowance.is_granted:
            raise _limited(f"{self._requests.per_minute} requests per minute are served to a caller", allowance, headers)
        return headers

    def _remember(self, sha256: str, key: KnownKey) -> Caller:
        caller = Caller(key.owner, key.scopes)
        with self._lock:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[sha256] = caller, self._clock() + REMEMBERED_S
        return caller

    def _failed(self, address: str, problem: Problem) -> Problem:
        allowance = self._failures.take(address)
        if allowance.is_granted:
            return problem
        return _limited("too many requests without a valid key came from this address", allowance, {})


def _limited(detail: str, allowance: Allowance, headers: dict[str, str]) -> Problem:
    return Problem("rate_limited", detail, headers={**headers, "Retry-After": str(math.ceil(allowance.wait_s) or 1)})


def _headers(per_minute: int, allowance: Allowance) -> dict[str, str]:
    """Return the draft's fields: the policy, and what is left of it with the seconds until one more."""
    return {
        "RateLimit-Policy": f'"default";q={per_minute};w=60',
        "RateLimit": f'"default";r={allowance.left};t={math.ceil(allowance.wait_s)}',
    }
