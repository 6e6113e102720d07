"""Plans: what would happen. Writes nothing, reads config and tensor headers only."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.contract import BODY, problems
from api.dependencies import Body, JobReader, Running, refuse_unknown_parameters
from api.headers import require_accept
from api.submission import plan_request
from api.views import as_json
from compression.plan import Plan

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("", response_model=Plan, responses=problems(401, 403, 413, 415, 422, 429), openapi_extra=BODY)
def make_plan(request: Request, caller: JobReader, body: Body, service: Running) -> Response:
    """Say what a job with this body would do, and how many bytes would be left; or why it could not be done."""
    require_accept(request.headers, "application/json")
    refuse_unknown_parameters(request)
    plan, _ = plan_request(body, service.settings)
    return as_json(plan)
