"""What ties a running attempt to its row: how long the lease is good, and whether the attempt must end early.

The heartbeat and the signal handlers pull on it from their threads; the thread that waits for a child process feels it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import StrEnum


class Interruption(StrEnum):
    """Why an attempt ends before its work is done."""

    LOST = "lost"
    """The row is no longer ours: stop at once and leave no trace."""
    CANCEL = "cancel"
    DRAIN = "drain"
    """The worker was told to stop; the job goes back to the queue."""
    OVERTIME = "overtime"


class Interrupted(Exception):
    """The attempt ends early."""

    def __init__(self, reason: Interruption) -> None:
        super().__init__(reason)
        self.reason = reason


Receiver = Callable[["Interruption | float"], None]


class Leash:
    """``good_until`` is on this machine's monotonic clock, which all its processes share."""

    def __init__(self, good_until: float) -> None:
        self.good_until = good_until
        self.reason: Interruption | None = None
        self._receive: Receiver | None = None
        self._lock = threading.Lock()

    def extend(self, good_until: float) -> None:
        """Note that the lease was renewed."""
        with self._lock:
            self.good_until = good_until
            self._pass_on(good_until)

    def pull(self, reason: Interruption) -> None:
        """End the attempt. The first reason stands, except that a lost row overrides every other."""
        with self._lock:
            if self.reason is None or reason is Interruption.LOST:
                self.reason = reason
                self._pass_on(reason)

    def check(self) -> None:
        """Raise ``Interrupted`` if the attempt must end."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    @contextmanager
    def held_by(self, receive: Receiver) -> Generator[None]:
        """Pass every pull and every renewal on to ``receive``, starting with how things stand."""
        with self._lock:
            self._receive = receive
            self._pass_on(self.good_until if self.reason is None else self.reason)
        try:
            yield
        finally:
            with self._lock:
                self._receive = None

    def _pass_on(self, item: Interruption | float) -> None:
        if self._receive is not None:
            self._receive(item)
