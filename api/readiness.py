"""Asks everything that the service depends on at once, and waits for none of it longer than a probe waits for us.

A server that hangs is the common way to be down, and a client library may wait for it for minutes. So each check runs in
a thread of its own; one that is late counts as failed, and is not started again before it has come back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late

from api.schemas import Check

PATIENCE_S = 2.5
_OPTIONAL = frozenset(("broker",))


class Readiness:
    """The checks that are under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Check]] = {}

    def ask(self, checks: Mapping[str, Callable[[], Check]]) -> dict[str, Check]:
        """Return what each check says, at the latest after ``PATIENCE_S``."""
        end = time.monotonic() + PATIENCE_S
        asked = {name: self._begin(name, check) for name, check in checks.items()}
        return {name: _answer(name, future, end - time.monotonic()) for name, future in asked.items()}

    def _begin(self, name: str, check: Callable[[], Check]) -> Future[Check]:
        with self._lock:
            if name in self._under_way:
                return self._under_way[name]
            future = self._under_way[name] = Future[Check]()
        threading.Thread(target=self._run, args=(name, check, future), name=f"check-{name}", daemon=True).start()
        return future

    def _run(self, name: str, check: Callable[[], Check], future: Future[Check]) -> None:
        try:
            answer = check()
        except BaseException as error:
            self._end(name)
            future.set_exception(error)
        else:
            self._end(name)
            future.set_result(answer)

    def _end(self, name: str) -> None:
        with self._lock:
            del self._under_way[name]


def _answer(name: str, future: Future[Check], patience_s: float) -> Check:
    try:
        return future.result(max(0.0, patience_s))
    except Late:
        return Check(ok=False, required=name not in _OPTIONAL, detail=f"did not answer within {PATIENCE_S} seconds")
