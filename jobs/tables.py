"""The rows: a job, its events, attempts, labels and finished blocks; idempotency and API keys; webhook deliveries; workers.

"Table" because here a model has weights. Large documents (report, manifest) are deferred: they are read when asked
for, not with every list. ``version`` grows with every visible change of a job and is what an ETag is made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Enum, ForeignKey, Index, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from jobs.clock import UtcTime, now
from jobs.ids import new_job_id, parse_job_id
from jobs.status import TERMINAL, JobStatus

__all__ = [
    "ApiKeyRow", "Base", "IdempotencyKey", "Job", "JobAttempt", "JobBlock", "JobEvent", "JobLabel", "WebhookDelivery", "Worker",
    "new_job_id", "no_progress", "parse_job_id",
]  # fmt: skip

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
_ID = String(32)
Document = dict[str, Any]


class Base(DeclarativeBase):
    """The tables of the service. Constraints have names by rule, so that migrations can address them."""

    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {datetime: UtcTime(), Document: JSON(none_as_null=True)}  # noqa: RUF012 (SQLAlchemy reads it so)


def _values(statuses: type[JobStatus]) -> Sequence[str]:
    return [status.value for status in statuses]


def no_progress() -> Document:
    """Return the progress of an attempt that has not reported yet."""
    return {"fraction": 0.0, "block": None, "blocks": None, "message": None, "eta_at": None}


class Job(Base):
    """One run of one recipe on one model."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_owner_id", "owner", "id"),
        Index("ix_jobs_status_id", "status", "id"),
        Index("ix_jobs_status_lease_until", "status", "lease_until"),
        Index("ix_jobs_status_queue_deadline", "status", "queue_deadline"),
        Index("ix_jobs_memory_class_status_id", "memory_class", "status", "id"),
        Index("ix_jobs_memory_class_status_announced_at_id", "memory_class", "status", "announced_at", "id"),
        Index("ix_jobs_status_memory_class_queued_at", "status", "memory_class", "queued_at"),
        Index("ix_jobs_owner_bytes_after", "owner", "bytes_after"),
        Index("ix_jobs_fingerprint", "fingerprint"),
        CheckConstraint("attempt >= 1 AND fruitless >= 0 AND fruitless <= max_attempts", name="attempt_in_range"),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True, default=new_job_id)
    owner: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(4096))
    status: Mapped[JobStatus] = mapped_column(
        Enum(JobStatus, native_enum=False, length=16, values_callable=_values, create_constraint=True, name="status"),
        default=JobStatus.QUEUED,
    )
    stage: Mapped[str | None] = mapped_column(String(32))
    status_reason: Mapped[Document | None]
    progress: Mapped[Document] = mapped_column(default=no_progress)
    fraction: Mapped[float] = mapped_column(default=0.0)
    """``progress["fraction"]`` where SQL can compare it; never goes back within an attempt."""
    noted_at: Mapped[datetime | None]
    """When the last ``job.progress`` event was written, and at which fraction (next column)."""
    noted_fraction: Mapped[float] = mapped_column(default=0.0)

    request: Mapped[Document]
    resolved: Mapped[Document]
    plan: Mapped[Document | None]
    result: Mapped[Document | None]
    report: Mapped[Document | None] = mapped_column(deferred=True)
    manifest: Mapped[Document | None] = mapped_column(deferred=True)
    artifact_prefix: Mapped[str | None] = mapped_column(String(128))
    labels: Mapped[Document] = mapped_column(default=dict)
    spec_hash: Mapped[str] = mapped_column(String(64))
    retry_of: Mapped[str | None] = mapped_column(_ID)
    memory_class: Mapped[str] = mapped_column(String(32), default="gpu.cpu")
    """What kind of worker the job needs; its queue has the same name."""
    bytes_after: Mapped[int | None] = mapped_column(BigInteger)
    """Of the result, where a list of reports can filter and order by it; so is the next one."""
    retention: Mapped[float | None]
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    """Under which the present attempt keeps its finished blocks."""
    request_id: Mapped[str | None] = mapped_column(String(64))
    """Of the POST that made the job, and its trace, so that a worker's log and trace lead back to it."""
    trace_parent: Mapped[str | None] = mapped_column(String(64))

    attempt: Mapped[int] = mapped_column(default=1)
    max_attempts: Mapped[int] = mapped_column(default=3)
    fruitless: Mapped[int] = mapped_column(default=0)
    """Lost attempts in a row that made no block durable; ``max_attempts`` of them end the job."""
    fence: Mapped[int] = mapped_column(default=0)
    """Grows with every claim; every write of a worker carries the number that its claim returned."""
    lease_until: Mapped[datetime | None]
    worker: Mapped[str | None] = mapped_column(String(255))
    not_before: Mapped[datetime | None]
    """Earliest next claim, after a failed attempt."""
    announced_at: Mapped[datetime] = mapped_column(default=now())
    max_runtime_s: Mapped[int] = mapped_column(default=86_400)
    max_queue_s: Mapped[int] = mapped_column(default=604_800)
    run_deadline: Mapped[datetime | None]
    """End of the present attempt's ``max_runtime_s``."""
    queue_deadline: Mapped[datetime | None]
    """End of ``max_queue_s``; unset once the job has started."""

    created_at: Mapped[datetime] = mapped_column(default=now())
    queued_at: Mapped[datetime] = mapped_column(default=now())
    started_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    last_seq: Mapped[int] = mapped_column(default=0)
    """Number of the job's last event; events are numbered without gaps."""
    version: Mapped[int] = mapped_column(default=1)

    @property
    def is_over(self) -> bool:
        """Whether the status is terminal."""
        return self.status in TERMINAL


