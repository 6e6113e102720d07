"""What happened to a job: a page of it, or a live stream (``api/streams.py``)."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from api.contract import LAST_EVENT_ID, problems
from api.dependencies import JobReader, Running, refuse_unknown_parameters
from api.errors import Problem
from api.headers import last_event_id_of, preferred
from api.pages import link_to_next
from api.schemas import EventList
from api.service import Service
from api.streams import EVENT_STREAM
from api.views import as_json, event_view
from jobs.database import reading
from jobs.ids import parse_job_id

router = APIRouter(prefix="/v1/jobs/{job_id}/events", tags=["jobs"])

JSON = "application/json"
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events, or with Accept: text/event-stream the events as they happen, up to `event: end`.",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    },
    204: {"description": "The job is over, and Last-Event-ID names its last event: there is nothing more to come."},
}


@router.get(
    "",
    response_model=EventList,
    responses={**ANSWERS, **problems(401, 403, 404, 422, 429)},
    openapi_extra={"parameters": [LAST_EVENT_ID]},
)
async def list_events(
    request: Request,
    caller: JobReader,
    service: Running,
    job_id: str,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of a page; a stream has none.")] = 100,
    after: Annotated[str | None, Query(description="A seq; the page or stream begins with the next event.")] = None,
) -> Response:
    """Return what happened to a job, oldest first; as a stream, what happens from now on as well."""
    form = preferred(request.headers, JSON, EVENT_STREAM)
    refuse_unknown_parameters(request, "limit", "after")
    job_id, start = parse_job_id(job_id), _cursor(after)
    if form == JSON:
        return await to_thread.run_sync(_page, request, service, caller.name, job_id, start, limit)
    seen = last_event_id_of(request.headers)
    start = start if seen is None else seen
    if await to_thread.run_sync(_is_past_the_end, service, caller.name, job_id, start):
        return Response(status_code=204)
    return service.streams.open(job_id, start)


def _page(request: Request, service: Service, owner: str, job_id: str, after: int, limit: int) -> Response:
    with reading(service.open_reader) as work:
        events = work.jobs.events(owner, job_id, after=after, limit=limit + 1)
    data = [event_view(event) for event in events[:limit]]
    cursor = data[-1].seq if len(events) > limit else None
    return as_json(EventList(data=data, has_more=cursor is not None, next_cursor=cursor), headers=link_to_next(request, cursor))


def _is_past_the_end(service: Service, owner: str, job_id: str, seq: int) -> bool:
    """Say whether no event will ever come after this number; refuse one that no event has had."""
    with reading(service.open_reader) as work:
        job = work.jobs.get(owner, job_id)
    if seq > job.last_seq:
        raise Problem("invalid_header", f"Last-Event-ID or after is {seq}, and the job's last event has the id {job.last_seq}")
    return job.is_over and seq == job.last_seq


def _cursor(after: str | None) -> int:
    if after is None:
        return 0
    if not after.isdecimal() or len(after) > 15:
        raise Problem("invalid_cursor", f"{after[:100]!r} is not a cursor; take next_cursor of the page before")
    return int(after)
