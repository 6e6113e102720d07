"""What ten thousand waiting jobs cost the others: claiming, reading a job, reading a page, a round of the upkeep.

``python -m bench.claims [postgresql://.../an_empty_database]``: on SQLite in a temporary folder, and on the PostgreSQL
database of that address, which it fills. Also eight processes that claim all ten thousand: how long it takes, and
whether any job was claimed twice; and what an API process answers beside ten thousand waiting jobs, over HTTP.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text

from bench.status_polling import process
from jobs.database import make_engine, migrate, reader_maker, reading, session_maker, unit_of_work
from jobs.settings import Settings
from tests.jobs.many import queue_many
from tests.servers import free_ports

OWNER, MANY, TIMES, ANSWERS, PROCESSES = "ann", 10_000, 200, 600, 8


class Bench:
    """One database."""

    def __init__(self, settings: Settings) -> None:
        self.engine = make_engine(settings)
        self._open_session, self._open_reader = session_maker(self.engine), reader_maker(self.engine)

    def write(self, act: Callable[[Any], Any]) -> Any:
        """One transaction that announces nothing."""
        with unit_of_work(self._open_session, lambda *_: None) as work:
            return act(work)

    def settle(self) -> None:
        """Do what autovacuum would do within a minute of so many new rows, and not beside what is measured."""
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM ANALYZE"))

    def read(self, act: Callable[[Any], Any]) -> Any:
        """One look."""
        with reading(self._open_reader) as work:
            return act(work)


def line(name: str, act: Callable[[int], Any], times: int = TIMES) -> None:
    """Print median and 99th percentile of an act."""
    act(0)
    gc.freeze()  # this process's own collections are nobody's wait
    took = list[float]()
    for number in range(1, times):
        start = time.perf_counter()
        act(number)
        took.append((time.perf_counter() - start) * 1e3)
    print(f"  {name:<34} median {statistics.median(took):7.2f} ms   p99 {sorted(took)[int(0.99 * len(took))]:7.2f} ms")


def measure(settings: Settings) -> None:
    """Measure one database with nothing waiting, and with ten thousand."""
    migrate(settings)
    bench = Bench(settings)
    for waiting in (0, MANY):
        print(f"{bench.engine.dialect.name}, {waiting} jobs waiting")
        if waiting:
            queue_many(bench.engine, waiting - TIMES)
        ids = queue_many(bench.engine, TIMES)
        bench.settle()
        line("claim", lambda n, ids=ids: bench.write(lambda work: work.attempts.claim(ids[n], "w", 600.0)))
    queue_many(bench.engine, 200)
    bench.settle()
    last = bench.read(lambda work: work.jobs.list(OWNER, limit=1)).jobs[0].id

    def read_job(work: Any) -> None:
        work.queues.places([work.jobs.get(OWNER, last)])
        work.workers.all()

    def read_page(work: Any) -> None:
        work.queues.places(work.jobs.list(OWNER, limit=100).jobs)
        work.workers.all()

    def upkeep(work: Any) -> None:
        work.upkeep.expire_leases()
        work.upkeep.expire_runtimes(90.0)
        work.upkeep.expire_queued()
        work.upkeep.next_claimable("gpu.cpu", 600.0, 16)

    line("read a waiting job, with its place", lambda _: bench.read(read_job))
    line("read a page of 100, with places", lambda _: bench.read(read_page))
    line("GET /v1/queues", lambda _: bench.read(lambda work: work.queues.lines(["gpu.cpu", "gpu.16g"])))
    line("a round of the upkeep", lambda _: bench.write(upkeep))
    answers(settings, bench, last)
    bench.engine.dispose()
    claim_all(settings)


def answers(settings: Settings, bench: Bench, job_id: str) -> None:
    """Ask an API process for a page and a job, one request after the other, as the owner of all of them."""
    key, _ = bench.write(lambda work: work.keys.create(OWNER))
    (port,) = free_ports(1)
    own = {"DATA_DIR": str(settings.data_dir), "DATABASE_URL": settings.database_url, "PORT": str(port), "RATE_LIMIT": "0"}
    environment = {**os.environ, **{f"SLIMTRIM_{name}": value for name, value in own.items() if value}}
    with (
        process(port, "/livez", "api", environment=environment),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, trust_env=False) as client,
    ):
        for path in (f"/v1/jobs/{job_id}", "/v1/jobs", "/v1/jobs?limit=100"):
            line(f"GET {path.replace(job_id, 'ID')}", lambda _, path=path: client.get(path).raise_for_status(), ANSWERS)


def claim_all(settings: Settings) -> None:
    """Let eight processes claim every waiting job; each job is tried by two of them."""
    bench = Bench(settings)
    ids = queue_many(bench.engine, MANY, owner="bob")
    bench.engine.dispose()
    shares = [[job_id for number, job_id in enumerate(ids) if (number - first) % PROCESSES < 2] for first in range(PROCESSES)]
    start = time.perf_counter()
    with ProcessPoolExecutor(PROCESSES) as pool:
        claimed = [job_id for part in pool.map(claim_each, [settings] * PROCESSES, shares) for job_id in part]
    took = time.perf_counter() - start
    doubled = len(claimed) - len(set(claimed))
    print(f"  {PROCESSES} processes race for {MANY} jobs: {len(set(claimed))} claimed, {doubled} twice, {took:.1f} s")


def claim_each(settings: Settings, ids: list[str]) -> list[str]:
    """Try every job once, beginning at the oldest; return those that were won."""
    bench = Bench(settings)
    return [job_id for job_id in ids if bench.write(lambda work, job_id=job_id: work.attempts.claim(job_id, "w", 600.0))]


@contextmanager
def places(arguments: list[str]) -> Iterator[list[Settings]]:
    """Give the databases to measure."""
    with tempfile.TemporaryDirectory() as folder:
        found = [Settings(data_dir=Path(folder))]
        yield found + [Settings(data_dir=Path(folder), database_url=url) for url in arguments]


if __name__ == "__main__":
    with places(sys.argv[1:]) as found:
        for settings in found:
            measure(settings)
