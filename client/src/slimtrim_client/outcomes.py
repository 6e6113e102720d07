"""What a finished job comes to: a success, or the error that says why not."""

from __future__ import annotations

from slimtrim_client.documents import Job, is_over
from slimtrim_client.errors import JobFailed, JobStopped, RetentionTooLow, SlimtrimError


def require_success(job: Job, min_retention: float | None = None) -> None:
    """Raise unless the job has succeeded and its artifact keeps at least so much.

    JobFailed, JobStopped or RetentionTooLow. A job that failed because the service held it to ``constraints.min_retention``
    counts as the last of these.
    """
    problem = problem_of(job, min_retention)
    if problem is not None:
        raise problem


def problem_of(job: Job, min_retention: float | None = None) -> SlimtrimError | None:
    """Return the error that stands for the job's end; None for a success."""
    name, reason = f"job {job['id']}", job["status_reason"]
    why = f": {reason['code']}: {reason['message']}" if reason else ""
    if not is_over(job):
        return JobFailed(f"{name} is not over; it is {job['status']}")
    if job["status"] == "failed":
        kind = RetentionTooLow if reason and reason["code"] == "constraint_violated" else JobFailed
        return kind(f"{name} failed{why}")
    if job["status"] != "succeeded":
        return JobStopped(f"{name} is {job['status']}{why}")
    if min_retention is None:
        return None
    retention = (job["result"] or {}).get("retention")
    if retention is None:
        return RetentionTooLow(f"{name} succeeded, but its retention was not measured; {min_retention:.1%} is asked for")
    if retention < min_retention:
        return RetentionTooLow(f"{name} keeps {retention:.1%} of the model; {min_retention:.1%} is asked for")
    return None
