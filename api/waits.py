"""What a queued job waits for, in words: which workers could take it, what they do, and who stands before it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jobs.clock import moment
from jobs.tables import Job
from jobs.workers import Present


def queue_view(job: Job, ahead: int, workers: Sequence[Present]) -> dict[str, Any]:
    """Return the contract's ``queue`` of a job that waits."""
    return {"class": job.memory_class, "position": ahead + 1, "waiting_for": _waiting_for(job, ahead, workers)}


def _waiting_for(job: Job, ahead: int, workers: Sequence[Present]) -> str:
    if job.not_before is not None and job.not_before > datetime.now(UTC):
        return f"the next attempt, not before {moment(job.not_before)}"
    fitting = [worker for worker in workers if job.memory_class in worker.classes]
    alive = [worker for worker in fitting if worker.is_alive]
    if not alive:
        last = max((worker.last_seen for worker in fitting), default=None)
        since = "" if last is None else f" since {moment(last)}"
        return f"no worker that takes {job.memory_class} has been seen{since}"
    such = f"{len(alive)} such worker{'s' * (len(alive) > 1)}, {_busy(alive)}"
    return f"needs {job.memory_class}; {such}; {_line(ahead)}"


def _busy(alive: Sequence[Present]) -> str:
    busy = sum(worker.is_busy for worker in alive)
    if busy == 0:
        return "free"
    if busy < len(alive):
        return f"{busy} busy"
    return {1: "busy", 2: "both busy"}.get(busy, "all busy")


def _line(ahead: int) -> str:
    return "next in line" if ahead == 0 else f"{ahead} job{'s' * (ahead > 1)} ahead"
