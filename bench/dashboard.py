"""What the first page of the dashboard costs with ten thousand jobs, a plan as long as in life in each row.

``python -m bench.dashboard [postgresql://.../an_empty_database]``: on SQLite in a temporary folder, and on the PostgreSQL
database of that address, which it fills. The page is asked for over HTTP of a running ``python -m api``, connection kept, as a
browser does; several rounds, of each the median and the 99th percentile.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from sqlalchemy import update

from bench.claims import places
from jobs.database import make_engine, migrate
from jobs.settings import Settings
from jobs.tables import Job
from jobs.tether import tethered, with_our_modules
from tests.jobs.many import PLAN, queue_many
from tests.worker.test_serve import free_port

MANY, ROUNDS, TIMES = 10_000, 3, 100
_FIGURES = {"bytes_before": 93_405_585_408, "bytes_after": 24_000_000_000}


def measure(settings: Settings) -> None:
    """Fill one database, start the API on it, and time the list, filtered and not."""
    migrate(settings)
    engine = make_engine(settings)
    queue_many(engine, MANY, owner="anonymous")
    with engine.begin() as connection:
        connection.execute(update(Job).values(plan={**PLAN, **_FIGURES}))
    kind = engine.dialect.name
    engine.dispose()
    port = free_port()
    own = {"SLIMTRIM_DATA_DIR": str(settings.data_dir), "SLIMTRIM_PORT": str(port), "SLIMTRIM_RATE_LIMIT": "0"}
    own |= {} if settings.database_url is None else {"SLIMTRIM_DATABASE_URL": settings.database_url}
    command = tethered([sys.executable, "-m", "api"])
    with tempfile.TemporaryFile() as log:
        api = subprocess.Popen(command, env=with_our_modules({**os.environ, **own}), stdin=subprocess.DEVNULL, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
                _wait(client)
                print(f"{kind}, {MANY} jobs, {TIMES} requests a round")
                _line(client, "first page", "/")
                _line(client, "filtered, all match", "/?model=m%2Fm&status=queued")
                _line(client, "filtered, none matches", "/?model=n%2Fn")
        finally:
            api.terminate()
            api.wait()


def _line(client: httpx.Client, name: str, path: str) -> None:
    rounds = [_round(client, path) for _ in range(ROUNDS)]
    medians = ", ".join(f"{statistics.median(took):.1f}" for took in rounds)
    worst = ", ".join(f"{sorted(took)[int(0.99 * len(took))]:.1f}" for took in rounds)
    print(f"  {name:<24} median {medians} ms   p99 {worst} ms")


def _round(client: httpx.Client, path: str) -> list[float]:
    took = list[float]()
    for _ in range(TIMES):
        start = time.perf_counter()
        client.get(path).raise_for_status()
        took.append((time.perf_counter() - start) * 1e3)
    return took


def _wait(client: httpx.Client, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if client.get("/livez").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the API does not come up")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, places(sys.argv[1:]) as found:
        for number, settings in enumerate(found):
            data = Path(folder) / str(number)
            data.mkdir()
            measure(Settings(data_dir=data, database_url=settings.database_url))
