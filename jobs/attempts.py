"""The workers' side of the rows: claim a job, hold it by a lease, write under its fence, end the attempt.

A claim raises the row's ``fence`` by one and returns it. Every later write names that number and matches no row once
another claim has happened, so a worker that slept through its lease can change nothing, however late it wakes.
Every method that writes says whether it could; a worker that hears "no" must stop and leave no trace.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, case, literal, or_, update
from sqlalchemy.orm import Session

from compression.planner.sizes import MEMORY_CLASSES
from jobs.clock import now
from jobs.endings import Cause, Hold, end_attempt, let_go, retry_or_fail
from jobs.moves import change, move
from jobs.status import HELD, JobStatus
from jobs.tables import Document, Job, JobAttempt, no_progress

_NOTE_EVERY_S = 1.0
_NOTE_EVERY = 0.01 - 1e-9
"""A ``job.progress`` event is written at most once per second or per hundredth of the way (less rounding)."""


@dataclass(frozen=True, slots=True)
class Claim(Hold):
    """What a worker needs to know about the job it just took."""

    request: Document
    resolved: Document
    plan: Document | None
    max_runtime_s: int
    owner: str
    fingerprint: str | None
    """Under which an earlier attempt kept its blocks."""
    request_id: str | None = None
    trace_parent: str | None = None


@dataclass(frozen=True, slots=True)
class Success:
    """What a finished attempt publishes, all at once."""

    result: Document
    report: Document
    manifest: Document
    artifact_prefix: str


class AttemptRepository:
    """What workers do with jobs."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def claim(self, job_id: str, worker: str, lease_s: float, classes: Collection[str] = MEMORY_CLASSES) -> Claim | None:
        """Take a queued job, or return None: somebody else has it, or it is over, or must wait, or is of none of the classes.

        One UPDATE: of two workers with the same message exactly one wins. A job whose worker died is not taken from
        it here; the upkeep first ends that attempt on record.
        """
        job = move(
            self._session,
            job_id,
            JobStatus.QUEUED,
            JobStatus.RUNNING,
            or_(Job.not_before.is_(None), Job.not_before <= now()),
            Job.memory_class.in_(classes),
            event="job.started",
            data=lambda job: {"attempt": job.attempt},
            fence=Job.fence + 1,
            worker=worker,
            lease_until=now(lease_s),
            started_at=case((Job.started_at.is_(None), now()), else_=Job.started_at),
            run_deadline=now(Job.max_runtime_s),  # pyright: ignore[reportArgumentType]
            queue_deadline=None,
            **_fresh(),
        )
        if job is None:
            return None
        self._session.add(
            JobAttempt(
                job_id=job_id, fence=job.fence, attempt=job.attempt, worker=worker, lease_until=job.lease_until,
                queued_at=job.queued_at,
            )
        )  # fmt: skip
        return Claim(
            job.id, job.fence, job.attempt, job.max_attempts, job.request, job.resolved, job.plan, job.max_runtime_s, job.owner,
            job.fingerprint, request_id=job.request_id, trace_parent=job.trace_parent,
        )  # fmt: skip

    def renew(self, hold: Hold, lease_s: float) -> JobStatus | None:
        """Prolong the lease; return the status, in which a wish to cancel shows, or None when the hold is lost."""
        mine = Job.id == hold.job_id, *_held(hold)
        renewed = update(Job).where(*mine).values(lease_until=now(lease_s)).returning(Job.status, Job.lease_until)
        row = self._session.execute(renewed.execution_options(synchronize_session=False)).one_or_none()
        if row is None:
            return None
        attempt = JobAttempt.job_id == hold.job_id, JobAttempt.fence == hold.fence
        self._session.execute(update(JobAttempt).where(*attempt).values(lease_until=row.lease_until))
        return row.status

    def enter_stage(self, hold: Hold, stage: str, fraction: float) -> bool:
        """Show a stage, of which nothing is done yet."""
        values = {"stage": stage, **_no_less(no_progress() | {"fraction": fraction})}
        return change(self._session, hold.job_id, *_held(hold), event="job.stage", data={"stage": stage}, **values) is not None

    def advance(self, hold: Hold, progress: Document) -> bool:
        """Show progress, never less than before; write an event when enough has happened since the last one."""
        job = change(self._session, hold.job_id, *_held(hold), **_no_less(progress))
        if job is None:
            return False
        noted: Document = {"noted_at": now(), "noted_fraction": Job.fraction}
        change(self._session, job.id, _noteworthy(), event="job.progress", data=job.progress, **noted)
        return True

    def warn(self, hold: Hold, code: str, message: str) -> bool:
        """Record something the caller should know."""
        data = {"code": code, "message": message}
        return change(self._session, hold.job_id, *_held(hold), event="job.warning", data=data) is not None

    def note_plan(self, hold: Hold, plan: Document) -> bool:
        """Replace the plan by the one that is really followed."""
        data = {name: plan.get(name) for name in ("steps", "bytes_after", "predicted_loss")}
        return change(self._session, hold.job_id, *_held(hold), event="job.planned", data=data, plan=plan) is not None

    def note_resumed(self, hold: Hold, parts: int) -> bool:
        """Record that the attempt takes so many finished blocks instead of making them."""
        return change(self._session, hold.job_id, *_held(hold), event="job.resumed", data={"blocks": parts}) is not None

    def note_resolved(self, hold: Hold, resolved: Document) -> bool:
        """Record what the request was resolved to."""
        return change(self._session, hold.job_id, *_held(hold), resolved=resolved) is not None

    def note_figures(self, hold: Hold, figures: Document) -> None:
        """Record what was measured of an attempt. It holds whoever has the job by now: the work was done."""
        mine = JobAttempt.job_id == hold.job_id, JobAttempt.fence == hold.fence
        self._session.execute(update(JobAttempt).where(*mine).values(figures=figures))

    def succeed(self, hold: Hold, success: Success) -> bool:
        """Publish result, report and manifest, and end the job, in one transaction. False: cancelled or lost meanwhile."""
        job = move(
            self._session,
            hold.job_id,
            JobStatus.RUNNING,
            JobStatus.SUCCEEDED,
            Job.fence == hold.fence,
            event="job.succeeded",
            data={"attempt": hold.attempt, "result": success.result},
            stage=None,
            fraction=1.0,
            progress=no_progress() | {"fraction": 1.0},
            result=success.result,
            bytes_after=success.result.get("bytes_after"),
            retention=success.result.get("retention"),
            report=success.report,
            manifest=success.manifest,
            artifact_prefix=success.artifact_prefix,
        )
        if job is not None:
            end_attempt(self._session, hold, "succeeded")
        return job is not None

    def fail(self, hold: Hold, cause: Cause, backoff_s: float) -> JobStatus | None:
        """End the attempt; the job is queued again if that can help, else failed; cancelled if that was wished."""
        job = retry_or_fail(self._session, hold, cause, backoff_s=backoff_s)
        if job is None:
            return self.cancel(hold)
        end_attempt(self._session, hold, "failed", cause)
        return job.status

    def cancel(self, hold: Hold) -> JobStatus | None:
        """End an attempt whose job was to be cancelled; None when it was not, or the hold is lost."""
        fence = Job.fence == hold.fence
        job = move(
            self._session, hold.job_id, JobStatus.CANCELLING, JobStatus.CANCELLED, fence, event="job.cancelled", stage=None
        )  # fmt: skip
        if job is None:
            return None
        end_attempt(self._session, hold, "cancelled")
        return job.status

    def release(self, hold: Hold) -> JobStatus | None:
        """Give the job back, because the worker was told to stop; this attempt does not count."""
        fence = Job.fence == hold.fence
        data = {"attempt": hold.attempt, "reason": "worker_stopping"}
        job = move(
            self._session, hold.job_id, JobStatus.RUNNING, JobStatus.QUEUED, fence,
            event="job.requeued", data=data, **let_go(),
        )  # fmt: skip
        if job is None:
            return self.cancel(hold)
        end_attempt(self._session, hold, "released")
        return job.status


def _held(hold: Hold) -> tuple[ColumnElement[bool], ...]:
    return Job.fence == hold.fence, Job.status.in_(HELD)


def _fresh() -> Document:
    # Progress is that of the attempt, so a new attempt begins at nothing.
    return {
        "stage": None,
        "status_reason": None,
        "progress": no_progress(),
        "fraction": 0.0,
        "noted_at": None,
        "noted_fraction": 0.0,
    }


def _no_less(progress: Document) -> Document:
    # Decided by the database, in the UPDATE itself: what it shows may be newer than what this worker last saw.
    ahead = Job.fraction <= progress["fraction"]
    return {
        "fraction": case((ahead, progress["fraction"]), else_=Job.fraction),
        "progress": case((ahead, literal(progress, Job.progress.type)), else_=Job.progress),
    }


def _noteworthy() -> ColumnElement[bool]:
    moved_on = Job.fraction - Job.noted_fraction >= _NOTE_EVERY
    return or_(Job.noted_at.is_(None), Job.noted_at <= now(-_NOTE_EVERY_S), moved_on)
