"""The callers' side of the rows: create, read, list, cancel, delete. Each call is part of one transaction.

Every query names the owner; another caller's job is not found. The workers' side is ``attempts.py``, the service's own
upkeep is ``upkeep.py``; all three change a job through ``moves.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BindParameter, Select, String, bindparam, delete, func, select
from sqlalchemy.orm import Session, undefer

from jobs.clock import now
from jobs.errors import IdempotencyKeyReused, JobActive, JobFinished, JobNotFound, QueueFull
from jobs.moves import change, move, record_event
from jobs.overview import Overview, OverviewPage, overview_of, overviews
from jobs.status import TERMINAL, JobStatus
from jobs.tables import Document, IdempotencyKey, Job, JobAttempt, JobEvent, JobLabel, WebhookDelivery, new_job_id

_SPECIFICATION = (
    "owner", "model", "request", "resolved", "plan", "spec_hash", "labels", "memory_class", "max_attempts", "max_runtime_s",
    "max_queue_s", "fingerprint",
)  # fmt: skip
"""What a job is to do, within which limits, and where its finished blocks are; apart from what became of it."""
KEYS_KEPT_S = 7 * 86_400
"""Seconds for which an idempotency key is remembered."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's key for one POST, kept hashed, and the fingerprint of what was posted."""

    owner: str
    method: str
    path: str
    key: str
    fingerprint: str

    @property
    def key_hash(self) -> str:
        """The form in which the key is kept."""
        return hashlib.sha256(self.key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Added:
    """The job that a POST made, or that an earlier POST with the same key had made."""

    job: Job
    replayed: bool


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What a list is narrowed to. Empty means everything."""

    statuses: Iterable[JobStatus] = ()
    model: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, newest first, and the cursor that continues after the last."""

    jobs: Sequence[Job]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class CancelOutcome:
    """The job after a wish to cancel, and whether the wish took effect (now or earlier) or came too late."""

    job: Job
    took_effect: bool


class JobRepository:
    """What callers do with jobs."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, job: Job, idempotency: Idempotency | None = None, *, queue_limit: int | None = None) -> Added:
        """Record a job as queued, or return the one that the same key made before; ``QueueFull`` if too many wait.

        Key, job and first event are one transaction: a POST that failed has stored nothing, and its retry is simply
        a first try. The caller puts ``added.job.id`` into the outbox unless it was replayed.
        """
        self._one_at_a_time(job.owner)
        if idempotency is not None and (earlier := self.replay(idempotency)) is not None:
            return Added(earlier, replayed=True)
        if queue_limit is not None:
            self._check_room(job.owner, queue_limit)
        job.id = job.id or new_job_id()
        job.queue_deadline = now(job.max_queue_s if job.max_queue_s is not None else 604_800)  # pyright: ignore
        job.last_seq = 1
        self._session.add(job)
        self._session.flush()
        self._session.refresh(job)
        record_event(self._session, job, "job.created", {})
        self._session.add_all(JobLabel(job_id=job.id, name=name, value=value) for name, value in job.labels.items())
        if idempotency is not None:
            self._remember(idempotency, job.id)
        self._session.flush()
        return Added(job, replayed=False)

    def replay(self, idempotency: Idempotency) -> Job | None:
        """Return the job that this key made before, if any; raise ``IdempotencyKeyReused`` if the body was another."""
        row = self._session.scalars(
            select(IdempotencyKey).where(*_same_key(idempotency), IdempotencyKey.created_at > now(-KEYS_KEPT_S))
        ).one_or_none()
        if row is None:
            return None
        if row.fingerprint != idempotency.fingerprint:
            raise IdempotencyKeyReused("this Idempotency-Key came before with another body; use a fresh key for a new request")
        return self.get(idempotency.owner, row.job_id)

    def again(self, owner: str, job_id: str) -> Job:
        """Return a new job, not recorded yet, that does what a failed, cancelled or expired one was to do."""
        old = self.get(owner, job_id)
        if not old.is_over:
            raise JobActive(f"job {job_id} is {old.status}; only a job that has ended is tried again")
        if old.status == JobStatus.SUCCEEDED:
            raise JobFinished(f"job {job_id} has succeeded; create a new job to do the same once more")
        return Job(retry_of=old.id, **{name: getattr(old, name) for name in _SPECIFICATION})

    def get(self, owner: str, job_id: str) -> Job:
        """Return the owner's job, or raise ``JobNotFound``."""
        return _found(self._session.scalars(_ONE, {"owner": owner, "job_id": job_id}).one_or_none(), job_id)

    def list(self, owner: str, only: JobFilter = JobFilter(), limit: int = 20, *, after: str | None = None) -> Page:
        """Return jobs, newest first, older than the cursor. New jobs never shift a later page."""
        rows = self._session.scalars(_narrowed(select(Job), owner, only, after).limit(limit + 1)).all()
        return Page(rows[:limit], rows[limit - 1].id if len(rows) > limit else None)

    def overview(self, owner: str, only: JobFilter = JobFilter(), limit: int = 20, *, after: str | None = None) -> OverviewPage:
        """Return the same jobs as ``list``, each with what a row shows and without its documents."""
        rows = self._session.execute(_narrowed(overviews(), owner, only, after).limit(limit + 1)).all()
        return OverviewPage([overview_of(row) for row in rows[:limit]], rows[limit - 1].id if len(rows) > limit else None)

    def glance(self, owner: str, job_ids: Sequence[str]) -> Sequence[Overview]:
        """Return those of the jobs that are the owner's, as a list shows them."""
        rows = self._session.execute(overviews().where(*_visible(owner), Job.id.in_(job_ids))).all()
        return [overview_of(row) for row in rows]

    def version(self, owner: str, job_id: str) -> int:
        """Return the number that grows with every visible change, or raise ``JobNotFound``."""
        found = self._session.scalar(select(Job.version).where(*_visible(owner), Job.id == job_id))
        if found is None:
            raise JobNotFound(f"there is no job {job_id!r}")
        return found

    def events(self, owner: str, job_id: str, *, after: int = 0, limit: int = 100) -> Sequence[JobEvent]:
        """Return the job's events that come after a number, oldest first."""
        self.get(owner, job_id)
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after).order_by(JobEvent.seq).limit(limit)
        return self._session.scalars(query).all()

    def attempts(self, owner: str, job_id: str) -> Sequence[JobAttempt]:
        """Return the job's attempts, first one first."""
        self.get(owner, job_id)
        return self._session.scalars(select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.fence)).all()

    def report(self, owner: str, job_id: str) -> Document | None:
        """Return what did happen, or None while the job has not succeeded."""
        return self._with_documents(owner, job_id).report

    def manifest(self, owner: str, job_id: str) -> Document | None:
        """Return the artifact's files, or None while there is no artifact."""
        return self._with_documents(owner, job_id).manifest

    def request_cancel(self, owner: str, job_id: str) -> CancelOutcome:
        """Cancel a queued job at once, ask a running one's worker to stop, leave a finished one alone."""
        job = self.get(owner, job_id)
        while not job.is_over and job.status != JobStatus.CANCELLING:
            cancelled = self._cancel_queued(job_id) or self._cancel_running(job_id)
            # Neither found it where it was: it moved in between, so look again.
            job = cancelled or _found(self._session.get(Job, job_id, populate_existing=True), job_id)
        return CancelOutcome(job, took_effect=job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED))

    def delete(self, owner: str, job_id: str) -> str | None:
        """Turn a finished job into a tombstone and return its artifact's prefix, or raise ``JobActive``.

        The artifact's files are for the caller to remove after the commit; were that lost, the upkeep finds them.
        """
        job = self.get(owner, job_id)
        prefix = job.artifact_prefix
        emptied: Document = {
            **dict.fromkeys(("plan", "result", "report", "manifest", "artifact_prefix")),
            "request": {},
            "labels": {},
            "deleted_at": now(),
        }
        gone = change(self._session, job_id, Job.status.in_(TERMINAL), Job.deleted_at.is_(None), **emptied)
        if gone is None:
            raise JobActive(f"job {job_id} is {job.status}; cancel it and wait for its end before deleting it")
        for table in (JobEvent, JobLabel):
            self._session.execute(delete(table).where(table.job_id == job_id))
        # What is still to be told is told: it was promised when the event happened.
        told = WebhookDelivery.job_id == job_id, WebhookDelivery.state != "pending"
        self._session.execute(delete(WebhookDelivery).where(*told))
        return prefix

    def _one_at_a_time(self, owner: str) -> None:
        # SQLite has one writer. PostgreSQL has many, and two could miss each other's key, or count the same last place.
        if self._session.get_bind().dialect.name == "postgresql":
            self._session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"queue of {owner}", 0))))

    def _check_room(self, owner: str, limit: int) -> None:
        waiting = self._session.scalar(select(func.count()).where(Job.owner == owner, Job.status == JobStatus.QUEUED))
        if waiting is not None and waiting >= limit:
            raise QueueFull(f"{waiting} of your jobs are waiting, of {limit} that may; let some of them start, or cancel some")

    def _with_documents(self, owner: str, job_id: str) -> Job:
        query = select(Job).where(*_visible(owner), Job.id == job_id).options(undefer(Job.report), undefer(Job.manifest))
        return _found(self._session.scalars(query.execution_options(populate_existing=True)).one_or_none(), job_id)

    def _remember(self, idempotency: Idempotency, job_id: str) -> None:
        # An expired twin may still be there; the primary key would refuse ours.
        self._session.execute(delete(IdempotencyKey).where(*_same_key(idempotency)))
        self._session.add(
            IdempotencyKey(
                owner=idempotency.owner,
                method=idempotency.method,
                path=idempotency.path,
                key_hash=idempotency.key_hash,
                fingerprint=idempotency.fingerprint,
                job_id=job_id,
            )
        )

    def _cancel_queued(self, job_id: str) -> Job | None:
        return move(self._session, job_id, JobStatus.QUEUED, JobStatus.CANCELLED, event="job.cancelled")

    def _cancel_running(self, job_id: str) -> Job | None:
        return move(
            self._session, job_id, JobStatus.RUNNING, JobStatus.CANCELLING, event="job.cancelling", cancelling_at=now()
        )  # fmt: skip


def _narrowed(query: Select[Any], owner: str, only: JobFilter, after: str | None) -> Select[Any]:
    query = query.where(*_visible(owner)).order_by(Job.id.desc())
    if after is not None:
        query = query.where(Job.id < after)
    if statuses := list(only.statuses):
        query = query.where(Job.status.in_(statuses))
    if only.model is not None:
        query = query.where(Job.model == only.model)
    for name, value in only.labels.items():
        query = query.where(Job.id.in_(select(JobLabel.job_id).where(JobLabel.name == name, JobLabel.value == value)))
    return query


def _visible(owner: str | BindParameter[str]):
    return Job.owner == owner, Job.deleted_at.is_(None)


# Built once: every poll asks this.
_ONE = select(Job).where(*_visible(bindparam("owner", type_=String)), Job.id == bindparam("job_id", type_=String))


def _found(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise JobNotFound(f"there is no job {job_id!r}")
    return job


def _same_key(idempotency: Idempotency):
    return (
        IdempotencyKey.owner == idempotency.owner,
        IdempotencyKey.method == idempotency.method,
        IdempotencyKey.path == idempotency.path,
        IdempotencyKey.key_hash == idempotency.key_hash,
    )
