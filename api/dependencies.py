"""What a route asks for in its signature: the service, a unit of work, who calls, and the body as a JobRequest."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated

import anyio
from anyio import to_thread
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import ValidationError

from api.errors import Problem
from api.pointers import faults_of
from api.schemas import JobRequest
from api.service import Service
from jobs.database import UnitOfWork, reading, unit_of_work
from jobs.keys import SCOPES, ApiKey
from jobs.settings import Settings

ANONYMOUS = "anonymous"
"""The one caller of a service without keys; owns all its jobs."""
_BODY_SECONDS = 60.0
_bearer = HTTPBearer(auto_error=False, description="An API key. Not needed where the service listens on loopback without keys.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


def get_service(request: Request) -> Service:
    """Return the service that the application was made with."""
    return request.app.state.service


Running = Annotated[Service, Depends(get_service)]


def get_work(service: Running) -> Generator[UnitOfWork]:
    """Give one writing transaction, committed when the route returns and before its answer is sent."""
    with unit_of_work(service.open_session, service.announce) as work:
        yield work


def get_reader(service: Running) -> Generator[UnitOfWork]:
    """Give a transaction that only reads and never waits for a writer."""
    with reading(service.open_reader) as work:
        yield work


# scope="function": the default runs what follows the yield after the answer is sent, and a caller could hold a
# success for a row that then fails to commit.
Work = Annotated[UnitOfWork, Depends(get_work, scope="function")]
Reader = Annotated[UnitOfWork, Depends(get_reader, scope="function")]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what they may do."""

    name: str
    scopes: frozenset[str]


def may(*scopes: str) -> Callable[..., Caller]:
    """Return the dependency that admits callers who hold every named scope."""

    def caller(service: Running, credentials: Credentials) -> Caller:
        return admit(service.settings, credentials, *scopes)

    return caller


AnyCaller = Annotated[Caller, Depends(may())]
JobReader = Annotated[Caller, Depends(may("jobs:read"))]
JobWriter = Annotated[Caller, Depends(may("jobs:write"))]
JobDeleter = Annotated[Caller, Depends(may("jobs:delete"))]
ArtifactReader = Annotated[Caller, Depends(may("artifacts:read"))]
ReportReader = Annotated[Caller, Depends(may("reports:read"))]
MetricsReader = Annotated[Caller, Depends(may("metrics:read"))]


def admit(settings: Settings, credentials: HTTPAuthorizationCredentials | None, *scopes: str) -> Caller:
    """Return the caller whose key this is, if it holds every named scope."""
    caller = identify(settings, credentials.credentials if credentials else None)
    if missing := sorted(set(scopes) - caller.scopes):
        raise Problem("insufficient_scope", f"this needs a key with the scope {', '.join(missing)}")
    return caller


def identify(settings: Settings, presented: str | None) -> Caller:
    """Return who presents a key; without any keys in the settings, everybody is the one anonymous caller."""
    if not settings.api_keys:
        return Caller(ANONYMOUS, frozenset(SCOPES))
    if not presented:
        raise Problem("missing_api_key", "send Authorization: Bearer <key>")
    found: ApiKey | None = None
    for key in settings.api_keys:  # all of them, so that the time says nothing about which one fits
        if key.matches(presented):
            found = key
    if found is None:
        raise Problem("invalid_api_key", "this API key is not one of this service's")
    return Caller(found.name, found.scopes)


def refuse_unknown_parameters(request: Request, *known: str, prefix: str | None = None) -> None:
    """Refuse a query parameter that the route does not know: a mistyped filter must not return everything."""
    for name in request.query_params:
        if name not in known and not (prefix is not None and name.startswith(prefix)):
            detail = f"there is no parameter {name[:100]!r}; known: {', '.join(known) or 'none'}"
            fault = {"pointer": None, "parameter": name[:100], "code": "extra_forbidden", "detail": detail}
            raise Problem("validation_failed", detail, errors=[fault])


async def read_job_request(request: Request) -> JobRequest:
    """Return the body as a request, or say what is wrong with it and where."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported_media_type", f"send the body as plain application/json, not {kind[:100] or 'untyped'}")
    body = b""
    with anyio.move_on_after(_BODY_SECONDS) as patience:
        body = await request.body()
    if patience.cancelled_caught:
        raise Problem("malformed_json", f"the body did not arrive within {_BODY_SECONDS:.0f} seconds")
    return await to_thread.run_sync(parse_job_request, body)  # a mebibyte takes a while


def parse_job_request(body: bytes) -> JobRequest:
    """Return a request from JSON text."""
    try:
        return JobRequest.model_validate_json(body, strict=True)
    except ValidationError as error:
        faults = faults_of(error, _parsed(body, error))
    first = faults[0]
    raise Problem("validation_failed", f"{first['pointer'] or 'the body'}: {first['detail']}", errors=faults)


def _parsed(body: bytes, error: ValidationError) -> object:
    """Return the body as plain data, or refuse it as no JSON at all."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise Problem("malformed_json", f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as refusal:
        raise Problem("malformed_json", "the body is not JSON, or is nested too deep") from refusal


Body = Annotated[JobRequest, Depends(read_job_request)]
