"""A small OTLP/HTTP collector: what a service sends as protobuf, as plain spans."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """One span."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, str]


@dataclass
class Collector:
    """Where spans arrive."""

    url: str
    spans: list[Seen] = field(default_factory=list)

    def named(self, name: str) -> list[Seen]:
        """Return the spans of a name, the earliest first."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.began_ns)

    def below(self, parent: Seen) -> list[Seen]:
        """Return the spans whose parent this is, the earliest first."""
        return sorted((span for span in self.spans if span.parent_id == parent.span_id), key=lambda span: span.began_ns)

    def take(self, body: bytes) -> None:
        """Read one batch."""
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {pair.key: pair.value.string_value for pair in group.resource.attributes}["service.name"]
            for scope in group.scope_spans:
                for span in scope.spans:
                    attributes = {
                        pair.key: pair.value.string_value or str(pair.value.int_value) for pair in span.attributes
                    }  # fmt: skip
                    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
                    times = span.start_time_unix_nano, span.end_time_unix_nano
                    self.spans.append(Seen(service, span.name, *ids, *times, attributes))


@contextmanager
def a_collector() -> Iterator[Collector]:
    """Run a collector on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
