"""Many requests with few keys at two processes on PostgreSQL: one job per key, whoever answers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from jobs.database import make_engine, migrate, reader_maker, reading
from jobs.settings import Settings
from tests.api.checkpoints import write_mixtral
from tests.servers import Postgres, free_ports

ROOT = Path(__file__).parents[2]
KEYS, REQUESTS = 20, 200


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_two_hundred_requests_with_twenty_keys_make_twenty_jobs(tmp_path: Path, postgres: Postgres):
    model = write_mixtral(tmp_path / "models" / "m")
    settings = Settings(data_dir=tmp_path / "data", database_url=postgres.fresh_url())
    migrate(settings)
    mine = {
        "SLIMTRIM_DATA_DIR": str(settings.data_dir), "SLIMTRIM_MODEL_ROOTS": str(model.parent),
        "SLIMTRIM_DATABASE_URL": str(settings.database_url),
    }  # fmt: skip
    ports = free_ports(2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "api"], cwd=ROOT, env={**os.environ, **mine, "SLIMTRIM_PORT": str(port)}, stderr=-3
        )
        for port in ports
    ]
    pause = threading.Event()
    body = {"model": f"file://{model}", "recipe": {"steps": [{"step": "quantize"}]}}

    def post(number: int) -> tuple[str, str]:
        key = f"key-{number % KEYS}"
        with httpx.Client(trust_env=False, timeout=60) as client:
            while True:
                url = f"http://127.0.0.1:{ports[number // KEYS % 2]}/v1/jobs"
                answer = client.post(url, json={**body, "labels": {"key": key}}, headers={"Idempotency-Key": key})
                if answer.status_code != 409:
                    assert answer.status_code == 201, answer.text
                    assert answer.json()["labels"] == {"key": key}
                    return key, answer.json()["id"]
                assert answer.json()["code"] == "idempotency_in_flight"
                pause.wait(0.05)

    try:
        for port in ports:
            for _ in range(600):
                if answers(f"http://127.0.0.1:{port}/livez"):
                    break
                pause.wait(0.1)
        with ThreadPoolExecutor(32) as pool:
            made = set(pool.map(post, range(REQUESTS)))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    engine = make_engine(settings)
    with reading(reader_maker(engine)) as work:
        jobs = {job.id for job in work.jobs.list("anonymous", limit=100).jobs}
    engine.dispose()

    assert len(made) == KEYS, "every answer is that key's job"
    assert jobs == {job_id for _, job_id in made}
