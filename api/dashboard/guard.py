"""Who looks at a page, by cookie, and whether a form came from one of our own pages.

Where nobody needs a key, everybody is the one anonymous caller. Where keys are needed, the cookie's key is looked up each
time. Scopes are those of the key. A cookie opens nothing under ``/v1``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from anyio import to_thread
from fastapi import Depends, Request

from api.callers import ANONYMOUS, Caller
from api.dashboard.sessions import Session
from api.dependencies import Running
from api.errors import Problem
from api.service import Service
from jobs.keys import SCOPES

COOKIE = "slimtrim_session"
VISIT_COOKIE = "slimtrim_visit"
"""Of a visit without a key. Apart, because a browser that comes by a link of another site does not show the first one."""
_MOST_FIELDS = 100


class SignInNeeded(Exception):
    """There is no session, or its key is not valid any more."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who looks at a page."""

    caller: Caller
    session: Session
    is_new: bool
    """Whether the browser does not have the session's cookie yet."""

    @property
    def is_signed_in(self) -> bool:
        """Whether a key was shown."""
        return self.session.sha256 is not None

    def may(self, scope: str) -> bool:
        """Say whether the key allows it."""
        return scope in self.caller.scopes


def visitor_with(*scopes: str) -> Callable[..., Awaitable[Visitor]]:
    """Return the dependency that admits visitors whose key holds every named scope."""

    async def visitor(request: Request, service: Running) -> Visitor:
        found = await _visitor(request, service)
        add_headers(request, service.callers.count(found.caller))
        if missing := [scope for scope in scopes if not found.may(scope)]:
            raise Problem("insufficient_scope", f"this needs a key with the scope {', '.join(missing)}")
        return found

    return visitor


def add_headers(request: Request, headers: dict[str, str]) -> None:
    """Let the answer have these headers, whatever it is."""
    request.state.always = {**getattr(request.state, "always", {}), **headers}


def session_of(request: Request, service: Service) -> tuple[Session, bool]:
    """Return the browser's session, or a fresh one, and whether it is fresh."""
    for name in (COOKIE, VISIT_COOKIE):
        present = service.sessions.open(request.cookies.get(name))
        if present is not None and (present.sha256 is not None) == (name == COOKIE):
            return present, False
    return service.sessions.begin(), True


async def _visitor(request: Request, service: Service) -> Visitor:
    session, is_new = session_of(request, service)
    if service.callers.is_open:
        return Visitor(Caller(ANONYMOUS, frozenset(SCOPES)), session, is_new)
    caller = None if session.sha256 is None else await to_thread.run_sync(service.callers.holder, session.sha256)
    if caller is None:
        raise SignInNeeded
    return Visitor(caller, session, is_new)


AnyVisitor = Annotated[Visitor, Depends(visitor_with())]
JobLooker = Annotated[Visitor, Depends(visitor_with("jobs:read"))]
JobMaker = Annotated[Visitor, Depends(visitor_with("jobs:read", "jobs:write"))]
JobDeleter = Annotated[Visitor, Depends(visitor_with("jobs:read", "jobs:delete"))]
ReportLooker = Annotated[Visitor, Depends(visitor_with("reports:read"))]
ArtifactLooker = Annotated[Visitor, Depends(visitor_with("artifacts:read"))]


async def read_form(request: Request, service: Running) -> dict[str, str]:
    """Return the fields of a form that a page of ours sent from this browser, or refuse it."""
    _check_site(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Problem("unsupported_media_type", f"a form is application/x-www-form-urlencoded, not {kind[:100] or 'untyped'}")
    try:
        text = (await request.body()).decode("ascii")
        fields = dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict"))
    except ValueError as error:
        raise Problem("validation_failed", "the form cannot be read") from error
    session, _ = session_of(request, service)
    if not service.sessions.is_token(session, fields.pop("token", "")):
        raise Problem(
            "validation_failed", "the page is too old, or was not made for this browser; load it again and send it once more"
        )
    return fields


Form = Annotated[dict[str, str], Depends(read_form)]


def _check_site(request: Request) -> None:
    """Refuse what another site's page sends; browsers say where a form comes from, programs say nothing."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site not in (None, "same-origin"):
        raise Problem("invalid_header", f"a form must come from this service's own pages, not from Sec-Fetch-Site: {site[:40]}")
    # Only host and port: behind a proxy that ends TLS, the scheme here is another than the browser's.
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Problem("invalid_header", f"a form must come from this service's own pages, not from the Origin {origin[:100]!r}")
