"""What goes wrong on a page is a page: the same codes and words as problem+json, for people.

``PageRoute`` is the class of every route here. It puts the safety headers on whatever is answered, sends visitors without a
session to the sign-in, and turns every error into a page. Unknown paths outside ``/v1`` are a page for browsers alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.dashboard.guard import SignInNeeded, add_headers
from api.dashboard.rendering import SAFETY, lead_to, page
from api.errors import CODES, Problem, problem_of
from api.headers import preferred

log = logging.getLogger("slimtrim.api")

_HTML, _JSON = "text/html", "application/json"


class PageRoute(APIRoute):
    """A route of the dashboard."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with its errors as pages."""
        handle = super().get_route_handler()

        async def handle_as_page(request: Request) -> Response:
            add_headers(request, SAFETY)
            try:
                return await handle(request)
            except SignInNeeded:
                return lead_to(f"/sign-in?{urlencode({'next': request.url.path})}" if request.method == "GET" else "/sign-in")
            except RequestValidationError as error:
                first = error.errors()[0]
                return problem_page(request, Problem("validation_failed", f"{first['loc'][-1]}: {first['msg']}"))
            except Exception as error:
                return problem_page(request, error)

        return handle_as_page


def problem_page(request: Request, error: Exception) -> Response:
    """Return an error as a page, and log it when it is ours."""
    problem, request_id = problem_of(error), request.state.request_id
    code = CODES[problem.code]
    if code.status >= 500:
        log.error("page failed", extra={"request_id": request_id, "code": problem.code}, exc_info=error)
    answer = page(
        request, request.app.state.service, "problem.html", None, code.status, title=code.title, problem=problem,
        number=code.status, request_id=request_id,
    )  # fmt: skip
    answer.headers.update(problem.headers)
    if code.status in (429, 503):
        answer.headers.setdefault("Retry-After", "10")
    return answer


def install_pages_for_errors(app: FastAPI) -> None:
    """Answer a browser that is lost outside ``/v1`` with a page; everybody else gets what they got before."""
    before: Any = app.exception_handlers[HTTPException]

    def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code != 404 or request.url.path.startswith("/v1") or not _is_browser(request):
            return before(request, error)
        add_headers(request, SAFETY)
        return problem_page(request, Problem("not_found", f"there is no page {request.url.path[:200]!r}"))

    app.add_exception_handler(HTTPException, answer)


def _is_browser(request: Request) -> bool:
    try:
        return preferred(request.headers, _JSON, _HTML) == _HTML
    except Problem:
        return False
