"""How one attempt ends, whoever ends it: its worker (``attempts.py``) or the upkeep after it (``upkeep.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, case, exists, or_, update
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.moves import move
from jobs.status import JobStatus
from jobs.tables import Document, Job, JobAttempt, JobBlock

_LONGEST_MESSAGE = 4000
"""Characters kept of a failure's message."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an attempt ended early."""

    code: str
    message: str
    retryable: bool

    def as_reason(self) -> Document:
        """Return the contract's ``status_reason``."""
        return {"code": self.code, "message": self.message[:_LONGEST_MESSAGE], "retryable": self.retryable}


@dataclass(frozen=True, slots=True)
class Hold:
    """A worker's hold on a job: valid while the row shows the same fence."""

    job_id: str
    fence: int
    attempt: int
    max_attempts: int


def retry_or_fail(session: Session, hold: Hold, cause: Cause, *where: ColumnElement[bool], backoff_s: float = 0.0) -> Job | None:
    """Queue the job again if the cause may pass and attempts are left; else fail it. None: the hold was no longer valid.

    Attempts are counted that end in a row without leaving a block.
    """
    if cause.retryable:
        counts = or_(_made_a_block(hold), Job.fruitless + 1 < Job.max_attempts)
        queued = _queue_again(session, hold, cause, counts, *where, backoff_s=backoff_s)
        if queued is not None:
            return queued
    reason = _exhausted(hold, cause) if cause.retryable else cause
    return move(
        session,
        hold.job_id,
        JobStatus.RUNNING,
        JobStatus.FAILED,
        Job.fence == hold.fence,
        *where,
        event="job.failed",
        data={"attempt": hold.attempt, **reason.as_reason()},
        status_reason=reason.as_reason(),
    )


def end_attempt(session: Session, hold: Hold, outcome: str, cause: Cause | None = None) -> None:
    """Write down how the attempt ended, once."""
    mine = JobAttempt.job_id == hold.job_id, JobAttempt.fence == hold.fence, JobAttempt.ended_at.is_(None)
    reason = {} if cause is None else {"code": cause.code, "message": cause.message[:_LONGEST_MESSAGE]}
    session.execute(update(JobAttempt).where(*mine).values(ended_at=now(), outcome=outcome, **reason))


def let_go() -> Document:
    """Return the values of a job that goes back to the queue."""
    return {"lease_until": None, "worker": None, "stage": None, "queued_at": now(), "announced_at": now(), "not_before": None}


def _queue_again(session: Session, hold: Hold, cause: Cause, *where: ColumnElement[bool], backoff_s: float) -> Job | None:
    # A job that must wait counts as announced and is not; the upkeep does it again when the time has come.
    waiting: Document = {"not_before": now(backoff_s)} if backoff_s > 0 else {}
    return move(
        session,
        hold.job_id,
        JobStatus.RUNNING,
        JobStatus.QUEUED,
        Job.fence == hold.fence,
        *where,
        event="job.attempt_failed",
        data={"attempt": hold.attempt, **cause.as_reason()},
        attempt=Job.attempt + 1,
        fruitless=case((_made_a_block(hold), 0), else_=Job.fruitless + 1),
        **(let_go() | waiting),
    )


def _made_a_block(hold: Hold) -> ColumnElement[bool]:
    """Say whether the attempt left a block that the next one need not make: then it was not for nothing."""
    return exists().where(JobBlock.job_id == hold.job_id, JobBlock.fence == hold.fence)


def _exhausted(hold: Hold, cause: Cause) -> Cause:
    row = f"{hold.max_attempts} attempts in a row ended early without a finished block"
    message = f"{row}; the last one with {cause.code}: {cause.message}"
    return Cause("attempts_exhausted", message, retryable=False)
