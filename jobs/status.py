"""The statuses of a job and the legal moves between them.

``status`` is a closed set that programs may switch on; ``stage`` (``compression.progress``) is for display.
A lost attempt is not a failure: the job goes back to *queued*. Terminal statuses never change.
"""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


ALLOWED: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.EXPIRED}),
    JobStatus.RUNNING: frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLING, JobStatus.QUEUED}),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.EXPIRED: frozenset(),
}
TERMINAL: frozenset[JobStatus] = frozenset(status for status, targets in ALLOWED.items() if not targets)
HELD: frozenset[JobStatus] = frozenset({JobStatus.RUNNING, JobStatus.CANCELLING})
"""Statuses in which a worker holds the job under a lease."""
