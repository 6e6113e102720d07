"""The list of jobs and the page of one job, and the streams that keep both fresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from api.dashboard.guard import JobLooker, Visitor
from api.dashboard.live import Glance, stream
from api.dashboard.rendering import page, render
from api.dashboard.trouble import PageRoute
from api.dependencies import Reader, Running
from api.errors import Problem
from api.schemas import JobView
from api.service import Service
from api.views import job_view
from jobs.database import UnitOfWork, reading
from jobs.errors import JobNotFound
from jobs.ids import parse_job_id
from jobs.overview import Overview
from jobs.repository import JobFilter
from jobs.status import JobStatus
from jobs.storage import ManifestFile, as_manifest
from jobs.tables import JobEvent

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_ROWS = 25
_LAST_EVENTS = 30
_ROW_PIECES = ("status", "progress", "bytes", "retention")
_JOB_PIECES = ("status", "actions", "progress", "result", "files", "plan", "events", "facts")
"""Parts of a row and of a job's page that change while it is looked at; each is a template."""


@dataclass(frozen=True, slots=True)
class JobPage:
    """What a job's page shows."""

    job: JobView
    version: int
    events: Sequence[JobEvent]
    files: Sequence[ManifestFile]
    visitor: Visitor
    token: str

    def values(self) -> dict[str, Any]:
        """Return what the templates name."""
        names = ("job", "events", "files", "visitor", "token")
        return {name: getattr(self, name) for name in names}


@router.get("/")
def list_jobs(
    request: Request,
    visitor: JobLooker,
    work: Reader,
    service: Running,
    status: str = "",
    model: Annotated[str, Query(max_length=4096)] = "",
    label: Annotated[str, Query(max_length=400)] = "",
    after: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """Show the visitor's jobs, newest first."""
    only = _filter_of(status, model.strip(), label.strip())
    found = work.jobs.overview(visitor.caller.name, only, _ROWS, after=_cursor(after))
    asked = {"status": status, "model": model, "label": label}
    chosen = {name: value for name, value in asked.items() if value}
    further = None if found.next_cursor is None else "/?" + urlencode({**chosen, "after": found.next_cursor})
    first = "/?" + urlencode(chosen) if chosen else "/"
    moving = [row.id for row in found.rows if not row.is_over]
    live = "/live?" + urlencode({"jobs": ",".join(moving)}) if moving else None
    origin = str(request.base_url).rstrip("/")
    return page(
        request, service, "list.html", visitor, rows=found.rows, asked=asked, chosen=chosen, further=further, first=first,
        is_later=bool(after), live=live, origin=origin,
    )  # fmt: skip


@router.get("/live")
async def watch_list(
    request: Request, visitor: JobLooker, service: Running, jobs: Annotated[str, Query(max_length=2000)]
) -> Response:
    """Stream what changes in the rows of some jobs."""
    ids = [parse_job_id(job_id) for job_id in jobs.split(",")[:_ROWS]]

    def look(seen: Mapping[str, int]) -> Glance | None:
        if not _may_still_look(service, visitor):
            return None
        with reading(service.open_reader) as work:
            rows = work.jobs.glance(visitor.caller.name, ids)
        news = {row.id: _row_pieces(row) for row in rows if seen.get(row.id) != row.version}
        return Glance({row.id: row.version for row in rows}, news, all(row.is_over for row in rows))

    return _opened(request, service, look)


@router.get("/jobs/{job_id}")
def show_job(request: Request, visitor: JobLooker, work: Reader, service: Running, job_id: str) -> Response:
    """Show everything about a job."""
    shown = _job_page(work, service, visitor, parse_job_id(job_id))
    live = None if shown.job.finished_at else f"/jobs/{job_id}/live"
    values = {name: value for name, value in shown.values().items() if name not in ("visitor", "token")}
    return page(request, service, "job.html", visitor, live=live, pieces=_JOB_PIECES, **values)


@router.get("/jobs/{job_id}/live")
async def watch_job(request: Request, visitor: JobLooker, service: Running, job_id: str) -> Response:
    """Stream what changes on a job's page."""
    parse_job_id(job_id)
    owner = visitor.caller.name
    await to_thread.run_sync(_version, service, owner, job_id)

    def look(seen: Mapping[str, int]) -> Glance | None:
        if not _may_still_look(service, visitor):
            return None
        version = _version(service, owner, job_id)
        if seen.get(job_id) == version:
            return Glance({job_id: version}, {}, is_over=False)
        with reading(service.open_reader) as work:
            shown = _job_page(work, service, visitor, job_id)
        news = {name: render(f"job/{name}.html", **shown.values()) for name in _JOB_PIECES}
        return Glance({job_id: shown.version}, {job_id: news}, shown.job.finished_at is not None)

    return _opened(request, service, look)


def _opened(request: Request, service: Service, look: Any) -> Response:
    return Response() if getattr(request.state, "head", False) else stream(service, look)


def _may_still_look(service: Service, visitor: Visitor) -> bool:
    """Say whether the key of the session is valid still; or that there is still no key at all."""
    if visitor.session.sha256 is None:
        return service.callers.is_open
    return service.callers.is_open or service.callers.holder(visitor.session.sha256) is not None


def _version(service: Service, owner: str, job_id: str) -> int:
    with reading(service.open_reader) as work:
        return work.jobs.version(owner, job_id)


def _row_pieces(row: Overview) -> dict[str, str]:
    return {name: render(f"row/{name}.html", row=row) for name in _ROW_PIECES}


def _job_page(work: UnitOfWork, service: Service, visitor: Visitor, job_id: str) -> JobPage:
    owner = visitor.caller.name
    job = work.jobs.get(owner, job_id)
    manifest = work.jobs.manifest(owner, job_id)
    return JobPage(
        job=job_view(job, work),
        version=job.version,
        events=work.jobs.events(owner, job_id, after=max(0, job.last_seq - _LAST_EVENTS), limit=_LAST_EVENTS)[::-1],
        files=() if manifest is None else as_manifest(manifest)["files"],
        visitor=visitor,
        token=service.sessions.token(visitor.session),
    )


def _filter_of(status: str, model: str, label: str) -> JobFilter:
    if status and status not in list(JobStatus):
        raise Problem("validation_failed", f"there is no status {status[:40]!r}; known: {', '.join(JobStatus)}")
    name, equals, value = label.partition("=")
    if label and not equals:
        raise Problem("validation_failed", f"{label[:100]!r} is not a label; write name=value")
    statuses = (JobStatus(status),) if status else ()
    return JobFilter(statuses, model or None, {name.strip(): value.strip()} if label else {})


def _cursor(after: str) -> str | None:
    try:
        return parse_job_id(after) if after else None
    except JobNotFound as error:
        raise Problem("invalid_cursor", f"{after!r} is not a place in the list; begin with its first page") from error
