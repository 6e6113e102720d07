"""Signing in and out, files that belong to the pages, and what a visitor takes away: report and artifact.

Reports and files are served by the functions of ``/v1``, under paths of the dashboard, where the cookie counts.
"""

from __future__ import annotations

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from api.callers import Caller
from api.dashboard.guard import COOKIE, AnyVisitor, ArtifactLooker, Form, ReportLooker, Visitor, session_of
from api.dashboard.rendering import STATIC, asset, give_cookie, lead_to, page, static
from api.dashboard.trouble import PageRoute
from api.dependencies import Reader, Running
from api.errors import CODES, Problem
from api.routes.artifacts import get_file
from api.routes.jobs import get_report
from jobs.keys import digest

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_LONGEST_KEY = 512
_NOBODY = Caller("", frozenset())
_REPORT_SAFETY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


@router.get("/sign-in")
async def ask_for_key(request: Request, service: Running, following: Annotated[str, Query(alias="next")] = "/") -> Response:
    """Show where the key is typed."""
    if service.callers.is_open:
        return lead_to("/")
    session, is_new = session_of(request, service)
    return _door(request, service, Visitor(_NOBODY, session, is_new), following)


@router.post("/sign-in")
async def sign_in(request: Request, service: Running, fields: Form) -> Response:
    """Exchange a key for a session."""
    if service.callers.is_open:
        return lead_to("/")
    key, following = fields.get("key", "").strip(), fields.get("next", "/")
    address = request.client.host if request.client else ""
    try:
        if len(key) > _LONGEST_KEY:
            raise Problem("invalid_api_key", "this API key is not one of this service's")
        await to_thread.run_sync(service.callers.identify, key, address)
    except Problem as problem:
        session, is_new = session_of(request, service)
        return _door(request, service, Visitor(_NOBODY, session, is_new), following, problem)
    answer = lead_to(_own_path(following))
    give_cookie(request, answer, service, service.sessions.begin(digest(key)))
    return answer


@router.post("/sign-out")
async def sign_out(visitor: AnyVisitor, fields: Form) -> Response:
    """Let the browser forget its session."""
    answer = lead_to("/sign-in")
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


@router.get("/assets/{name}")
async def get_asset(request: Request, name: str) -> Response:
    """Return a file of the pages; its address changes with its content, so a browser keeps it."""
    if name not in STATIC:
        raise Problem("not_found", f"there is no file {name[:100]!r}")
    current = request.query_params.get("v") == asset(name).rpartition("=")[2]
    keep = "public, max-age=31536000, immutable" if current else "no-cache"
    return Response(static(name), media_type=STATIC[name], headers={"Cache-Control": keep})


@router.get("/jobs/{job_id}/report")
def show_report(request: Request, visitor: ReportLooker, work: Reader, job_id: str) -> Response:
    """Return the report, in the form that the browser asks for."""
    answer = get_report(request, visitor.caller, work, job_id)
    # The report is a page of its own, with its style inside and no script.
    request.state.always.pop("Content-Security-Policy")
    answer.headers.setdefault("Content-Security-Policy", _REPORT_SAFETY)
    return answer


@router.get("/jobs/{job_id}/files/{path:path}")
def download(request: Request, visitor: ArtifactLooker, work: Reader, service: Running, job_id: str, path: str) -> Response:
    """Return a file of the artifact."""
    return get_file(request, visitor.caller, work, service, job_id, path)


def _door(request: Request, service: Running, visitor: Visitor, following: str, problem: Problem | None = None) -> Response:
    status = 200 if problem is None else CODES[problem.code].status
    # A browser that follows another site's link keeps its cookie to itself, once.
    is_led = request.headers.get("sec-fetch-site") == "cross-site"
    answer = page(
        request, service, "sign_in.html", visitor, status, following=_own_path(following), problem=problem, is_led=is_led
    )
    if problem is not None:
        answer.headers.update(problem.headers)
    return answer


def _own_path(path: str) -> str:
    """Return the path if it leads to a page of ours, else the list: a sign-in must not send anybody elsewhere."""
    is_ours = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() and "\\" not in path
    return path if is_ours and not path.startswith("/sign-") else "/"
