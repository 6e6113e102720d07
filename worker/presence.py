"""The worker's own row: that it is alive, which jobs it takes, and which one it has. For people to see; nothing hangs on it."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from worker.room import Room

_OFTEN_S = 15.0
"""Seconds between two signs of life at most; ``jobs.workers.ALIVE_S`` is several of them."""
_LOOK_EVERY_S = 0.5
"""A job that begins or ends is told this late."""
_LAST_WORD_S = 5.0
_log = logging.getLogger(__name__)


class Presence:
    """A thread that writes the row now and then, and when the job changes; the row goes when the worker does."""

    def __init__(self, room: Room, device: str) -> None:
        self._room, self._device = room, device
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(_LAST_WORD_S)  # a database that hangs must not keep the worker from ending

    def _run(self) -> None:
        every_s = min(self._room.settings.heartbeat_s, _OFTEN_S)
        said, waited_s = object(), 0.0
        while True:
            job_id = self._room.job_id
            if job_id != said or waited_s >= every_s:
                said, waited_s = job_id, 0.0
                self._say(job_id)
            if self._end.wait(_LOOK_EVERY_S):
                break
            waited_s += _LOOK_EVERY_S
        try:
            with self._room.work() as work:
                work.workers.leave(self._room.name)
        except SQLAlchemyError:
            _log.warning("the worker's row stays until the upkeep removes it", extra={"worker": self._room.name})

    def _say(self, job_id: str | None) -> None:
        try:
            with self._room.work() as work:
                work.workers.say(self._room.name, self._room.classes, self._device, job_id)
        except SQLAlchemyError:
            _log.warning("the worker's row could not be written", extra={"worker": self._room.name})
