"""Traces by OpenTelemetry, from the request that made a job to the blocks of its attempts. Off unless an address is set.

``OTEL_EXPORTER_OTLP_ENDPOINT`` turns them on; the other ``OTEL_*`` variables mean what OpenTelemetry says. Spans go out
from a thread of their own, a collector that is slow or away costs spans and nothing else. Without the variable the SDK
is not even loaded, and every call here does nothing.

An attempt is a *child* of the request, not linked to it: whoever looks for a job's trace finds one trace with everything
in it, though it may last for days.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_EXPORT_S = 5
"""Seconds that the exporter tries to deliver a batch, unless ``OTEL_EXPORTER_OTLP_TIMEOUT`` says otherwise."""
_FLUSH_MS = 5000
_PROPAGATOR = TraceContextTextMapPropagator()
_log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int | float | bool]


@contextmanager
def tracing(service: str) -> Generator[None]:
    """Send this process's spans to the collector of the environment, and the last of them at the end."""
    if not os.environ.get(ENDPOINT):
        yield
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    timeout = None if os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") else _EXPORT_S
    provider = TracerProvider(resource=Resource.create({"service.name": f"slimtrim-{service}"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=timeout)))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.force_flush(_FLUSH_MS)
        provider.shutdown()


@contextmanager
def serving(trace_parent: str | None) -> Generator[Span]:
    """Open the span of a request, below the caller's own if it sent one; its name is told when the route is known."""
    parent = _context_of(trace_parent)
    with _tracer().start_as_current_span("request", parent, SpanKind.SERVER, record_exception=False) as span:
        yield span


@contextmanager
def spanning(name: str, trace_parent: str | None, attributes: Attributes) -> Generator[Span]:
    """Open the span of a piece of work that another process asked for."""
    parent = _context_of(trace_parent)
    with _tracer().start_as_current_span(name, parent, SpanKind.CONSUMER, attributes, record_exception=False) as span:
        yield span


def note_span(parent: Span, name: str, began_ns: int, ended_ns: int, attributes: Attributes) -> None:
    """Record a span that is over already; times are nanoseconds since the epoch."""
    start_span(parent, name, began_ns, attributes).end(ended_ns)


def start_span(parent: Span, name: str, began_ns: int, attributes: Attributes) -> Span:
    """Begin a span below another; whoever begins it ends it."""
    return _tracer().start_span(name, trace.set_span_in_context(parent), attributes=attributes, start_time=began_ns)


def fail_span(span: Span, code: str) -> None:
    """Mark a span as one that went wrong. Its message stays away: it may name a caller's model."""
    span.set_status(Status(StatusCode.ERROR, code))


def current_parent() -> str | None:
    """Return the present span as a ``traceparent``, for a process that goes on from here; None without one."""
    carrier = dict[str, str]()
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


def _context_of(trace_parent: str | None) -> Context:
    return _PROPAGATOR.extract({} if trace_parent is None else {"traceparent": trace_parent}, Context())


def _tracer() -> trace.Tracer:
    return trace.get_tracer("slimtrim")
