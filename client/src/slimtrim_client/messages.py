"""Every call of the contract as a message: what is sent, and what an answer means. Nothing here sends anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote

from slimtrim_client.documents import Body
from slimtrim_client.errors import BadInput, Problem, Refused, Unavailable, UnexpectedAnswer

JSON = "application/json"
HTML = "text/html"
EVENT_STREAM = "text/event-stream"
TOO_MANY = 429
NOT_FOUND = 404
SILENCE_S = 45.0
"""A stream that says nothing for so long is dead: the service sends a heartbeat every 15 seconds."""


@dataclass(frozen=True)
class Request:
    """What is sent. All of these may be sent again: they read, or carry a key, or mean the same twice."""

    method: str
    path: str
    parameters: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes | None = None
    read_s: float | None = None
    """How long an answer may be silent; None: as the client is set."""

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Answer:
    """What came back; names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def media_type(self) -> str:
        """The kind of body, without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Failed:
    """No answer came, or it broke off."""

    reason: str


def post_plan(body: Body) -> Request:
    """Ask what a request would do."""
    return _post("/v1/plans", json_of(body))


def post_job(body: Body, key: str) -> Request:
    """Create a job; the key makes it one job however often this is sent."""
    return _post("/v1/jobs", json_of(body), {"Idempotency-Key": key})


def get_job(job_id: str, *, tag: str | None = None, wait_s: int = 0) -> Request:
    """Read a job; with a tag and some seconds, when it differs from what the tag stands for."""
    headers = {"Accept": JSON}
    if tag is not None:
        headers["If-None-Match"] = tag
    if wait_s:
        headers["Prefer"] = f"wait={wait_s}"
    return Request("GET", _job(job_id), headers=headers, read_s=wait_s + 30.0 if wait_s else None)


def list_jobs(
    *, status: Iterable[str] = (), model: str | None = None, labels: Mapping[str, str] | None = None,
    limit: int = 20, after: str | None = None,
) -> Request:  # fmt: skip
    """Read a page of jobs."""
    parameters = [("status", each) for each in status]
    parameters += [("model", model)] if model else []
    parameters += [(f"label.{name}", value) for name, value in (labels or {}).items()]
    parameters += [("limit", str(limit))]
    parameters += [("after", after)] if after else []
    return Request("GET", "/v1/jobs", tuple(parameters), {"Accept": JSON})


def cancel_job(job_id: str) -> Request:
    """Ask for a job's end."""
    return _post(f"{_job(job_id)}/cancel")


def retry_job(job_id: str, key: str) -> Request:
    """Ask for a new job that goes on where this one ended."""
    return _post(f"{_job(job_id)}/retry", None, {"Idempotency-Key": key})


def delete_job(job_id: str) -> Request:
    """Remove a job that is over, and its artifact."""
    return Request("DELETE", _job(job_id), headers={"Accept": JSON})


def get_report(job_id: str, media_type: str = JSON) -> Request:
    """Read what was done and what it cost."""
    return Request("GET", f"{_job(job_id)}/report", headers={"Accept": media_type})


def get_manifest(job_id: str) -> Request:
    """Read which files there are, with links to them."""
    return Request("GET", f"{_job(job_id)}/artifact", headers={"Accept": JSON})


def get_events(job_id: str, after: int) -> Request:
    """Read a page of events."""
    return Request("GET", f"{_job(job_id)}/events", (("after", str(after)), ("limit", "1000")), {"Accept": JSON})


def stream_events(job_id: str, after: int) -> Request:
    """Open the stream of events after a number."""
    headers = {"Accept": EVENT_STREAM, "Cache-Control": "no-store"}
    if after:
        headers["Last-Event-ID"] = str(after)
    return Request("GET", f"{_job(job_id)}/events", headers=headers, read_s=SILENCE_S)


def json_of(body: Body) -> bytes:
    """Return a body as it is sent."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadInput(f"the request cannot be written as JSON: {error}") from error


def document_of(request: Request, answer: Answer) -> dict[str, Any]:
    """Return the object that a good answer holds."""
    document = _parsed(answer)
    if document is None:
        raise UnexpectedAnswer(
            f"{request} was answered {answer.status} with {answer.media_type or 'no type'} and not with a JSON object; "
            "is this the address of a slimtrim service?"
        )
    return document


def refusal_of(asked: str, answer: Answer) -> Problem:
    """Return the error that an answer which is not a success stands for."""
    kind = Unavailable if answer.status >= 500 or answer.status == TOO_MANY else Refused
    document = _parsed(answer)
    if document is None or "code" not in document:
        said = " ".join(answer.body[:300].decode(errors="replace").split())
        where = answer.headers.get("location")
        document = {"detail": f"answered {answer.status}" + (f" to {where}" if where else "") + (f": {said}" if said else "")}
    return kind(asked, answer.status, document)


def _parsed(answer: Answer) -> dict[str, Any] | None:
    try:
        document = json.loads(answer.body)
    except ValueError:
        return None
    return cast("dict[str, Any]", document) if isinstance(document, dict) else None


def _post(path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Request:
    kind = {} if body is None else {"Content-Type": JSON}
    return Request("POST", path, headers={"Accept": JSON, **kind, **(headers or {})}, body=body)


def _job(job_id: str) -> str:
    if not job_id or job_id in (".", ".."):
        raise BadInput(f"{job_id!r} is not the id of a job; it looks like job_019a...")
    return f"/v1/jobs/{quote(job_id, safe='')}"
