"""Rows become answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from api.schemas import EventView, JobView, ReportSummary
from api.waits import queue_view
from jobs.clock import moment
from jobs.database import UnitOfWork
from jobs.status import TERMINAL, JobStatus
from jobs.tables import Job, JobEvent

_POLL_HINTS_S = ((10, 2), (60, 5), (600, 15))
"""Up to this age in seconds, ask again after that many; later every 30 seconds."""
_POLL_LATE_S = 30


def job_view(job: Job, work: UnitOfWork) -> JobView:
    """Return a job as callers see it."""
    return job_views([job], work)[0]


def job_views(jobs: Sequence[Job], work: UnitOfWork) -> list[JobView]:
    """Return jobs as callers see them; what they wait for is asked once for all."""
    places = work.queues.places(jobs)
    workers = work.workers.all() if places else ()
    return [_view(job, queue_view(job, places[job.id], workers) if job.id in places else None) for job in jobs]


def _view(job: Job, queue: dict[str, Any] | None) -> JobView:
    base = f"/v1/jobs/{job.id}"
    return JobView.model_validate(
        {
            "id": job.id,
            "status": job.status,
            "stage": job.stage,
            "status_reason": job.status_reason,
            "progress": job.progress,
            "request": job.request,
            "resolved": job.resolved,
            "plan": job.plan,
            "result": job.result,
            "attempt": job.attempt,
            "max_attempts": job.max_attempts,
            "queue": queue,
            "labels": job.labels,
            "retry_of": job.retry_of,
            "created_at": moment(job.created_at),
            "queued_at": moment(job.queued_at),
            "started_at": moment(job.started_at),
            "cancelling_at": moment(job.cancelling_at),
            "finished_at": moment(job.finished_at),
            "links": {
                "self": base,
                "events": f"{base}/events",
                "report": f"{base}/report",
                "artifact": f"{base}/artifact",
                "cancel": f"{base}/cancel",
            },
        }
    )


def event_view(event: JobEvent) -> EventView:
    """Return an event as callers see it."""
    return EventView(seq=event.seq, type=event.type, at=moment(event.at) or "", data=event.data)


_COMPARED = ("bytes_before", "bytes_after", "ratio", "retention", "perplexity_before", "perplexity_after", "divergence")


def report_summary(job: Job) -> ReportSummary:
    """Return a finished job's result as a list of reports shows it."""
    result, base = job.result or {}, f"/v1/jobs/{job.id}"
    return ReportSummary.model_validate(
        {
            "id": job.id,
            "model": job.model,
            **{name: job.request[name] for name in ("recipe", "profile", "target_memory")},
            **{name: result[name] for name in _COMPARED},
            "labels": job.labels,
            "finished_at": moment(job.finished_at),
            "links": {"job": base, "report": f"{base}/report", "artifact": f"{base}/artifact"},
        }
    )


def job_tag(job: Job, view: JobView) -> str:
    """Return the ETag: the row's version, and the place in the queue, which changes without the row."""
    place = "" if view.queue is None else f".{view.queue.position}"
    return f'W/"{job.version}{place}"'


def job_headers(job: Job, view: JobView) -> dict[str, str]:
    """Return the ETag, and while the job is active a hint when to ask again."""
    headers = {"ETag": job_tag(job, view)}
    if view.status not in TERMINAL:
        headers["Retry-After"] = str(_poll_hint(job))
    return headers


def as_json(view: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a view as the answer; a number that JSON cannot say is ``null``."""
    return Response(view.model_dump_json(by_alias=True), status, headers, media_type="application/json")


def _poll_hint(job: Job) -> int:
    """Young jobs change fast, or their callers made a mistake they want to hear of."""
    since = job.started_at if job.status == JobStatus.RUNNING and job.started_at else job.created_at
    age = (datetime.now(UTC) - since).total_seconds()
    return next((seconds for limit, seconds in _POLL_HINTS_S if age < limit), _POLL_LATE_S)
