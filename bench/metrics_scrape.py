"""How long one look at /metrics takes with many jobs in the tables: the census alone, and the whole answer.

``python -m bench.metrics_scrape [JOBS]``: SQLite in a folder of its own; PostgreSQL as well where it is installed.
Every job has a plan and a report of a real one's size, since a table scan would have to read past them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from api.metrics import Metrics
from jobs.census import BLOCK_S, Settled, take_census
from jobs.database import make_engine, migrate, reader_maker
from jobs.ids import new_job_id
from jobs.settings import Settings
from jobs.status import JobStatus
from jobs.tables import Job, JobAttempt

_STATUSES = [JobStatus.SUCCEEDED] * 7 + [JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.QUEUED]
_PLAN = {"blocks": [{"index": index, "bytes": 10**9, "action": "keep"} for index in range(200)]}
_REPORT = {"ledger": [{"name": f"model.layers.{index}.mlp", "error": 0.01} for index in range(600)]}
_ROUNDS = 9


def main(jobs: int) -> None:
    """Fill the tables, and time a scrape."""
    folder = Path(tempfile.mkdtemp())
    try:
        measure("SQLite", Settings(data_dir=folder), jobs)
        if shutil.which("postgres") or Path("/usr/lib/postgresql").exists():
            from tests.servers import a_postgres

            with a_postgres() as server:
                measure("PostgreSQL", Settings(data_dir=folder, database_url=server.fresh_url()), jobs)
    finally:
        shutil.rmtree(folder)


def measure(name: str, settings: Settings, jobs: int) -> None:
    """Print the median times on one database."""
    migrate(settings)
    engine = make_engine(settings)
    fill(engine, jobs)
    open_reader = reader_maker(engine)

    settled = Settled()

    def census() -> None:
        with open_reader() as session:
            take_census(session, 60.0, settled)

    began = time.perf_counter()
    census()
    first_ms = 1000 * (time.perf_counter() - began)
    metrics = Metrics(settings, open_reader)
    metrics.as_text()
    later_ms, kept_ms = median_ms(census), median_ms(metrics.as_text)
    print(f"{name}, {jobs} jobs: first census {first_ms:.0f} ms, later {later_ms:.1f} ms; scrape of a kept one {kept_ms:.1f} ms")
    engine.dispose()


def fill(engine: Any, jobs: int) -> None:
    """Insert jobs with an attempt each."""
    at = datetime.now(UTC) - timedelta(days=1)
    figures = {
        "bytes_fetched": 10**10, "bytes_stored": 10**9, "host_memory_peak": 10**9, "gpu_memory_peak": 10**10,
        "block_seconds": {stage: {"counts": [3] * (len(BLOCK_S) + 1), "sum": 900.0} for stage in ("studying", "compressing")},
    }  # fmt: skip
    for first in range(0, jobs, 500):
        rows, attempts = list[dict[str, Any]](), list[dict[str, Any]]()
        for number in range(first, min(first + 500, jobs)):
            status, job_id = _STATUSES[number % 10], new_job_id()
            reason = {"code": "disk_full", "message": "full", "retryable": True} if status is JobStatus.FAILED else None
            report = _REPORT if status is JobStatus.SUCCEEDED else None
            rows.append({
                "id": job_id, "owner": "ann", "model": "m/m", "status": status, "status_reason": reason, "plan": _PLAN,
                "request": {"model": "m/m"}, "resolved": {}, "report": report, "labels": {}, "spec_hash": "0",
            })  # fmt: skip
            if status is not JobStatus.QUEUED:
                attempts.append({
                    "job_id": job_id, "fence": 1, "attempt": 1, "worker": "w", "queued_at": at, "lease_until": at,
                    "started_at": at + timedelta(seconds=number % 4000), "ended_at": at + timedelta(seconds=number % 80_000),
                    "outcome": status.value, "figures": figures,
                })  # fmt: skip
        with engine.execution_options(slimtrim_writes=True).begin() as connection:
            connection.execute(insert(Job), rows)
            connection.execute(insert(JobAttempt), attempts)


def median_ms(act: Callable[[], Any]) -> float:
    """Return the median over some rounds."""
    taken = list[float]()
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        act()
        taken.append(1000 * (time.perf_counter() - began))
    return sorted(taken)[_ROUNDS // 2]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
