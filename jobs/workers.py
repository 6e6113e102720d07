"""The workers' own rows: who was alive lately, which jobs each takes, and what it works on.

A row decides nothing: a job is held by its lease alone. The rows are read to say what a queued job waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.tables import Worker

ALIVE_S = 60.0
"""A worker that said nothing for longer counts as gone."""
REMEMBERED_S = 86_400.0
"""Seconds for which the row of a worker that is gone is kept, so that callers hear when there last was one."""


# Built once: every poll of a job that waits asks this.
_PRESENT = select(Worker.classes, Worker.last_seen > now(-ALIVE_S), Worker.job_id, Worker.last_seen)


class Present(NamedTuple):
    """A worker as its row shows it."""

    classes: tuple[str, ...]
    is_alive: bool
    is_busy: bool
    last_seen: datetime


class WorkerRepository:
    """What workers say of themselves, and what that amounts to."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def say(self, name: str, classes: Iterable[str], device: str, job_id: str | None) -> None:
        """Note that the worker is alive, and what it works on; a row that was forgotten is made again."""
        seen = update(Worker).where(Worker.name == name).values(last_seen=now(), job_id=job_id).returning(Worker.name)
        if self._session.scalar(seen.execution_options(synchronize_session=False)) is None:
            self._session.add(Worker(name=name, classes={"classes": list(classes)}, device=device, job_id=job_id))
            self._session.flush()

    def leave(self, name: str) -> None:
        """Remove the row of a worker that ends."""
        self._session.execute(delete(Worker).where(Worker.name == name))

    def forget_silent(self) -> None:
        """Remove the rows of workers that nobody has heard of for a day."""
        self._session.execute(delete(Worker).where(Worker.last_seen < now(-REMEMBERED_S)))

    def all(self) -> Sequence[Present]:
        """Return every worker whose row is there."""
        rows = self._session.execute(_PRESENT).all()
        return [Present(tuple(classes["classes"]), bool(alive), job_id is not None, at) for classes, alive, job_id, at in rows]
