"""A service that answers as a test says, over real sockets: it can fail, lie, and hang up in the middle of a body."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from slimtrim_client.retries import Patience

HASTY = Patience(tries=4, first_wait_s=0.001, longest_wait_s=0.002)
"""Tries as often as it should, but does not wait."""


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """An answer. ``cut``: hang up after so many bytes of the body."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


HANG_UP = Reply(cut=-1)
"""No answer at all."""
Act = Callable[[Seen], Reply]


class Scripted:
    """The service: what it answers by method and path, and what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Act | list[Reply]] = {}
        """``"GET /v1/jobs/job_x"`` -> a function, or answers in order, of which the last stays."""
        self.seen: list[Seen] = []
        self.url = ""
        self._lock = threading.Lock()

    def asked(self, what: str) -> list[Seen]:
        """Every request of a method and path, in order."""
        return [seen for seen in self.seen if f"{seen.method} {seen.path}" == what]

    def answer(self, seen: Seen) -> Reply:
        with self._lock:
            self.seen.append(seen)
            found = self.answers.get(f"{seen.method} {seen.path}")
            if isinstance(found, list):
                return found.pop(0) if len(found) > 1 else found[0]
        return problem(404, "not_found", f"there is no {seen.path}") if found is None else found(seen)


def problem(status: int, code: str, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    """An answer that says no."""
    document = {"type": "urn:x", "title": code, "status": status, "code": code, "detail": detail, "retryable": False, **more}
    return Reply(status, document, {"Content-Type": "application/problem+json", **(headers or {})})


def job(status: str = "running", **more: Any) -> dict[str, Any]:
    """A job as the contract has it."""
    progress = {"fraction": 0.5, "block": 1, "blocks": 2, "message": None, "eta_at": None}
    result = {"bytes_before": 100, "bytes_after": 25, "ratio": 4.0, "retention": 0.9, "divergence": 0.1}
    return {
        "id": "job_x", "object": "job", "status": status, "stage": None, "status_reason": None, "progress": progress,
        "request": {"model": "m"}, "result": result if status == "succeeded" else None, "labels": {},
        "created_at": "2026-01-01T00:00:00Z", "finished_at": None, "a_field_of_tomorrow": 1, **more,
    }  # fmt: skip


def event(seq: int, kind: str = "job.progress", **data: Any) -> dict[str, Any]:
    """An event as the contract has it."""
    return {"seq": seq, "type": kind, "at": "2026-01-01T00:00:00Z", "data": data}


def streamed(*events: dict[str, Any], end: bool = False, heartbeat: bool = False, retry_ms: int = 1) -> Reply:
    """A stream of events; without ``end`` it breaks off."""
    text = f"retry: {retry_ms}\n\n" + (": \n\n" if heartbeat else "")
    text += "".join(f"id: {each['seq']}\nevent: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events)
    text += "event: end\ndata: {}\n\n" if end else ""
    return Reply(200, text.encode(), {"Content-Type": "text/event-stream"})


@contextmanager
def a_server() -> Iterator[Scripted]:
    """A scripted service for as long as the context is open."""
    script = Scripted()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"script": script}))
    server.daemon_threads = True
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    script: Scripted

    def _do(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.script.answer(Seen(self.command, parts.path, dict(parse_qsl(parts.query)), headers, body))
        self.close_connection = True
        if reply is HANG_UP:
            return
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        if reply.status not in (204, 304):
            self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content if reply.cut is None else reply.content[: reply.cut])

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def do_DELETE(self) -> None:
        self._do()

    def log_message(self, format: str, *args: Any) -> None:
        pass
