"""What holds for every request, whatever its route: an id, a size limit, a trusted name, and an answer even to a crash.

Plain ASGI, because the body limit must act while a body is being read, chunked or not, and a class per rule would
hide that the order matters: the id first, so that every refusal below it carries one.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.callers import Callers
from api.errors import Problem, answer_failure
from jobs.logs import bind_fields
from jobs.settings import is_loopback

log = logging.getLogger("slimtrim.api")

MAX_BODY = 2**20
_PROBES = frozenset(("/livez", "/readyz"))
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ALWAYS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Manners:
    """Wraps the application; where nobody needs a key, only this machine's own names are served."""

    def __init__(self, app: ASGIApp, *, callers: Callers) -> None:
        self._app = app
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        bind_fields(request_id=request_id)  # every request runs in a context of its own
        answer = _Answer(send, state, with_body=scope["method"] != "HEAD")
        began = time.monotonic()
        try:
            if self._callers.must_look and scope["path"] not in _PROBES:
                await to_thread.run_sync(self._callers.look)
            if self._callers.is_open:
                _check_local(headers)
            await self._app(_as_get(scope), _limited(receive, headers), answer)
        except Exception as error:
            if answer.started:  # too late to say anything else; the cut connection says it
                raise
            await answer_failure(error, request_id)(scope, receive, answer)
        finally:
            _note(scope, answer.status, request_id, seconds=time.monotonic() - began)


class _Answer:
    """Passes an answer on, with the headers that every answer has."""

    def __init__(self, send: Send, state: dict[str, Any], *, with_body: bool) -> None:
        self._send = send
        self._state = state
        self._with_body = with_body
        self.started = False
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._state["request_id"]
            headers.setdefault("Cache-Control", "no-store")
            for name, value in {**_ALWAYS, **self._state.get("always", {})}.items():
                headers[name] = value
        elif message["type"] == "http.response.body" and not self._with_body:
            message = {**message, "body": b""}
        await self._send(message)


def _note(scope: Scope, status: int | None, request_id: str, *, seconds: float) -> None:
    """Log the request, without its query: a link's signature is in there."""
    level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
    fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
    log.log(level, "request", extra={**fields, "seconds": round(seconds, 4)})


def _request_id(headers: Headers) -> str:
    """Return the caller's own id if it is harmless in a log, else a fresh one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _as_get(scope: Scope) -> Scope:
    """HEAD is GET without the body; routes that would read a file for it look at ``state.head``."""
    if scope["method"] != "HEAD":
        return scope
    scope["state"]["head"] = True
    return {**scope, "method": "GET"}


def _check_local(headers: Headers) -> None:
    """Refuse a web page that reaches a keyless service through a name of its own, or posts to it from elsewhere."""
    host = headers.get("host", "")
    if not is_loopback(_hostname(f"//{host}")):
        raise Problem("invalid_header", f"without API keys only localhost is served, not the Host {host[:100]!r}")
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_hostname(origin)):
        raise Problem("invalid_header", f"without API keys no page of the Origin {origin[:100]!r} may call")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _limited(receive: Receive, headers: Headers) -> Receive:
    """Count the body as it arrives; the stated length is believed only when it is already too much."""
    stated = headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > MAX_BODY:
        raise _too_large()
    arrived = 0

    async def receive_counted() -> Message:
        nonlocal arrived
        message = await receive()
        arrived += len(message.get("body", b""))
        if arrived > MAX_BODY:
            raise _too_large()
        return message

    return receive_counted


def _too_large() -> Problem:
    return Problem(
        "body_too_large", f"a body may have {MAX_BODY} bytes; put longer text in a file", headers={"Connection": "close"}
    )
