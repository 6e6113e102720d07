"""Jobs: create, read, list, cancel, try again, delete; their reports. Their events are in ``events.py``."""

from __future__ import annotations

import hashlib
import logging
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from pydantic_core import to_json
from starlette.responses import Response

from api.contract import BODY, IDEMPOTENCY_KEY, IF_NONE_MATCH, PREFER, problems
from api.dependencies import (
    Body,
    JobDeleter,
    JobReader,
    JobWriter,
    Reader,
    ReportReader,
    Running,
    Work,
    refuse_unknown_parameters,
)
from api.errors import Problem
from api.headers import idempotency_key_of, names_tag, preferred, require_accept, wait_of
from api.pages import link_to_next
from api.schemas import NAMED, JobList, JobView
from api.service import Service
from api.submission import retry, submit
from api.views import as_json, job_headers, job_view, job_views
from api.waiting import Seen, see_when
from compression.errors import SlimtrimError
from compression.page.report_page import page_policy, report_page
from jobs.database import unit_of_work
from jobs.errors import JobNotFound
from jobs.ids import parse_job_id
from jobs.repository import Added, JobFilter
from jobs.status import JobStatus

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
log = logging.getLogger("slimtrim.api")

JSON, HTML = "application/json", "text/html"
_LIST_PARAMETERS = ("status", "model", "limit", "after")
_LABEL = "label."

CREATED: dict[int | str, dict[str, Any]] = {
    201: {
        "description": "The job. It is durable when the answer is sent.",
        "headers": {
            "Location": {"schema": {"type": "string"}},
            "Idempotent-Replayed": {"description": "An earlier POST with this key made the job.", "schema": {"type": "string"}},
        },
    }
}


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses={**CREATED, **problems(401, 403, 404, 409, 413, 415, 422, 429)},
    openapi_extra={**BODY, "parameters": [IDEMPOTENCY_KEY, PREFER]},
)
async def create_job(request: Request, caller: JobWriter, body: Body, service: Running) -> Response:
    """Accept a job. It is refused here, not on the GPU, if it can never succeed."""
    require_accept(request.headers, JSON)
    refuse_unknown_parameters(request)
    key = idempotency_key_of(request.headers)
    added = await to_thread.run_sync(submit, service, caller.name, body, key, request.state.request_id)
    return await _created(request, service, caller.name, added)


@router.get("", response_model=JobList, responses=problems(401, 403, 422, 429))
def list_jobs(
    request: Request,
    caller: JobReader,
    work: Reader,
    status: Annotated[list[JobStatus] | None, Query(description="May be given more than once.")] = None,
    model: Annotated[str | None, Query(max_length=4096)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="A job id; the page begins with the next older one.")] = None,
) -> Response:
    """List the caller's jobs, newest first; ``label.<name>=<value>`` narrows it to jobs with that label."""
    require_accept(request.headers, JSON)
    refuse_unknown_parameters(request, *_LIST_PARAMETERS, prefix=_LABEL)
    labels = {name.removeprefix(_LABEL): value for name, value in request.query_params.items() if name.startswith(_LABEL)}
    page = work.jobs.list(caller.name, JobFilter(status or (), model, labels), limit, after=_job_cursor(after))
    data = job_views(page.jobs, work)
    view = JobList(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)
    return as_json(view, headers=link_to_next(request, page.next_cursor))


@router.get(
    "/{job_id}",
    response_model=JobView,
    responses={304: {"description": "The caller's copy is still right."}, **problems(401, 403, 404, 429)},
    openapi_extra={"parameters": [IF_NONE_MATCH, PREFER]},
)
async def get_job(request: Request, caller: JobReader, service: Running, job_id: str) -> Response:
    """Read a job. With ``Prefer: wait`` the answer comes when it ends, or differs from the ``If-None-Match`` given."""
    require_accept(request.headers, JSON)
    seen, applied = await _wait(request, service, caller.name, parse_job_id(job_id))
    headers = {**seen.headers, **applied}
    if names_tag(request.headers.get("if-none-match"), seen.tag, weakly=True):
        return Response(status_code=304, headers=headers)
    return as_json(seen.view, headers=headers)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    response_model=JobView,
    responses={200: {"description": "The job had ended before; unchanged.", "model": JobView}, **problems(401, 403, 404, 429)},
)
def cancel_job(request: Request, caller: JobWriter, work: Work, job_id: str) -> Response:
    """Cancel a queued job at once; ask a running one to stop at the end of its block."""
    require_accept(request.headers, JSON)
    was_over = work.jobs.get(caller.name, parse_job_id(job_id)).is_over
    job = work.jobs.request_cancel(caller.name, job_id).job
    view = job_view(job, work)
    return as_json(view, 200 if was_over else 202, job_headers(job, view))


