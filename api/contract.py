"""The published OpenAPI document: what the framework derives from the routes, and what it cannot know.

That is the request body, which a dependency reads so that a wrong key is told before a wrong body; and the problems,
of which each route names the statuses it can answer with.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from api.errors import CODES, PROBLEM_JSON
from api.schemas import NAMED, JobRequest, ProblemView
from compression.plan import Plan
from compression.report import Report

_REF = "#/components/schemas/{model}"
_EVERYWHERE = (400, 405, 406, 500, 503)
"""Statuses that any route may answer with."""

BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="JobRequest")}}},
    }
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route declares about the problems it can answer with, beside those that any route may."""
    return {status: _problem(status) for status in sorted({*statuses, *_EVERYWHERE})}


def header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """Return the declaration of an optional request header."""
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string", **schema}}


PREFER = header("Prefer", 'wait=N: hold the answer up to N seconds, 60 at most. "Preference-Applied" confirms it.')
IDEMPOTENCY_KEY = header(
    "Idempotency-Key", "Same key and body: the same job, for 7 days. Another body: 422.", minLength=1, maxLength=255
)
LAST_EVENT_ID = header("Last-Event-ID", "Of a stream: the id of the event that the client saw last; the stream goes on after it.")
IF_NONE_MATCH = header("If-None-Match", "An ETag that the caller has; 304 when it is still right.")
FILE_HEADERS = [
    IF_NONE_MATCH,
    header("If-Match", "The ETag of the file that is wanted; 412 when it is another one."),
    header("Range", "One range of bytes, answered with 206."),
    header("If-Range", "Range applies only to the file with this ETag."),
]


def install_contract(app: FastAPI) -> None:
    """Make the application publish the completed document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = document


def _build(app: FastAPI) -> dict[str, Any]:
    built = get_openapi(
        title=app.title, version=app.version, openapi_version="3.1.0", summary=app.summary, routes=app.routes
    )  # fmt: skip
    schemas = cast("dict[str, Any]", built.setdefault("components", {}).setdefault("schemas", {}))
    shown: tuple[tuple[type[BaseModel], Literal["validation", "serialization"]], ...] = (
        (JobRequest, "validation"), (Plan, "serialization"), (Report, "serialization"), (ProblemView, "serialization"),
    )  # fmt: skip
    for model, mode in shown:
        schema = model.model_json_schema(ref_template=_REF, mode=mode)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operation in (operation for path in built["paths"].values() for operation in path.values()):
        # Where a route has parameters, the framework declares its own kind of 422.
        if "application/json" in operation["responses"].get("422", {}).get("content", {}):
            operation["responses"]["422"] = _problem(422)
    built["components"]["schemas"] = dict(sorted(schemas.items()))
    return _with_references(built)


def _with_references(value: Any) -> Any:
    """Replace every mark of a named schema by a reference to it."""
    if isinstance(value, list):
        return [_with_references(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    members = cast("dict[str, Any]", value)
    if NAMED in members:
        return {"$ref": _REF.format(model=members[NAMED])}
    return {name: _with_references(member) for name, member in members.items()}


_TEXT = {"schema": {"type": "string"}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": _TEXT},
    405: {"Allow": _TEXT},
    416: {"Content-Range": _TEXT},
    429: {
        "Retry-After": {"description": "Seconds.", **_TEXT},
        "RateLimit": {"description": "What is left, and the seconds until there is more.", **_TEXT},
        "RateLimit-Policy": {"description": "How many requests a minute are served to a caller.", **_TEXT},
    },
    503: {"Retry-After": {"description": "Seconds.", **_TEXT}},
}
"""Status -> what a problem of that status says in headers."""


def _problem(status: int) -> dict[str, Any]:
    codes = ", ".join(name for name, code in CODES.items() if code.status == status)
    headers = {"headers": _HEADERS[status]} if status in _HEADERS else {}
    return {
        "description": f"A problem: {codes}",
        **headers,
        "content": {PROBLEM_JSON: {"schema": {"$ref": _REF.format(model="ProblemView")}}},
    }
