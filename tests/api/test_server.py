"""The real server on a real port: what only shows on the wire, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from api.__main__ import prepare
from jobs.database import make_engine, migrate, reader_maker, reading
from jobs.settings import Settings
from tests.api.checkpoints import write_mixtral

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """``python -m api`` on a port of its own."""

    process: subprocess.Popen[bytes]
    port: int
    settings: Settings
    body: dict[str, object]

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60)

    def jobs(self) -> int:
        engine = make_engine(self.settings)
        with reading(reader_maker(engine)) as work:
            count = len(work.jobs.list("anonymous").jobs)
        engine.dispose()
        return count

    def send(self, *pieces: bytes) -> bytes:
        """Send bytes as they are and return the answer's head; the server may hang up before all are sent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                pass
            answer = b""
            while b"\r\n\r\n" not in answer and (more := connection.recv(65536)):
                answer += more
            return answer


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    model = write_mixtral(folder / "models" / "m")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(data_dir=folder / "data", model_roots=(folder / "models",), port=port)
    migrate(settings)
    mine = {
        "SLIMTRIM_DATA_DIR": str(settings.data_dir), "SLIMTRIM_MODEL_ROOTS": str(folder / "models"), "SLIMTRIM_PORT": str(port),
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "api"], cwd=ROOT, env={**os.environ, **mine}, stderr=log)
    server = Server(process, port, settings, {"model": f"file://{model}", "recipe": {"steps": [{"step": "quantize"}]}})
    try:
        wait_until_alive(server)
        yield server
    finally:
        process.kill()
        process.wait()


def wait_until_alive(server: Server) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.process.poll() is None, "the server ended"
        try:
            if server.client.get("/livez").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the server did not answer")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


def head(server: Server, *lines: str) -> bytes:
    always = ["POST /v1/jobs HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Content-Type: application/json"]
    return "\r\n".join([*always, *lines, "", ""]).encode()


def test_a_chunked_body_is_refused_when_it_grows_too_large(server: Server):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"

    answer = server.send(head(server, "Transfer-Encoding: chunked"), *[chunk] * 32)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in answer
    assert server.jobs() == 0


def test_a_chunked_body_that_never_ends_is_refused_all_the_same(server: Server):
    """The refusal comes while the body is still being sent, not at its end."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"

    answer = server.send(head(server, "Transfer-Encoding: chunked"), *[chunk] * 17)

    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_states_its_size_is_refused_unread(server: Server):
    assert server.send(head(server, f"Content-Length: {2 * 2**20}")).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_of_a_good_size_is_accepted(server: Server):
    text = json.dumps(server.body).encode()
    before = server.jobs()

    answer = server.send(head(server, "Transfer-Encoding: chunked"), b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text))

    assert answer.startswith(b"HTTP/1.1 201 ")
    assert server.jobs() == before + 1


def test_a_request_that_is_not_http_harms_nobody(server: Server):
    assert server.send(b"\x16\x03\x01nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert server.client.get("/livez").status_code == 200


def test_the_server_does_not_say_what_it_is(server: Server):
    assert "server" not in server.client.get("/livez").headers


def test_a_server_that_is_told_to_stop_answers_whoever_waits_and_ends(tmp_path: Path):
    with serving(tmp_path) as server:
        headers = {"Prefer": "wait=60"}
        text = json.dumps(server.body)
        lines = head(server, *(f"{name}: {value}" for name, value in headers.items()), f"Content-Length: {len(text)}")
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(lines + text.encode())
            deadline = time.monotonic() + 60
            while server.jobs() == 0 and time.monotonic() < deadline:
                time.sleep(0.05)

            server.process.send_signal(signal.SIGTERM)
            answer = connection.recv(65536)

        assert answer.startswith(b"HTTP/1.1 201 ")
        assert server.process.wait(timeout=60) in (0, -signal.SIGTERM)
        assert b"Traceback" not in (tmp_path / "log").read_bytes()


def test_without_keys_the_server_refuses_to_listen_to_others(tmp_path: Path):
    mine = {"SLIMTRIM_DATA_DIR": str(tmp_path / "data"), "SLIMTRIM_HOST": "0.0.0.0", "SLIMTRIM_API_KEYS": ""}

    done = subprocess.run([sys.executable, "-m", "api"], cwd=ROOT, env={**os.environ, **mine}, capture_output=True, text=True)

    assert done.returncode == 2
    assert "SLIMTRIM_API_KEYS" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_solver_is_there_before_anybody_is_answered_and_no_collector_looks_through_it(tmp_path: Path):
    """In a thread beside the first answers its import made them several times as slow, and the collector paused later ones."""
    program = """
import gc, sys
import api.__main__ as service
class Server:
    def __init__(self, config): pass
    def run(self, sockets):
        solver = [sys.modules.get(name) for name in ("numpy", "scipy.optimize", "scipy.sparse")]
        looked_through = {id(seen) for seen in gc.get_objects()}
        sys.exit(f"{solver}" if None in solver or any(id(part) in looked_through for part in solver) else 0)
service.Server = Server
service.main()
"""
    settings = Settings(data_dir=tmp_path)
    migrate(settings)
    mine = {**os.environ, "SLIMTRIM_DATA_DIR": str(tmp_path), "SLIMTRIM_PORT": "0"}

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=mine, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_an_answer_in_two_parts_waits_for_nothing():
    """Without TCP_NODELAY each answer on a connection that stays open comes 40 ms late: the client has nothing to acknowledge."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        prepare(listener)
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