@router.post(
    "/{job_id}/retry",
    status_code=201,
    response_model=JobView,
    responses={**CREATED, **problems(401, 403, 404, 409, 422, 429)},
    openapi_extra={"parameters": [IDEMPOTENCY_KEY, PREFER]},
)
async def retry_job(request: Request, caller: JobWriter, service: Running, job_id: str) -> Response:
    """Do what a failed, cancelled or expired job was to do, as a new job on the same commit; the old one never changes."""
    require_accept(request.headers, JSON)
    refuse_unknown_parameters(request)
    key = idempotency_key_of(request.headers)
    added = await to_thread.run_sync(retry, service, caller.name, parse_job_id(job_id), key, request.state.request_id)
    return await _created(request, service, caller.name, added)


@router.delete("/{job_id}", status_code=204, responses=problems(401, 403, 404, 409, 429))
def delete_job(caller: JobDeleter, service: Running, job_id: str) -> Response:
    """Remove a finished job's artifact and forget its contents; a tombstone stays."""
    with unit_of_work(service.open_session, service.announce) as work:
        prefix = work.jobs.delete(caller.name, parse_job_id(job_id))
    if prefix is not None:
        try:
            service.storage.delete(prefix)
        except SlimtrimError:  # the job is gone already, and the upkeep removes files that belong to no job
            log.exception("artifact of a deleted job is left to the upkeep", extra={"job": job_id})
    return Response(status_code=204)


@router.get(
    "/{job_id}/report",
    responses={
        200: {
            "description": "What did happen, as data or as a page that needs nothing else.",
            "content": {JSON: {"schema": {"type": "object", NAMED: "Report"}}, HTML: {"schema": {"type": "string"}}},
        },
        304: {"description": "The caller's copy is still right."},
        **problems(401, 403, 404, 409, 422, 429),
    },
    openapi_extra={"parameters": [IF_NONE_MATCH]},
)
def get_report(request: Request, caller: ReportReader, work: Reader, job_id: str) -> Response:
    """Return what was done to the model and what it cost: as JSON, or as a page with plots for ``text/html``."""
    form = preferred(request.headers, JSON, HTML)
    job = work.jobs.get(caller.name, parse_job_id(job_id))
    report = work.jobs.report(caller.name, job_id)
    if report is None:
        raise Problem(
            "report_not_ready", f"job {job_id} is {job.status}; only a succeeded job has a report", retryable=not job.is_over
        )
    content = to_json(report) if form == JSON else report_page(report).encode()
    tag = f'"{hashlib.sha256(content).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Accept"}
    if names_tag(request.headers.get("if-none-match"), tag, weakly=True):
        return Response(status_code=304, headers=headers)
    if form == HTML:
        headers |= {"Content-Security-Policy": page_policy()}
    return Response(content, headers=headers, media_type=form)


async def _created(request: Request, service: Service, owner: str, added: Added) -> Response:
    seen, applied = await _wait(request, service, owner, added.job.id)
    headers = {**seen.headers, **applied, "Location": seen.view.links.self}
    if added.replayed:
        headers["Idempotent-Replayed"] = "true"
    return as_json(seen.view, 201, headers)


async def _wait(request: Request, service: Service, owner: str, job_id: str) -> tuple[Seen, dict[str, str]]:
    """Return the job, after waiting for it if the caller prefers that, and the header that says so."""
    seconds = wait_of(request.headers)
    known = request.headers.get("if-none-match") if request.method == "GET" else None

    def ready(seen: Seen) -> bool:
        return seen.is_over or (known is not None and not names_tag(known, seen.tag, weakly=True))

    seen = await see_when(service, owner, job_id, ready=ready, seconds=seconds or 0, request=request)
    return seen, {} if seconds is None else {"Preference-Applied": f"wait={seconds}"}


def _job_cursor(after: str | None) -> str | None:
    try:
        return None if after is None else parse_job_id(after)
    except JobNotFound as error:
        raise Problem("invalid_cursor", f"{after!r} is not a cursor; take next_cursor of the page before") from error
