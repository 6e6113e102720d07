"""The service's own side of the rows: end what nobody ends, announce what nobody heard.

Each method is one round over at most a few hundred rows; the maintenance loop comes back. A candidate is read first
and then moved by an UPDATE that repeats every condition, so a worker that acts in between wins. On PostgreSQL a
candidate that somebody is about to change is passed over, not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.endings import Cause, Hold, end_attempt, retry_or_fail
from jobs.moves import move
from jobs.repository import KEYS_KEPT_S
from jobs.status import HELD, JobStatus
from jobs.tables import Document, IdempotencyKey, Job, JobAttempt

_ROUND = 200
"""Rows handled in one transaction."""


class UpkeepRepository:
    """What the maintenance loop does with jobs."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def expire_leases(self) -> list[str]:
        """End every attempt whose lease is over; return the jobs that are queued again, to be announced."""
        dead = Job.lease_until < now()
        candidates = self._candidates(Job.status.in_(HELD), dead)
        return [job.id for job in candidates if self._expire_lease(job) == JobStatus.QUEUED]

    def expire_runtimes(self, grace_s: float) -> list[str]:
        """Fail running jobs that are over ``max_runtime_s`` by more than the grace their worker has to do it itself."""
        over = Job.run_deadline < now(-grace_s)
        return [job.id for job in self._candidates(Job.status == JobStatus.RUNNING, over) if self._expire_runtime(job)]

    def expire_queued(self) -> list[str]:
        """Expire jobs that waited longer than ``max_queue_s`` for their first start."""
        late = Job.status == JobStatus.QUEUED, Job.queue_deadline < now()
        query = select(Job.id).where(*late).order_by(Job.queue_deadline).limit(_ROUND).with_for_update(skip_locked=True)
        return [job_id for job_id in self._session.scalars(query).all() if self._expire_queued(job_id)]

    def next_claimable(self, memory_class: str, unclaimed_for_s: float, limit: int) -> Sequence[str]:
        """Return jobs of a class that could be claimed and were not since their last announcement; count this as one.

        Those that were announced longest ago come first, which is the order in which they came; the ids decide a tie.
        """
        of_class = Job.memory_class == memory_class, Job.status == JobStatus.QUEUED
        ready = or_(Job.not_before.is_(None), Job.not_before <= now())
        query = select(Job.id).where(*of_class, Job.announced_at < now(-unclaimed_for_s), ready)
        oldest_call = query.order_by(Job.announced_at, Job.id).limit(limit)
        job_ids = self._session.scalars(oldest_call.with_for_update(skip_locked=True)).all()
        if job_ids:
            self._session.execute(update(Job).where(Job.id.in_(job_ids)).values(announced_at=now()))
        return job_ids

    def forget_keys(self) -> None:
        """Drop idempotency keys that are too old to be replayed."""
        self._session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at <= now(-KEYS_KEPT_S)))

    def log_fields(self, job_ids: Sequence[str]) -> dict[str, Document]:
        """Return what a log line about each job says: its request, and its latest attempt."""
        columns = Job.id, Job.request_id, JobAttempt.attempt, JobAttempt.fence, JobAttempt.worker
        latest = (JobAttempt.job_id == Job.id) & (JobAttempt.fence == Job.fence)
        query = select(*columns).outerjoin(JobAttempt, latest).where(Job.id.in_(job_ids))
        found: dict[str, Document] = {}
        for row in self._session.execute(query).mappings():
            known = {name: row[name] for name in ("request_id", "attempt", "fence", "worker") if row[name] is not None}
            found[row["id"]] = {"job": row["id"], **known}
        return found

    def is_held(self, job_id: str, fence: int) -> bool:
        """Say whether this attempt still holds its job: its scratch and artifact files are in use."""
        query = select(Job.id).where(Job.id == job_id, Job.fence == fence, Job.status.in_(HELD))
        return self._session.scalar(query) is not None

    def is_published(self, job_id: str, prefix: str) -> bool:
        """Say whether this prefix holds the artifact that the job shows."""
        query = select(Job.id).where(Job.id == job_id, Job.artifact_prefix == prefix, Job.deleted_at.is_(None))
        return self._session.scalar(query) is not None

    def _candidates(self, *where: ColumnElement[bool]) -> Sequence[Job]:
        query = select(Job).where(*where).order_by(Job.id).limit(_ROUND).with_for_update(skip_locked=True)
        return self._session.scalars(query).all()

    def _expire_lease(self, job: Job) -> JobStatus | None:
        hold = _hold_of(job)
        dead = Job.lease_until < now()
        lost = Cause("worker_lost", f"worker {job.worker} fell silent for longer than its lease", retryable=True)
        ended = retry_or_fail(self._session, hold, lost, dead)
        if ended is None:
            ended = move(
                self._session, hold.job_id, JobStatus.CANCELLING, JobStatus.CANCELLED, Job.fence == hold.fence, dead,
                event="job.cancelled", stage=None,
            )  # fmt: skip
        if ended is None:
            return None
        end_attempt(self._session, hold, "lost", lost)
        return ended.status

    def _expire_runtime(self, job: Job) -> bool:
        hold = _hold_of(job)
        cause = Cause("max_runtime", f"the attempt ran longer than {job.max_runtime_s} seconds", retryable=False)
        if retry_or_fail(self._session, hold, cause) is None:
            return False
        end_attempt(self._session, hold, "failed", cause)
        return True

    def _expire_queued(self, job_id: str) -> bool:
        late = Job.queue_deadline < now()
        return move(self._session, job_id, JobStatus.QUEUED, JobStatus.EXPIRED, late, event="job.expired") is not None


def _hold_of(job: Job) -> Hold:
    return Hold(job.id, job.fence, job.attempt, job.max_attempts)
