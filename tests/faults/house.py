"""The whole service on production parts - PostgreSQL, Redis, S3, API, maintenance, two workers - and what breaks it.

Members are started as in production, each a process of its own, and started again when they are killed, as a supervisor
would. Faults come from outside: signals to members, restarts of servers, a proxy before the bucket that answers 503.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from jobs.keys import new_key
from tests.servers import S3, Bucket, Postgres, Redis, free_ports
from tests.worker.stand import FAKE, Stand

WORKERS = 2
_KEYS = {name: new_key(name) for name in ("ann", "bob")}
"""Callers of the house: name -> key and entry for the settings."""


@dataclass
class Parts:
    """The servers that a house stands on."""

    postgres: Postgres
    redis: Redis
    s3: S3


@dataclass
class House:
    """A running service, and the hands that break it."""

    stand: Stand
    parts: Parts
    bucket: Bucket
    port: int
    entry: str
    members: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    kills: list[tuple[str, str]] = field(default_factory=list)
    """Every kill so far: the member, and the stage or ``idle``."""

    @property
    def url(self) -> str:
        """Where the API listens."""
        return f"http://127.0.0.1:{self.port}"

    def key(self, owner: str) -> str:
        """Return a caller's API key."""
        return _KEYS[owner][0]

    def client(self, owner: str = "ann", timeout_s: float = 20.0) -> httpx.Client:
        """Return a client of one caller."""
        headers = {"Authorization": f"Bearer {self.key(owner)}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)

    def start(self, name: str) -> None:
        """Start a member, or start it again."""
        match name.split("-")[0]:
            case "api":
                self.members[name] = self.stand.start("api")
            case "maintenance":
                self.members[name] = self.stand.start("worker.maintenance")
            case _:
                # A name of its own for every life, as a new container has.
                own = f"{name}-{sum(member == name for member, _ in self.kills)}"
                self.members[name] = self.stand.start("worker", "--name", own, "--run", self.entry)

    def start_all(self) -> None:
        """Start every member and wait for the API."""
        for name in ("api", "maintenance", *(f"worker-{number}" for number in range(1, WORKERS + 1))):
            self.start(name)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the API answers."""
        with self.client(timeout_s=2.0) as client:

            def answers() -> bool:
                with suppress(httpx.HTTPError):
                    return client.get("/livez").status_code == 200
                return False

            self.stand.wait(answers, "the API")

    def kill(self, name: str) -> None:
        """SIGKILL a member and start it again; ``child-N`` is the process in which worker N's present job runs."""
        if name.startswith("child"):
            worker = self.members[f"worker-{name.split('-')[1]}"]
            victim = self.stand.child_of(worker) or self.stand.child_of(worker, "worker.errand")
            if victim is not None:
                self.kills.append((name, _what(victim)))
                with suppress(psutil.Error):
                    victim.kill()
            return
        process = self.members[name]
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        self.kills.append((name, _what(children[0]) if children else "idle"))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.start(name)

    def kill_somebody(self, chance: random.Random) -> None:
        """Kill a member by lot: workers and the processes of their jobs most often, the API now and then."""
        numbers = range(1, WORKERS + 1)
        names = [f"{kind}-{number}" for kind in ("worker", "child", "child") for number in numbers]
        before = len(self.kills)
        while len(self.kills) == before:
            self.kill(chance.choice([*names, "api"]))
            time.sleep(0.05)

    def stored(self) -> list[str]:
        """Return every key in the bucket."""
        pages = self.parts.s3.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket.name)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def read(self, key: str) -> bytes:
        """Return an object's bytes."""
        return self.parts.s3.client().get_object(Bucket=self.bucket.name, Key=key)["Body"].read()

    def orphan_uploads(self) -> list[str]:
        """Return the multipart uploads that were begun and neither completed nor aborted."""
        answer = self.parts.s3.client().list_multipart_uploads(Bucket=self.bucket.name)
        return [upload["Key"] for upload in answer.get("Uploads", ())]


@contextmanager
def a_house(folder: Path, parts: Parts, *, entry: str = FAKE, s3_endpoint: str | None = None, **settings: Any) -> Iterator[House]:
    """Build a house and take it down; ``s3_endpoint``: of a proxy before the bucket."""
    bucket = parts.s3.fresh_bucket()
    (port,) = free_ports(1)
    own = {
        "DATABASE_URL": parts.postgres.fresh_url(), "BROKER_URL": parts.redis.fresh_url(), "PORT": port,
        "STORAGE_URL": f"s3://{bucket.name}/things", "S3_ENDPOINT_URL": s3_endpoint or bucket.endpoint,
        "API_KEYS": ",".join(entry for _, entry in _KEYS.values()), "RATE_LIMIT": 0, "LEASE_S": 4, "HEARTBEAT_S": 0.5,
    }  # fmt: skip
    credentials = {name: value for name, value in bucket.environment.items() if name.startswith("AWS_")}
    with ExitStack() as stack:
        stack.enter_context(_environment(credentials))
        stand = Stand(folder, **{**own, **settings})
        stack.callback(stand.close)
        house = House(stand, parts, bucket, port, entry)
        house.start_all()
        yield house


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _what(process: psutil.Process) -> str:
    """Say what a child of a worker does, by its command line."""
    with suppress(psutil.Error):
        line = process.cmdline()
        if "worker.child" in line:
            return "computing"
        # Between its fork and its exec it has its parent's line; once it is over, none.
        return f"errand {line[line.index('worker.errand') + 1]}" if "worker.errand" in line else "about to start or over"
    return "gone"
