"""One table from code to status, and problem+json (RFC 9457) for every answer that is not a success.

The library and ``jobs`` raise errors of one tree with a ``code``; the codes below are the contract's. Whatever is not
in the table is our own fault: logged with its traceback, answered as ``internal`` without one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from compression.errors import GatedModel, RequestError, SlimtrimError
from jobs.errors import StorageUnavailable

log = logging.getLogger("slimtrim.api")

PROBLEM_JSON = "application/problem+json"
RETRY_SOON_S, RETRY_LATER_S = 1, 10
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True, slots=True)
class Code:
    """What a code means to a program: its status, its title, and whether the same request may succeed later."""

    status: int
    title: str
    retryable: bool = False


CODES: dict[str, Code] = {
    "malformed_json": Code(400, "The body is not JSON"),
    "invalid_header": Code(400, "A header has a value that cannot be used"),
    "invalid_cursor": Code(400, "The cursor is not one that this service gave"),
    "missing_api_key": Code(401, "An API key is needed"),
    "invalid_api_key": Code(401, "The API key or the signature is not valid"),
    "insufficient_scope": Code(403, "The API key may not do this"),
    "not_found": Code(404, "There is nothing here"),
    "method_not_allowed": Code(405, "The method is not supported here"),
    "not_acceptable": Code(406, "None of the accepted media types can be given"),
    "job_active": Code(409, "The job has not ended", retryable=True),
    "job_finished": Code(409, "The job has ended"),
    "report_not_ready": Code(409, "There is no report yet", retryable=True),
    "artifact_not_ready": Code(409, "There is no artifact yet", retryable=True),
    "idempotency_in_flight": Code(409, "The same request is being worked on", retryable=True),
    "precondition_failed": Code(412, "The file is not the one that If-Match names"),
    "body_too_large": Code(413, "The body is too large"),
    "unsupported_media_type": Code(415, "The body must be JSON"),
    "range_not_satisfiable": Code(416, "The range lies outside the file"),
    "validation_failed": Code(422, "The request is not what the contract allows"),
    "model_not_found": Code(422, "There is no such model"),
    "unsupported_architecture": Code(422, "The architecture is not supported"),
    "not_a_moe": Code(422, "The model has no routed experts"),
    "unsafe_checkpoint": Code(422, "The checkpoint holds pickled weights only"),
    "broken_checkpoint": Code(422, "The checkpoint is broken"),
    "remote_code_required": Code(422, "The model asks for code of its own"),
    "target_unreachable": Code(422, "The target is smaller than any plan"),
    "recipe_exceeds_target": Code(422, "The recipe leaves more than the target"),
    "not_loadable_in_profile": Code(422, "The artifact would not open in the profile's engines"),
    "impossible_step": Code(422, "A step asks for a model that cannot be"),
    "not_available": Code(422, "This is known but not built yet"),
    "quantized_source": Code(422, "The model is quantized in a way that is not read"),
    "idempotency_key_reused": Code(422, "The Idempotency-Key was used with another body"),
    "source_not_allowed": Code(422, "The source may not be read"),
    "rate_limited": Code(429, "Too many requests", retryable=True),
    "queue_full": Code(429, "The queue is full", retryable=True),
    "internal": Code(500, "The service failed"),
    "unavailable": Code(503, "The service is not available", retryable=True),
    "source_unavailable": Code(503, "The model's source did not answer", retryable=True),
    "draining": Code(503, "The service is stopping", retryable=True),
}
"""Every code that an answer can carry, with its status."""
_ABOUT_THE_MODEL = {
    "model_not_found", "unsupported_architecture", "not_a_moe", "unsafe_checkpoint", "broken_checkpoint",
    "remote_code_required", "quantized_source", "source_unavailable",
}  # fmt: skip


class Problem(Exception):
    """An answer that is not a success, said by the HTTP face itself."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        """``members`` are extra members of the body, such as ``smallest_possible_bytes``."""
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})
        self.members = members


def problem_response(problem: Problem, request_id: str) -> Response:
    """Return the answer that tells a problem."""
    code = CODES[problem.code]
    body = {
        "type": f"urn:slimtrim:problem:{problem.code}",
        "title": code.title,
        "status": code.status,
        "detail": problem.detail,
        "instance": f"urn:slimtrim:request:{request_id}",
        "code": problem.code,
        "retryable": code.retryable,
        **({"errors": list(problem.errors)} if problem.errors else {}),
        **problem.members,
    }
    headers = dict(problem.headers)
    if code.status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_LATER_S))
    if problem.code == "idempotency_in_flight":
        headers.setdefault("Retry-After", str(RETRY_SOON_S))
    if code.status == 401:
        headers.setdefault("WWW-Authenticate", 'Bearer realm="slimtrim"')
    return Response(json.dumps(body, ensure_ascii=False), code.status, headers, media_type=PROBLEM_JSON)


def problem_of(error: Exception) -> Problem:
    """Return the problem that an error is to the caller; what is not the caller's turn says nothing of its cause."""
    match error:
        case Problem():
            return error
        case GatedModel():  # in a job's status_reason it has its own code; to a request it is a source we may not read
            return Problem("source_not_allowed", error.message, errors=[_fault("/model", "gated_model", error.message)])
        case StorageUnavailable():
            return Problem("unavailable", "the artifact store does not answer; try again later")
        case RequestError() if error.code in CODES:
            pointer = "/model" if error.pointer is None and error.code in _ABOUT_THE_MODEL else error.pointer
            faults = [] if pointer is None else [_fault(pointer, error.code, error.message)]
            return Problem(error.code, error.message, errors=faults, **error.details)
        case DBAPIError() | PoolTimeout():
            return Problem("unavailable", "the database does not answer; try again later")
        case _:
            return Problem("internal", "the service failed; its log has the cause under this request's id")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the routes an answer in problem+json."""
    app.add_exception_handler(Problem, _answer)
    app.add_exception_handler(SlimtrimError, _answer)
    app.add_exception_handler(DBAPIError, _answer)
    app.add_exception_handler(PoolTimeout, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid_parameters)
    app.add_exception_handler(HTTPException, _answer_framework_error)


def answer_failure(error: Exception, request_id: str) -> Response:
    """Return the answer for an error, and log it when it is ours."""
    problem = problem_of(error)
    if CODES[problem.code].status >= 500:
        log.error("request failed", extra={"request_id": request_id, "code": problem.code}, exc_info=error)
    return problem_response(problem, request_id)


def _answer(request: Request, error: Exception) -> Response:
    return answer_failure(error, request.state.request_id)


def _answer_invalid_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [
        {"pointer": None, "parameter": str(fault["loc"][1]), "code": fault["type"], "detail": fault["msg"]}
        for fault in error.errors()
    ]
    first = faults[0]
    return _answer(request, Problem("validation_failed", f"parameter {first['parameter']!r}: {first['detail']}", errors=faults))


def _answer_framework_error(request: Request, error: Exception) -> Response:
    """Translate what the router says: an unknown path or an unsupported method."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(allowed_methods(request))
        detail = f"{request.method} is not supported here; supported: {allowed}"
        return _answer(request, Problem("method_not_allowed", detail, headers={"Allow": allowed}))
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _answer(
            request, Problem("not_found", f"there is no {request.url.path[:200]!r}; /openapi.json lists what there is")
        )
    return _answer(request, Problem("malformed_json", f"the request cannot be read: {error.detail}"))


def allowed_methods(request: Request) -> list[str]:
    """Return every method that any route supports at this path; the router itself knows only of the first route."""
    methods = [method for method in _METHODS if any(_matches(route, request, method) for route in request.app.routes)]
    return [*methods, "HEAD"] if "GET" in methods else methods


def _matches(route: BaseRoute, request: Request, method: str) -> bool:
    return route.matches({**request.scope, "method": method})[0] is Match.FULL


def _fault(pointer: str, code: str, detail: str) -> dict[str, str]:
    return {"pointer": pointer, "code": code, "detail": detail}
