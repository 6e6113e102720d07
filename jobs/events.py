"""The events of many jobs at once, for whoever watches them; a caller's own page of events is ``repository.py``'s."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from jobs.tables import Job, JobEvent

_AT_ONCE = 500
"""Ids in one query."""


class EventRepository:
    """Reads events. The owner was checked by whoever asks."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def last_of(self, job_ids: Sequence[str]) -> dict[str, int]:
        """Return job -> number of its last event, for those jobs that are not deleted."""
        last: dict[str, int] = {}
        for start in range(0, len(job_ids), _AT_ONCE):
            some = Job.id.in_(job_ids[start : start + _AT_ONCE]) & Job.deleted_at.is_(None)
            last |= {row.id: row.last_seq for row in self._session.execute(select(Job.id, Job.last_seq).where(some))}
        return last

    def after(self, places: Mapping[str, int], *, limit_each: int) -> Generator[JobEvent]:
        """Yield each job's events that come after its number, oldest first, so many at most of each job."""
        jobs = list(places.items())
        for start in range(0, len(jobs), _AT_ONCE):
            some = jobs[start : start + _AT_ONCE]
            ranges = [(JobEvent.job_id == job_id) & JobEvent.seq.between(seq + 1, seq + limit_each) for job_id, seq in some]
            yield from self._session.scalars(select(JobEvent).where(or_(*ranges)).order_by(JobEvent.job_id, JobEvent.seq))
