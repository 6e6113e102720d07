"""What the rows say about the service as a whole, for ``GET /metrics``: grouped queries over indexes and narrow tables.

Every process counts for itself and forgets at its end; the rows are common to all and forget nothing. So whatever
concerns jobs is read from them, at any replica alike, and no figure is lost with a worker.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, Result, Row, and_, func, or_, select
from sqlalchemy.orm import Session

from jobs.clock import now
from jobs.status import HELD, JobStatus
from jobs.tables import Job, JobAttempt, WebhookDelivery, Worker

RUN_S = (1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0)
QUEUE_S = (0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21_600.0, 86_400.0)
_SETTLED_S = 120.0
"""Twice the longest that a transaction lives, and with it an end that is not visible yet."""
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
class Attempts:
    """Sums over attempts."""

    ended: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(outcome, code)."""
    run_s: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    """Outcome -> seconds that attempts took."""
    queue_s: Histogram = field(default_factory=lambda: Histogram(QUEUE_S))
    block_s: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    """Stage -> seconds that blocks took."""
    bytes_moved: dict[str, int] = field(default_factory=lambda: {"fetched": 0, "stored": 0})
    gpu_memory_peak: int = 0
    host_memory_peak: int = 0

    def add(self, attempt: Row[Any]) -> None:
        """Count one attempt, ended or not."""
        if attempt.queued_at is not None:
            self.queue_s.add(_seconds(attempt.started_at, attempt.queued_at))
        if attempt.ended_at is not None:
            key = attempt.outcome or "", attempt.code or ""
            self.ended[key] = self.ended.get(key, 0) + 1
            self.run_s.setdefault(key[0], Histogram(RUN_S)).add(_seconds(attempt.ended_at, attempt.started_at))
        if attempt.figures is not None:
            self._add_figures(attempt.figures)

    def _add_figures(self, figures: Mapping[str, Any]) -> None:
        for name in self.bytes_moved:
            self.bytes_moved[name] += figures.get(f"bytes_{name}", 0)
        self.gpu_memory_peak = max(self.gpu_memory_peak, figures.get("gpu_memory_peak", 0))
        self.host_memory_peak = max(self.host_memory_peak, figures.get("host_memory_peak", 0))
        for stage, blocks in cast("Mapping[str, Mapping[str, Any]]", figures.get("block_seconds", {})).items():
            histogram = self.block_s.setdefault(stage, Histogram(BLOCK_S))
            # Other bounds: written by another version, and not comparable.
            if len(blocks["counts"]) == len(histogram.counts):
                histogram.merge(blocks["counts"], blocks["sum"])


@dataclass(slots=True)
class Settled:
    """The sums over attempts that ended so long ago that no transaction can add to them: read once per process."""

    sums: Attempts = field(default_factory=Attempts)
    until: datetime | None = None


@dataclass(slots=True)
class Census:
    """The figures, each by its labels."""

    attempts: Attempts
    jobs: dict[tuple[str, str, str], int] = field(default_factory=dict[tuple[str, str, str], int])
    """(status, stage, memory class)."""
    finished: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """(status, code)."""
    waiting_s: dict[str, float] = field(default_factory=dict[str, float])
    """Memory class -> seconds that its first job has waited."""
    deliveries: dict[str, int] = field(default_factory=dict[str, int])
    workers: dict[str, int] = field(default_factory=dict[str, int])
    """Memory class -> workers alive that take its jobs."""
    workers_alive: int = 0
    workers_busy: int = 0


def take_census(session: Session, lease_s: float, settled: Settled) -> Census:
    """Read all figures; a worker counts as alive when it was seen within ``lease_s`` seconds.

    ``settled`` is what the last census left, and is carried on.
    """
    census = Census(_sum_attempts(session, settled))
    _count_jobs(session, census)
    _count_ends(session, census)
    states = select(WebhookDelivery.state, func.count()).group_by(WebhookDelivery.state)
    census.deliveries = {state: count for state, count in session.execute(states)}
    _count_workers(session, census, lease_s)
    return census


def _sum_attempts(session: Session, settled: Settled) -> Attempts:
    cut = session.scalars(select(now(-_SETTLED_S))).one()
    sums = deepcopy(settled.sums)
    old = JobAttempt.ended_at <= cut
    for attempt in _attempts(session, old if settled.until is None else and_(old, JobAttempt.ended_at > settled.until)):
        sums.add(attempt)
    settled.sums, settled.until = sums, cut  # both or neither, though the database may fail meanwhile
    sums = deepcopy(sums)
    for attempt in _attempts(session, or_(JobAttempt.ended_at.is_(None), JobAttempt.ended_at > cut)):
        sums.add(attempt)
    return sums


def _attempts(session: Session, which: ColumnElement[bool]) -> Result[Any]:
    columns = (
        JobAttempt.queued_at, JobAttempt.started_at, JobAttempt.ended_at, JobAttempt.outcome, JobAttempt.code, JobAttempt.figures,
    )  # fmt: skip
    return cast("Result[Any]", session.execute(select(*columns).where(which).execution_options(yield_per=1000)))


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


def _count_workers(session: Session, census: Census, lease_s: float) -> None:
    alive = select(Worker.classes, Worker.job_id).where(Worker.last_seen >= now(-lease_s))
    for classes, job_id in session.execute(alive):
        census.workers_alive += 1
        census.workers_busy += job_id is not None
        for name in classes["classes"]:
            census.workers[name] = census.workers.get(name, 0) + 1


def _seconds(later: datetime, earlier: datetime) -> float:
    return max(0.0, (later - earlier).total_seconds())
