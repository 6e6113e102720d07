"""What a route asks for in its signature: the service, a unit of work, who calls, and the body as a JobRequest."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator
from typing import Annotated

import anyio
from anyio import to_thread
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import ValidationError

from api.callers import Caller
from api.errors import Problem
from api.pointers import faults_of
from api.schemas import JobRequest
from api.service import Service
from jobs.database import UnitOfWork, reading, unit_of_work

_BODY_SECONDS = 60.0
_bearer = HTTPBearer(auto_error=False, description="An API key. Not needed where the service listens on loopback without keys.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


async def get_service(request: Request) -> Service:
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


def may(*scopes: str) -> Callable[..., Awaitable[Caller]]:
    """Return the dependency that admits callers who hold every named scope."""

    async def caller(request: Request, service: Running, credentials: Credentials) -> Caller:
        return await admit(request, service, credentials, *scopes)

    return caller


AnyCaller = Annotated[Caller, Depends(may())]
JobReader = Annotated[Caller, Depends(may("jobs:read"))]
JobWriter = Annotated[Caller, Depends(may("jobs:write"))]
JobDeleter = Annotated[Caller, Depends(may("jobs:delete"))]
ArtifactReader = Annotated[Caller, Depends(may("artifacts:read"))]
ReportReader = Annotated[Caller, Depends(may("reports:read"))]
MetricsReader = Annotated[Caller, Depends(may("metrics:read"))]


async def _link_holder(request: Request, service: Running, credentials: Credentials) -> Caller | None:
    if "signature" in request.query_params:
        return None
    return await admit(request, service, credentials, "artifacts:read")


LinkHolder = Annotated[Caller | None, Depends(_link_holder)]
"""Who may read artifacts; None for whoever holds a signed link, which the route checks."""


async def admit(request: Request, service: Service, credentials: HTTPAuthorizationCredentials | None, *scopes: str) -> Caller:
    """Return the caller whose key this is, if it holds every named scope and has not called too often."""
    presented = credentials.credentials if credentials else None
    caller = service.callers.recall(presented)
    if caller is None:
        address = request.client.host if request.client else ""
        caller = await to_thread.run_sync(service.callers.identify, presented, address)
    request.state.always = service.callers.count(caller)
    if missing := sorted(set(scopes) - caller.scopes):
        raise Problem("insufficient_scope", f"this needs a key with the scope {', '.join(missing)}")
    return caller


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
