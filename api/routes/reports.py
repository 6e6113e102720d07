"""Reports across jobs: what each job's result was, side by side."""

from __future__ import annotations

import base64
import binascii
import json
import math
from datetime import datetime
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from api.contract import problems
from api.dependencies import Reader, ReportReader, refuse_unknown_parameters
from api.errors import Problem
from api.headers import require_accept
from api.pages import link_to_next
from api.schemas import ReportList, ReportSummary
from api.views import as_json, report_summary
from jobs.errors import JobNotFound
from jobs.ids import parse_job_id
from jobs.reports import Place, ReportFilter, ReportOrder

router = APIRouter(prefix="/v1/reports", tags=["jobs"])

_PARAMETERS = ("model", "max_bytes", "min_retention", "order", "limit", "after")
_LONGEST_CURSOR = 200


@router.get("", response_model=ReportList, responses=problems(401, 403, 422, 429))
def list_reports(
    request: Request,
    caller: ReportReader,
    work: Reader,
    model: Annotated[str | None, Query(max_length=4096, description="Exactly as the job named it.")] = None,
    max_bytes: Annotated[int | None, Query(ge=0, le=2**62, description="Of the artifact's tensors.")] = None,
    min_retention: Annotated[float | None, Query(ge=0, le=1000, description="What was not measured passes none.")] = None,
    order: Annotated[
        ReportOrder, Query(description="newest: finished last first; bytes: smallest first; retention: most kept first.")
    ] = ReportOrder.NEWEST,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="next_cursor of the page before, of the same order.")] = None,
) -> Response:
    """List the caller's finished jobs by what came out; each links to its whole report."""
    require_accept(request.headers, "application/json")
    refuse_unknown_parameters(request, *_PARAMETERS)
    only = ReportFilter(model, max_bytes, min_retention)
    place = None if after is None else _place_of(after, order)
    jobs, last = work.reports.list(caller.name, only, order, limit=limit, after=place)
    cursor = None if last is None else _cursor_of(last, order)
    data: list[ReportSummary] = [report_summary(job) for job in jobs]
    return as_json(ReportList(data=data, has_more=cursor is not None, next_cursor=cursor), headers=link_to_next(request, cursor))


def _cursor_of(place: Place, order: ReportOrder) -> str:
    value = place.value.isoformat() if isinstance(place.value, datetime) else place.value
    text = json.dumps([order, value, place.job_id], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _place_of(cursor: str, order: ReportOrder) -> Place:
    """Return the place that a cursor names; it is opaque to callers, and whatever else they send is refused."""
    try:
        if len(cursor) > _LONGEST_CURSOR:
            raise ValueError
        padded = cursor + "=" * (-len(cursor) % 4)
        named, value, job_id = cast("list[Any]", json.loads(base64.urlsafe_b64decode(padded)))
        if named != order:
            raise ValueError
        return Place(_value_of(value, order), parse_job_id(job_id))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, binascii.Error, JobNotFound) as error:
        raise Problem(
            "invalid_cursor", f"{cursor[:100]!r} is not a cursor of the order {order}; take next_cursor of the page before"
        ) from error


def _value_of(value: object, order: ReportOrder) -> datetime | float:
    if order is ReportOrder.NEWEST:
        time = datetime.fromisoformat(cast("str", value))
        if time.tzinfo is None:
            raise ValueError
        return time
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 2**62:
        raise ValueError
    return value
