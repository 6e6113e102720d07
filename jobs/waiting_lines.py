"""The queues as lines of people: who stands where, how long the first has waited, and how fast it goes.

The number of queries does not grow with the number of jobs; each walks an index, and none reads a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import String, bindparam, func, select
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.status import HELD, JobStatus
from jobs.tables import Job, JobAttempt

_LAST_RUNS = 50
"""Finished jobs of a class whose run times are looked at."""
# Built once: every poll of a job that waits asks this.
_AHEAD = select(func.count()).where(
    Job.memory_class == bindparam("memory_class", type_=String),
    Job.status == JobStatus.QUEUED,
    Job.id < bindparam("job_id", type_=String),
)


@dataclass(slots=True)
class Line:
    """One memory class's queue."""

    queued: int = 0
    running: int = 0
    oldest_since: datetime | None = None
    """When the oldest job of the line came into it, and what the database's clock says now (next field)."""
    asked_at: datetime | None = None
    run_times_s: list[float] = field(default_factory=list[float])
    """Of the attempts that succeeded last, shortest first."""

    @property
    def oldest_wait_s(self) -> float | None:
        """Seconds that the oldest job has waited."""
        if self.oldest_since is None or self.asked_at is None:
            return None
        return max(0.0, (self.asked_at - self.oldest_since).total_seconds())

    def quantile(self, share: float) -> float | None:
        """Return the run time that this share of runs did not exceed, or None when there is none yet."""
        if not self.run_times_s:
            return None
        return self.run_times_s[min(len(self.run_times_s) - 1, int(share * len(self.run_times_s)))]


class QueueRepository:
    """What can be said about waiting."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def places(self, jobs: Iterable[Job]) -> Mapping[str, int]:
        """Return for each job that waits how many stand before it in its class."""
        waiting = [job for job in jobs if job.status == JobStatus.QUEUED]
        if not waiting:
            return {}
        places: dict[str, int] = {}
        for memory_class in {job.memory_class for job in waiting}:
            places |= self._places_in(memory_class, sorted(job.id for job in waiting if job.memory_class == memory_class))
        return places

    def lines(self, classes: Sequence[str]) -> dict[str, Line]:
        """Return how each class stands."""
        lines = {name: Line() for name in classes}
        for name, status, count, oldest_id in self._counts():
            if name in lines and status == JobStatus.QUEUED:
                lines[name].queued = count
                self._date(lines[name], oldest_id)
            elif name in lines:
                lines[name].running += count
        for name, line in lines.items():
            line.run_times_s = sorted(self._run_times(name))
        return lines

    def _places_in(self, memory_class: str, ids: Sequence[str]) -> dict[str, int]:
        """Number the jobs of one class, the oldest first: count those before the first, then walk from it to the last."""
        ahead = self._session.scalar(_AHEAD, {"memory_class": memory_class, "job_id": ids[0]}) or 0
        if len(ids) == 1:
            return {ids[0]: ahead}
        line = Job.memory_class == memory_class, Job.status == JobStatus.QUEUED, Job.id >= ids[0], Job.id <= ids[-1]
        between = self._session.scalars(select(Job.id).where(*line).order_by(Job.id))
        wanted = set(ids)
        return {job_id: ahead + number for number, job_id in enumerate(between) if job_id in wanted}

    def _counts(self):
        active = Job.status.in_((JobStatus.QUEUED, *HELD))
        query = select(Job.memory_class, Job.status, func.count(), func.min(Job.id)).where(active)
        return self._session.execute(query.group_by(Job.memory_class, Job.status)).all()

    def _date(self, line: Line, oldest_id: str) -> None:
        row = self._session.execute(select(Job.queued_at, now()).where(Job.id == oldest_id)).one_or_none()
        if row is not None:
            line.oldest_since, line.asked_at = row

    def _run_times(self, name: str) -> list[float]:
        last = (
            select(Job.id, Job.fence)
            .where(Job.memory_class == name, Job.status == JobStatus.SUCCEEDED)
            .order_by(Job.id.desc())
            .limit(_LAST_RUNS)
            .subquery()
        )
        attempt = (JobAttempt.job_id == last.c.id) & (JobAttempt.fence == last.c.fence)
        query = select(JobAttempt.started_at, JobAttempt.ended_at).join(last, attempt).where(JobAttempt.ended_at.is_not(None))
        return [(ended - started).total_seconds() for started, ended in self._session.execute(query) if ended is not None]
