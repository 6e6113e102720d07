"""How many status polls one API process answers, beside a bare route that reads one row in the same kind of process.

A real uvicorn process of each kind on PostgreSQL; 64 keep-alive connections from a process of its own; rounds that take
turns, medians over the rounds. The service's side shows a key of the database and is counted by the rate limiter.

    python -m bench.status_polling [ROUNDS] [SECONDS]
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI
from sqlalchemy import select
from starlette.responses import JSONResponse

from jobs.database import make_engine, migrate, reader_maker, session_maker, unit_of_work
from jobs.settings import Settings, load_settings
from jobs.tables import Job
from tests.api.checkpoints import write_mixtral
from tests.servers import a_postgres, free_ports

CONNECTIONS = 64
PARTS = ("request", "resolved", "plan", "progress", "labels", "status", "attempt", "max_attempts", "spec_hash")


def bare_app(settings: Settings, size: int) -> FastAPI:
    """Return one route that reads a row by its primary key and answers with JSON of ``size`` bytes."""
    open_reader = reader_maker(make_engine(settings))
    app = FastAPI()

    @app.get("/rows/{job_id}")
    def read(job_id: str) -> JSONResponse:
        with open_reader() as session:
            job = session.scalars(select(Job).where(Job.id == job_id)).one()
            answer = JSONResponse({"id": job.id, **{name: getattr(job, name) for name in PARTS}, "more": "x" * extra[0]})
        extra[0] += size - len(answer.body)
        return answer

    extra = [0]
    return app


def serve_bare(port: int, size: int) -> None:
    """Serve the bare route as ``python -m api`` serves the service."""
    app = bare_app(load_settings(), size)
    uvicorn.run(app, port=port, access_log=False, server_header=False, proxy_headers=False, log_config=None)


async def poll(port: int, path: str, key: str, seconds: float) -> dict[str, float]:
    """Ask on all connections for some seconds; return the rate and the slowest hundredth."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    taken: list[float] = []
    end = time.perf_counter() + seconds

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (began := time.perf_counter()) < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(head.decode())
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            taken.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
    return {"rate": len(taken) / (time.perf_counter() - began), "p99_ms": statistics.quantiles(taken, n=100)[98] * 1000}


@contextmanager
def process(port: int, path: str, *command: str, environment: dict[str, str]) -> Iterator[None]:
    """Run a server until the block ends."""
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield
        finally:
            started.terminate()
            started.wait()


def measured(port: int, path: str, key: str, seconds: float) -> dict[str, float]:
    """Return what a client in a process of its own saw."""
    command = [sys.executable, "-m", "bench.status_polling", "poll", str(port), path, key, str(seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(rounds: int, seconds: float) -> None:
    """Print both sides' medians."""
    with a_postgres() as postgres, tempfile.TemporaryDirectory() as folder:
        ours, bare = free_ports(2)
        model = write_mixtral(Path(folder) / "models" / "m")
        mine = {
            "SLIMTRIM_DATA_DIR": f"{folder}/data", "SLIMTRIM_MODEL_ROOTS": f"{folder}/models", "SLIMTRIM_PORT": str(ours),
            "SLIMTRIM_DATABASE_URL": postgres.fresh_url(), "SLIMTRIM_RATE_LIMIT": "100000000",
        }  # fmt: skip
        os.environ.update(mine)
        settings = load_settings()
        migrate(settings)
        engine = make_engine(settings)
        with unit_of_work(session_maker(engine), lambda _: None) as work:
            key, _ = work.keys.create("bench")
        with process(ours, "/livez", "api", environment=dict(os.environ)):
            client = httpx.Client(
                base_url=f"http://127.0.0.1:{ours}", headers={"Authorization": f"Bearer {key}"}, trust_env=False
            )
            made = client.post("/v1/jobs", json={"model": f"file://{model}", "recipe": {"steps": [{"step": "quantize"}]}})
            job_id = made.json()["id"]
            if "running" in sys.argv:
                with unit_of_work(session_maker(engine), lambda _: None) as work:
                    work.attempts.claim(job_id, "a worker", 3600.0)
            size = len(client.get(f"/v1/jobs/{job_id}").content)
            command = ("bench.status_polling", "bare", str(bare), str(size))
            with process(bare, "/", *command, environment=dict(os.environ)):
                sides = {"service": (ours, f"/v1/jobs/{job_id}"), "bare": (bare, f"/rows/{job_id}")}
                seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
                for port, path in sides.values():
                    measured(port, path, key, 1.0)
                for _ in range(rounds):
                    for name, (port, path) in sides.items():
                        seen[name].append(measured(port, path, key, seconds))
        engine.dispose()
    print(f"{size} bytes, {CONNECTIONS} connections, {rounds} rounds of {seconds:g} s, medians")
    for name, results in seen.items():
        rate, p99 = (statistics.median(result[what] for result in results) for what in ("rate", "p99_ms"))
        print(f"{name:8} {rate:7.0f} requests/s   p99 {p99:6.1f} ms")
    ratio = [a["rate"] / b["rate"] for a, b in zip(seen["service"], seen["bare"], strict=True)]
    print(f"service / bare: {statistics.median(ratio):.2f}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["bare", port, size]:
            serve_bare(int(port), int(size))
        case ["poll", port, path, key, seconds]:
            print(json.dumps(asyncio.run(poll(int(port), path, key, float(seconds)))))
        case arguments:
            numbers = [float(argument) for argument in arguments if argument != "running"]
            compare(int(numbers[0]) if numbers else 7, numbers[1] if len(numbers) > 1 else 5.0)
