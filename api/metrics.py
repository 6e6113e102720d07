"""What Prometheus reads: requests and streams, counted by this process, and the census, read from the rows.

Labels are bounded: statuses, stages, codes, route templates; never a job, a model or a caller.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from jobs import census
from jobs.census import Attempts, Census, Settled, take_census
from jobs.database import OpenSession
from jobs.settings import Settings

_KEPT_S = 5.0
"""Seconds for which a census serves, so that no number of scrapers can keep the database busy."""
_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_log = logging.getLogger("slimtrim.api")


class Metrics:
    """The metrics of one API process."""

    def __init__(self, settings: Settings, open_reader: OpenSession) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self.requests = Histogram(
            "slimtrim_http_request_seconds", "Requests by route template, until the last byte of the answer.",
            ("method", "route", "status"), buckets=_REQUEST_S, registry=self._registry,
        )  # fmt: skip
        self.sent_bytes = Counter(
            "slimtrim_http_sent_bytes", "Bytes of answers, downloads among them.", ("route",), registry=self._registry
        )
        self.streams = Gauge("slimtrim_event_streams", "Event streams that this process holds open.", registry=self._registry)
        self._registry.register(_FromRows(settings, open_reader))

    def as_text(self) -> bytes:
        """Return everything in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


class _FromRows(Collector):
    """The census, taken anew when the last one is too old. A database that does not answer is a figure too."""

    def __init__(self, settings: Settings, open_reader: OpenSession) -> None:
        self._settings, self._open_reader = settings, open_reader
        self._lock = threading.Lock()
        self._settled = Settled()
        self._census: Census | None = None
        self._taken_at = float("-inf")

    def describe(self) -> Iterable[Metric]:
        """Name nothing beforehand: a service must start, and register this, without its database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield every family."""
        found = self._recent()
        yield GaugeMetricFamily("slimtrim_database_up", "Whether the rows could be read; without them, less is shown.",
                                value=float(found is not None))  # fmt: skip
        free = shutil.disk_usage(self._settings.data_dir).free
        yield GaugeMetricFamily("slimtrim_disk_free_bytes", "Free bytes on the disk of the data folder.", value=free)
        if found is not None:
            yield from _job_families(found)
            yield from _attempt_families(found.attempts)
            yield from _other_families(found)

    def _recent(self) -> Census | None:
        with self._lock:
            if time.monotonic() - self._taken_at > _KEPT_S:
                self._census = self._take()
                self._taken_at = time.monotonic()
            return self._census

    def _take(self) -> Census | None:
        try:
            with self._open_reader() as session:
                return take_census(session, self._settings.lease_s, self._settled)
        except SQLAlchemyError:
            _log.exception("no census")
            return None


def _job_families(found: Census) -> Iterable[Metric]:
    yield _gauges("slimtrim_jobs", "Jobs.", ("status", "stage", "memory_class"), found.jobs)
    depth = {(kind,): count for (status, _, kind), count in found.jobs.items() if status == "queued"}
    yield _gauges("slimtrim_queue_depth", "Jobs that wait.", ("memory_class",), depth)
    waiting = {(kind,): seconds for kind, seconds in found.waiting_s.items()}
    yield _gauges("slimtrim_queue_oldest_wait_seconds", "How long the first of them has waited.", ("memory_class",), waiting)
    created = dict[tuple[str, ...], int]()
    for (_, _, kind), count in found.jobs.items():
        created[kind,] = created.get((kind,), 0) + count
    yield _counters("slimtrim_jobs_created", "Jobs ever made.", ("memory_class",), created)
    yield _counters("slimtrim_jobs_finished", "Jobs that ended.", ("status", "code"), found.finished)


def _attempt_families(found: Attempts) -> Iterable[Metric]:
    yield _counters("slimtrim_attempts", "Attempts that ended.", ("outcome", "code"), found.ended)
    lost = sum(count for (outcome, _), count in found.ended.items() if outcome == "lost")
    yield _counters("slimtrim_lease_expiries", "Attempts whose worker fell silent.", (), {(): lost})
    ran = {(outcome,): histogram for outcome, histogram in found.run_s.items()}
    yield _histograms("slimtrim_attempt_run_seconds", "How long attempts took.", ("outcome",), ran)
    yield _histograms("slimtrim_queue_seconds", "How long jobs waited for an attempt.", (), {(): found.queue_s})
    blocks = {(stage,): histogram for stage, histogram in found.block_s.items()}
    yield _histograms("slimtrim_block_seconds", "How long one block took.", ("stage",), blocks)
    moved = {(direction,): count for direction, count in found.bytes_moved.items()}
    yield _counters("slimtrim_moved_bytes", "Bytes that workers fetched and stored.", ("direction",), moved)
    peaks = {("gpu",): found.gpu_memory_peak, ("host",): found.host_memory_peak}
    yield _gauges("slimtrim_memory_peak_bytes", "Most memory that any attempt's process has used.", ("kind",), peaks)


def _other_families(found: Census) -> Iterable[Metric]:
    states = {(state,): count for state, count in found.deliveries.items()}
    yield _gauges("slimtrim_webhook_deliveries", "Webhook deliveries.", ("state",), states)
    yield _gauges("slimtrim_workers", "Workers seen within a lease.", (), {(): found.workers_alive})
    yield _gauges("slimtrim_workers_busy", "Those of them that have a job.", (), {(): found.workers_busy})
    takes = {(kind,): count for kind, count in found.workers.items()}
    yield _gauges("slimtrim_workers_for_class", "Those of them that take jobs of the class.", ("memory_class",), takes)


def _gauges(name: str, what: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(name, what, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def _counters(name: str, what: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = CounterMetricFamily(name, what, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def _histograms(name: str, what: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], census.Histogram]) -> Metric:
    family = HistogramMetricFamily(name, what, labels=labels)
    for key, histogram in sorted(values.items(), key=lambda item: item[0]):
        below, buckets = 0, list[tuple[str, float]]()
        for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
        family.add_metric(key, buckets, histogram.sum)
    return family
