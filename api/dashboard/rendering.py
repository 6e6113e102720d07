"""Templates become answers: every value escaped, and the headers that let a page do nothing but what ours do."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, RedirectResponse, Response

from api.dashboard import words
from api.dashboard.guard import COOKIE, VISIT_COOKIE, Visitor
from api.dashboard.plotting import frontier
from api.dashboard.sessions import SESSION_S, Session
from api.service import Service
from compression.progress import STAGES
from jobs.status import TERMINAL, JobStatus

_HERE = Path(__file__).parent
STATIC = {"dashboard.css": "text/css", "dashboard.js": "text/javascript"}
"""Every file that is served, and its media type."""
SAFETY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    # Not no-referrer: a browser would then send our own forms with the Origin "null".
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Headers of every page, and of every answer that stands for one."""


def page(request: Request, service: Service, name: str, visitor: Visitor | None, status: int = 200, **values: Any) -> Response:
    """Return a template as a page; a browser that is new gets its cookie with it."""
    token = "" if visitor is None else service.sessions.token(visitor.session)
    answer = HTMLResponse(render(name, visitor=visitor, token=token, **values), status)
    if visitor is not None and visitor.is_new:
        give_cookie(request, answer, service, visitor.session)
    return answer


def render(template_name: str, **values: Any) -> str:
    """Return a template's text."""
    return _environment().get_template(template_name).render(values)


def lead_to(path: str) -> Response:
    """Send the browser to another page, after a form."""
    return RedirectResponse(path, 303)


def give_cookie(request: Request, answer: Response, service: Service, session: Session) -> None:
    """Set the session's cookie; no script reads it, no other site's page sends it."""
    name, value = VISIT_COOKIE if session.sha256 is None else COOKIE, service.sessions.seal(session)
    answer.set_cookie(name, value, max_age=SESSION_S, path="/", secure=is_secure(request), httponly=True, samesite="strict")


def is_secure(request: Request) -> bool:
    """Say whether the browser speaks https; believing a proxy's word can only make the cookie stricter."""
    return request.url.scheme == "https" or request.headers.get("x-forwarded-proto", "").strip().lower() == "https"


@cache
def static(name: str) -> bytes:
    """Return a file of the dashboard, read once."""
    return (_HERE / "static" / name).read_bytes()


@cache
def asset(name: str) -> str:
    """Return the address of a file, which changes with its content."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(static(name)).digest())[:12].decode()
    return f"/assets/{name}?v={digest}"


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(_HERE / "templates")
    environment: Any = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    environment.filters |= {
        "size": words.size, "exact_size": words.exact_size, "sized": words.sized, "share": words.share, "number": words.number,
        "timed": words.timed, "left": words.left, "step_words": words.step_words, "clock": words.clock,
        "told": words.told,
    }  # fmt: skip
    environment.globals |= {
        "asset": asset, "frontier": frontier, "between": words.between, "statuses": list(JobStatus), "stages": STAGES,
        "terminal": TERMINAL,
    }  # fmt: skip
    return environment
