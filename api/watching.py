"""Times every request, counts what is sent, and opens its span; the outermost layer, so that refusals count too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import Metrics
from jobs import traces

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"))
_NO_ROUTE = "none"


class Watching:
    """Wraps the application; it changes nothing about any answer."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = _Sent(send, self._metrics.streams.inc)
        began = time.monotonic()
        with traces.serving(Headers(scope=scope).get("traceparent")) as span:
            try:
                await self._app(scope, receive, sent)
            finally:
                if sent.is_stream:
                    self._metrics.streams.dec()
                method, route = _method_of(scope), route_of(scope)
                self._note(sent, method, route, time.monotonic() - began)
                span.update_name(f"{method} {route}")
                span.set_attributes(_attributes(scope, method, route, sent))

    def _note(self, sent: _Sent, method: str, route: str, seconds: float) -> None:
        self._metrics.sent_bytes.labels(route).inc(sent.bytes)
        if not sent.is_stream:  # it is open for as long as its job runs
            self._metrics.requests.labels(method, route, str(sent.status or "cut")).observe(seconds)


class _Sent:
    """Passes an answer on and looks at it."""

    def __init__(self, send: Send, on_stream: Callable[[], None]) -> None:
        self._send, self._on_stream = send, on_stream
        self.status: int | None = None
        self.bytes = 0
        self.is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            if self.is_stream:
                self._on_stream()
        await self._send(message)
        self.bytes += len(message.get("body", b""))


def route_of(scope: Scope) -> str:
    """Return the template of the route that serves the request, such as ``/v1/jobs/{job_id}``."""
    route: Any = scope.get("route")
    if route is None and "app" in scope:  # refused before the routing, or HEAD, which is routed as a GET of its own
        asked = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        route = next((route for route in scope["app"].routes if route.matches(asked)[0] is Match.FULL), None)
    return getattr(route, "path", _NO_ROUTE)


def _method_of(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _attributes(scope: Scope, method: str, route: str, sent: _Sent) -> dict[str, Any]:
    known = {"http.request.method": method, "http.route": route, "url.path": scope["path"]}
    if sent.status is not None:
        known["http.response.status_code"] = sent.status
    if request_id := scope.get("state", {}).get("request_id"):
        known["slimtrim.request_id"] = request_id
    return known