class JobLabel(Base):
    """One of a job's labels, where a filter can find it."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("ix_job_labels_name_value", "name", "value"),)

    job_id: Mapped[str] = mapped_column(_ID, ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    value: Mapped[str] = mapped_column(String(1024))


class JobEvent(Base):
    """Something that happened to a job. Never changed."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(_ID, ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(default=now())
    data: Mapped[Document] = mapped_column(default=dict)


class JobAttempt(Base):
    """One claim of a job by a worker: when it began, how long its lease reached, and how it ended."""

    __tablename__ = "job_attempts"
    __table_args__ = (Index("ix_job_attempts_ended_at", "ended_at"),)

    job_id: Mapped[str] = mapped_column(_ID, ForeignKey("jobs.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    worker: Mapped[str] = mapped_column(String(255))
    queued_at: Mapped[datetime | None]
    """Since when the job had waited for this attempt."""
    started_at: Mapped[datetime] = mapped_column(default=now())
    lease_until: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(32))
    """succeeded, failed, cancelled, released (the worker was told to stop), lost (it fell silent)."""
    code: Mapped[str | None] = mapped_column(String(64))
    message: Mapped[str | None] = mapped_column(String(4096))
    figures: Mapped[Document | None]
    """What the worker measured so far, as ``worker/figures.py`` writes it and ``jobs/census.py`` reads it."""


class IdempotencyKey(Base):
    """A key that a caller sent with a POST, and the job it made."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    method: Mapped[str] = mapped_column(String(8), primary_key=True)
    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    key_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(_ID, ForeignKey("jobs.id"))
    created_at: Mapped[datetime] = mapped_column(default=now(), index=True)


class JobBlock(Base):
    """A finished part of a run that outlives its attempt: where its files are, and what they are."""

    __tablename__ = "job_blocks"
    __table_args__ = (Index("ix_job_blocks_created_at", "created_at"),)

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Of the part, such as ``block-00003``."""
    job_id: Mapped[str] = mapped_column(_ID, ForeignKey("jobs.id"))
    fence: Mapped[int]
    files: Mapped[Document]
    """``{"files": [{"path", "key", "bytes", "sha256"}]}``."""
    created_at: Mapped[datetime] = mapped_column(default=now())


class ApiKeyRow(Base):
    """A caller's key, made and revoked while the service runs; those of the settings are not here."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), index=True)
    scopes: Mapped[Document]
    """``{"scopes": [...]}``."""
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(16))
    """The key's first letters, by which people tell keys apart."""
    created_at: Mapped[datetime] = mapped_column(default=now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class WebhookDelivery(Base):
    """One event that somebody wants to be told, written in the event's own transaction."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (Index("ix_webhook_deliveries_state_due_at", "state", "due_at"),)

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    job_id: Mapped[str] = mapped_column(_ID, ForeignKey("jobs.id"), index=True)
    seq: Mapped[int]
    """Number of the event that is told."""
    url: Mapped[str] = mapped_column(String(2048))
    receiver: Mapped[str] = mapped_column(String(300))
    """Host and port of ``url``: of those that hang, few are tried at a time."""
    payload: Mapped[Document]
    state: Mapped[str] = mapped_column(String(16), default="pending")
    """pending, delivered, failed (given up)."""
    tries: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime] = mapped_column(default=now())
    status_code: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(String(1024))
    created_at: Mapped[datetime] = mapped_column(default=now())
    delivered_at: Mapped[datetime | None]


class Worker(Base):
    """A worker process that was alive lately, and which jobs it takes."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    classes: Mapped[Document]
    """``{"classes": [...]}``, the memory classes of the jobs it takes."""
    device: Mapped[str] = mapped_column(String(255))
    job_id: Mapped[str | None] = mapped_column(_ID)
    started_at: Mapped[datetime] = mapped_column(default=now())
    last_seen: Mapped[datetime] = mapped_column(default=now())
