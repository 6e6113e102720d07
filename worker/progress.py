"""What a running attempt writes down: the library's events as rows, and the heartbeat that keeps its lease.

The heartbeat is also how an attempt hears of the world: that its job is to be cancelled, that the row is no longer
its own, that its time is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from compression.progress import BlockDone, Event, PlanSettled, StageStarted, Warned, event_from_dict
from jobs.attempts import Claim
from jobs.database import UnitOfWork
from jobs.logs import Fields
from jobs.status import JobStatus
from worker.leash import Interruption, Leash
from worker.room import Room

_COMPUTING = (0.02, 0.97)
"""The part of an attempt's progress that the library's own 0 to 1 is drawn into; fetching is before, storing after."""
_WRITE_EVERY_S = 0.2
_RETRY_S = 1.0


class Heartbeat:
    """A thread that renews the lease until it is told to end, and pulls the leash when it must not go on."""

    def __init__(self, room: Room, claim: Claim, leash: Leash, log: logging.LoggerAdapter[Any]) -> None:
        self._room, self._claim, self._leash, self._log = room, claim, leash, log
        self._end = threading.Event()
        self._deadline = time.monotonic() + claim.max_runtime_s
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = self._room.settings.heartbeat_s
        while not self._end.wait(min(wait_s, max(0.0, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                self._leash.pull(Interruption.OVERTIME)
                self._deadline = float("inf")
            wait_s = self._beat()

    def _beat(self) -> float:
        """Renew once; return the seconds to the next beat."""
        asked_at = time.monotonic()
        lease_s = self._room.settings.lease_s
        try:
            with self._room.work() as work:
                status = work.attempts.renew(self._claim, lease_s)
        except SQLAlchemyError:
            # Keep computing: the lease may still be good, and when it is not, the child stops by itself.
            self._log.exception("lease not renewed")
            return min(_RETRY_S, self._room.settings.heartbeat_s)
        if status is None:
            self._leash.pull(Interruption.LOST)
            return float(threading.TIMEOUT_MAX)
        # From when it was asked, not answered: the child must never believe in more than the row grants.
        self._leash.extend(asked_at + lease_s)
        if status == JobStatus.CANCELLING:
            self._leash.pull(Interruption.CANCEL)
        return self._room.settings.heartbeat_s


class EventWriter:
    """Turns the library's events into rows, under the claim's fence."""

    def __init__(self, room: Room, claim: Claim, leash: Leash, log: Fields) -> None:
        self._room, self._claim, self._leash, self._log = room, claim, leash, log
        self._started = time.monotonic()
        self._written_at = 0.0

    def stage(self, stage: str, fraction: float) -> None:
        """Show a stage of the worker's own."""
        self._write(lambda work: work.attempts.enter_stage(self._claim, stage, fraction))

    def take(self, line: dict[str, Any]) -> None:
        """Write down an event of the library, as it came through the pipe."""
        event: Event = event_from_dict(line)
        match event:
            case StageStarted(stage, fraction):
                self.stage(stage, _overall(fraction))
            case BlockDone():
                self._advance(event)
            case Warned(code, message):
                self._write(lambda work: work.attempts.warn(self._claim, code, message))
            case PlanSettled(plan):
                self._write(lambda work: work.attempts.note_plan(self._claim, plan))

    def _advance(self, event: BlockDone) -> None:
        # A tiny model finishes hundreds of blocks a second; the row need not follow each of them.
        if event.block < event.blocks and time.monotonic() - self._written_at < _WRITE_EVERY_S:
            return
        fraction = _overall(event.fraction)
        progress = {
            "fraction": fraction,
            "block": event.block,
            "blocks": event.blocks,
            "message": event.message,
            "eta_at": self._eta(fraction),
        }
        self._write(lambda work: work.attempts.advance(self._claim, progress))

    def _write(self, write: Callable[[UnitOfWork], bool]) -> None:
        if self._leash.reason is Interruption.LOST:
            return
        try:
            with self._room.work() as work:
                ours = write(work)
        except SQLAlchemyError:  # only for display; the next one may pass
            self._log.exception("event not written")
            return
        self._written_at = time.monotonic()
        if not ours:
            self._leash.pull(Interruption.LOST)

    def _eta(self, fraction: float) -> str:
        spent_s = time.monotonic() - self._started
        end = datetime.now(UTC) + timedelta(seconds=spent_s * (1.0 - fraction) / fraction)
        return end.isoformat(timespec="seconds").replace("+00:00", "Z")


def _overall(fraction: float) -> float:
    first, last = _COMPUTING
    return round(first + (last - first) * fraction, 4)
