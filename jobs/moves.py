"""How a job changes: one UPDATE that names where it comes from, and the event that says so, in one transaction.

There is no read before the write. Two parties that race for the same job both run their UPDATE; the database lets one
find the row in the expected status (and, for a worker, under the expected fence), and the other finds none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, update
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.errors import IllegalMove
from jobs.status import ALLOWED, TERMINAL, JobStatus
from jobs.tables import Job, JobEvent
from jobs.webhooks import note_delivery

Data = dict[str, Any] | Callable[[Job], dict[str, Any]] | None
"""What an event says: known beforehand, or read off the row as it is after the change."""


def move(
    session: Session,
    job_id: str,
    origin: JobStatus,
    target: JobStatus,
    *where: ColumnElement[bool],
    event: str,
    data: Data = None,
    **values: Any,
) -> Job | None:
    """Take the job from one status to another if it is there now; return it as it is after, or None.

    A move that the contract does not know raises ``IllegalMove``: that is a mistake of ours, not a lost race.
    """
    if target not in ALLOWED[origin]:
        raise IllegalMove(f"no job goes from {origin} to {target}")
    if target in TERMINAL:
        values |= {"finished_at": now(), "lease_until": None, "worker": None}
    return change(session, job_id, Job.status == origin, *where, event=event, data=data, status=target, **values)


def change(
    session: Session,
    job_id: str,
    *where: ColumnElement[bool],
    event: str | None = None,
    data: Data = None,
    **values: Any,
) -> Job | None:
    """Update the job if the conditions hold, with an event if one is named; return it as it is after, or None."""
    if event is not None:
        values["last_seq"] = Job.last_seq + 1
    statement = (
        update(Job)
        .where(Job.id == job_id, *where)
        .values(version=Job.version + 1, **values)
        .returning(Job)
        .execution_options(populate_existing=True, synchronize_session=False)
    )
    job = session.scalars(statement).one_or_none()
    if job is not None and event is not None:
        said = data(job) if callable(data) else data
        record_event(session, job, event, said or {})
    return job


def record_event(session: Session, job: Job, event: str, data: dict[str, Any]) -> None:
    """Write an event under the number that the row has now, and the delivery of it that the job's webhook asks for."""
    row = JobEvent(job_id=job.id, seq=job.last_seq, type=event, data=data)
    session.add(row)
    session.flush()
    note_delivery(session, job, row)
