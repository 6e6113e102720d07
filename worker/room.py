"""What every attempt of one worker shares: the settings, the database, the voice, and the wish to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from compression.planner.sizes import MEMORY_CLASSES
from jobs.database import UnitOfWork, make_engine, reader_maker, require_current_schema, session_maker, unit_of_work
from jobs.queue import Announcer
from jobs.settings import Settings
from worker.leash import Interruption, Leash

_RETRY_S = 0.5
_KEEP_TRYING_S = 60.0
_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Room:
    """One worker process, which works on one job at a time."""

    def __init__(self, settings: Settings, name: str, entry: str, classes: Sequence[str] = tuple(MEMORY_CLASSES)) -> None:
        """``entry``: module:function that the job's child process runs; ``classes``: of the jobs taken, the dearest first."""
        self.settings = settings
        self.name = name
        self.entry = entry
        self.classes = tuple(classes)
        self.is_draining = False
        self.job_id: str | None = None
        """What is worked on at present."""
        self._announcer = Announcer(settings)
        engine = make_engine(settings)
        require_current_schema(engine)
        self._open_session, self.open_reader = session_maker(engine), reader_maker(engine)
        self._leash: Leash | None = None

    def work(self) -> AbstractContextManager[UnitOfWork]:
        """Give one transaction, and announce afterwards."""
        return unit_of_work(self._open_session, self._announcer.announce)

    def persist(self, write: Callable[[UnitOfWork], Answer]) -> Answer:
        """Run one transaction, again and again while the database does not answer; for what must not get lost."""
        end = time.monotonic() + _KEEP_TRYING_S
        while True:
            try:
                with self.work() as work:
                    return write(work)
            except DBAPIError:
                if time.monotonic() > end:
                    raise
                _log.exception("the database does not answer; trying again", extra={"worker": self.name})
                time.sleep(_RETRY_S)

    def attach(self, leash: Leash) -> None:
        """Make the leash the one that ``drain`` pulls."""
        self._leash = leash
        if self.is_draining:
            leash.pull(Interruption.DRAIN)

    def drain(self) -> None:
        """Take no more jobs, and let go of the present one."""
        self.is_draining = True
        if self._leash is not None:
            self._leash.pull(Interruption.DRAIN)
