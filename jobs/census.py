"""What the rows say about the service as a whole, for ``GET /metrics``: grouped queries over indexes and narrow tables.

Every process counts for itself and forgets at its end; the rows are common to all and forget nothing. So whatever
concerns jobs is read from them, at any replica alike, and no figure is lost with a worker.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, Label, case, func, select
from sqlalchemy.orm import Session

from jobs.clock import SecondsBetween, now
from jobs.status import HELD, JobStatus
from jobs.tables import Job, JobAttempt, WebhookDelivery, Worker

RUN_S = (1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0)
QUEUE_S = (0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21_600.0, 86_400.0)
BLOCK_S = (0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


@dataclass(slots=True)
class Histogram:
    """How many values fell at or below each bound and above the one before; the last count is of those above all."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list[int])
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def merge(self, counts: Sequence[int], total: float) -> None:
        """Count what another histogram with the same bounds has counted."""
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, counts, strict=True)]
        self.sum += total


@dataclass(slots=True)
class Census:
    """The figures, each by its labels."""

    jobs: dict[tuple[str, str, str], int] = field(default_factory=dict[tuple[str, str, str], int])
    """(status, stage, memory class)."""
    finished: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(status, code)."""
    waiting_s: dict[str, float] = field(default_factory=dict[str, float])
    """Memory class -> seconds that its first job has waited."""
    attempts: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(outcome, code)."""
    run_s: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    """Outcome -> seconds that attempts took."""
    queue_s: Histogram = field(default_factory=lambda: Histogram(QUEUE_S))
    block_s: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    """Stage -> seconds that blocks took."""
    bytes_moved: dict[str, int] = field(default_factory=lambda: {"fetched": 0, "stored": 0})
    gpu_memory_peak: int = 0
    host_memory_peak: int = 0
    deliveries: dict[str, int] = field(default_factory=dict[str, int])
    workers: dict[str, int] = field(default_factory=dict[str, int])
    """Memory class -> workers alive that take its jobs."""
    workers_alive: int = 0
    workers_busy: int = 0


def take_census(session: Session, lease_s: float) -> Census:
    """Read all figures; a worker counts as alive when it was seen within ``lease_s`` seconds."""
    census = Census()
    _count_jobs(session, census)
    _count_ends(session, census)
    _count_attempts(session, census)
    _sum_figures(session, census)
    states = select(WebhookDelivery.state, func.count()).group_by(WebhookDelivery.state)
    census.deliveries = {state: count for state, count in session.execute(states)}
    _count_workers(session, census, lease_s)
    return census


def _count_jobs(session: Session, census: Census) -> None:
    first = func.min(Job.queued_at)
    query = select(Job.status, Job.memory_class, func.count(), first, now()).group_by(Job.status, Job.memory_class)
    for status, memory_class, count, oldest, at in session.execute(query):
        if status is JobStatus.QUEUED:
            census.waiting_s[memory_class] = _seconds(at, oldest)
        if status not in HELD:
            census.jobs[status.value, "", memory_class] = count
    held = select(Job.status, Job.stage, Job.memory_class, func.count()).where(Job.status.in_(HELD))
    for status, stage, memory_class, count in session.execute(held.group_by(Job.status, Job.stage, Job.memory_class)):
        census.jobs[status.value, stage or "", memory_class] = count


def _count_ends(session: Session, census: Census) -> None:
    for (status, _, _), count in census.jobs.items():
        if status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.EXPIRED):
            census.finished[status, ""] = census.finished.get((status, ""), 0) + count
    code = Job.status_reason["code"].as_string().label("code")
    query = select(code, func.count()).where(Job.status == JobStatus.FAILED).group_by(code)
    for name, count in session.execute(query):
        census.finished[JobStatus.FAILED.value, name or ""] = count


def _count_attempts(session: Session, census: Census) -> None:
    ran_s = SecondsBetween(JobAttempt.ended_at, JobAttempt.started_at)
    bucket = _bucket(ran_s, RUN_S)
    kinds = JobAttempt.outcome, JobAttempt.code, bucket
    query = select(*kinds, func.count(), func.sum(ran_s)).where(JobAttempt.ended_at.is_not(None)).group_by(*kinds)
    for outcome, code, index, count, seconds in session.execute(query):
        key = outcome or "", code or ""
        census.attempts[key] = census.attempts.get(key, 0) + count
        histogram = census.run_s.setdefault(key[0], Histogram(RUN_S))
        histogram.counts[index] += count
        histogram.sum += float(seconds)
    waited_s = SecondsBetween(JobAttempt.started_at, JobAttempt.queued_at)
    bucket = _bucket(waited_s, QUEUE_S)
    query = select(bucket, func.count(), func.sum(waited_s)).where(JobAttempt.queued_at.is_not(None)).group_by(bucket)
    for index, count, seconds in session.execute(query):
        census.queue_s.counts[index] += count
        census.queue_s.sum += float(seconds)


def _sum_figures(session: Session, census: Census) -> None:
    for figures in session.scalars(select(JobAttempt.figures).where(JobAttempt.figures.is_not(None))):
        assert figures is not None
        for name in census.bytes_moved:
            census.bytes_moved[name] += figures.get(f"bytes_{name}", 0)
        census.gpu_memory_peak = max(census.gpu_memory_peak, figures.get("gpu_memory_peak") or 0)
        census.host_memory_peak = max(census.host_memory_peak, figures.get("host_memory_peak") or 0)
        for stage, blocks in cast("Mapping[str, Mapping[str, Any]]", figures.get("block_seconds", {})).items():
            histogram = census.block_s.setdefault(stage, Histogram(BLOCK_S))
            # Other bounds: written by another version, and not comparable.
            if len(blocks["counts"]) == len(histogram.counts):
                histogram.merge(blocks["counts"], blocks["sum"])


def _count_workers(session: Session, census: Census, lease_s: float) -> None:
    alive = select(Worker.classes, Worker.job_id).where(Worker.last_seen >= now(-lease_s))
    for classes, job_id in session.execute(alive):
        census.workers_alive += 1
        census.workers_busy += job_id is not None
        for name in classes["classes"]:
            census.workers[name] = census.workers.get(name, 0) + 1


def _bucket(value: ColumnElement[float], bounds: Sequence[float]) -> Label[int]:
    # With a name to group by: repeated with its parameters it would be another expression to PostgreSQL.
    return case(*((value <= bound, index) for index, bound in enumerate(bounds)), else_=len(bounds)).label("bucket")


def _seconds(later: datetime, earlier: datetime) -> float:
    return max(0.0, (later - earlier).total_seconds())
