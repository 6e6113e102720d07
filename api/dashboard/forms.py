"""What changes something: the form for a new job, and the buttons on a job's page. Every one is a plain POST of a form."""

from __future__ import annotations

import secrets
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from api.dashboard.drafts import DEFAULTS, Considered, consider, refused, request_of
from api.dashboard.guard import Form, JobDeleter, JobLooker, JobMaker, Visitor
from api.dashboard.rendering import lead_to, page, render
from api.dashboard.trouble import PageRoute
from api.dependencies import Running, Work
from api.errors import CODES, Problem, problem_of
from api.headers import is_key
from api.routes.jobs import delete_job
from api.service import Service
from api.submission import retry, submit
from compression.errors import SlimtrimError
from jobs.ids import parse_job_id

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_KEY = "key"


@router.get("/new")
async def draft(request: Request, visitor: JobMaker, service: Running) -> Response:
    """Show the form; fields may be filled in by the address."""
    given = {name: value[:4096] for name, value in request.query_params.items() if name in DEFAULTS}
    considered = await to_thread.run_sync(consider, service, {**DEFAULTS, **given})
    return _form(request, service, visitor, given, considered)


@router.post("/new/plan")
async def plan_draft(visitor: JobLooker, service: Running, fields: Form) -> Response:
    """Return what would happen, as the piece of the page that shows it; records nothing."""
    considered = await to_thread.run_sync(consider, service, fields)
    return HTMLResponse(render("plan.html", considered=considered, fields={**DEFAULTS, **fields}, with_faults=True))


@router.post("/new")
async def create_job(request: Request, visitor: JobMaker, service: Running, fields: Form) -> Response:
    """Record the job and lead to its page, or show the form again with what is wrong beside the fields."""
    key = _key_of(fields)
    if "show" in fields:  # "Show the plan", for browsers without the script
        return _form(request, service, visitor, fields, await to_thread.run_sync(consider, service, fields))
    try:
        body = request_of(fields)
        added = await to_thread.run_sync(submit, service, visitor.caller.name, body, key, request.state.request_id)
    except (Problem, SlimtrimError) as error:
        problem = problem_of(error)
        if CODES[problem.code].status >= 500:
            raise
        return _form(request, service, visitor, fields, await _explained(service, fields, problem))
    return lead_to(f"/jobs/{added.job.id}")


@router.post("/jobs/{job_id}/cancel")
def cancel_job(visitor: JobMaker, work: Work, job_id: str, fields: Form) -> Response:
    """Cancel a queued job at once; ask a running one to stop at the end of its block."""
    work.jobs.request_cancel(visitor.caller.name, parse_job_id(job_id))
    return lead_to(f"/jobs/{job_id}")


@router.post("/jobs/{job_id}/retry")
def retry_job(request: Request, visitor: JobMaker, service: Running, job_id: str, fields: Form) -> Response:
    """Do again what a failed, cancelled or expired job was to do, as a new job, and lead to it."""
    key = f"dashboard-{_key_of(fields)}"
    added = retry(service, visitor.caller.name, parse_job_id(job_id), key, request.state.request_id)
    return lead_to(f"/jobs/{added.job.id}")


@router.post("/jobs/{job_id}/delete")
def remove_job(visitor: JobDeleter, service: Running, job_id: str, fields: Form) -> Response:
    """Remove a finished job with its artifact, and lead to the list."""
    delete_job(visitor.caller, service, job_id)
    return lead_to("/")


async def _explained(service: Service, fields: dict[str, str], problem: Problem) -> Considered:
    """Return the problem with what there is to choose from; one of the queue or of the key stands as it is."""
    considered = await to_thread.run_sync(consider, service, fields)
    return considered if considered.problem is not None else refused(problem, considered.range)


def _form(request: Request, service: Service, visitor: Visitor, fields: dict[str, str], considered: Considered) -> Response:
    status = 200 if considered.problem is None or request.method == "GET" else CODES[considered.problem.code].status
    values: dict[str, Any] = {"fields": {**DEFAULTS, **fields}, "considered": considered, "key": secrets.token_urlsafe(16)}
    return page(request, service, "new.html", visitor, status, **values)


def _key_of(fields: dict[str, str]) -> str:
    """Return the key that the page was given when it was made: sent twice, the form makes one job."""
    key = fields.pop(_KEY, "")
    if not is_key(key):
        raise Problem("invalid_header", "the form came without its key; load the page again")
    return key
