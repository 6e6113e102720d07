"""Live streams, over real sockets: complete, in order, resumable at any process, and harmless when nobody reads."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from api.app import create_app
from api.service import Service
from api.streams import EVENT_STREAM
from jobs.endings import Cause
from jobs.moves import change
from tests.api.conftest import Face

STREAM = {"Accept": EVENT_STREAM}
Told = list[tuple[int, str, dict[str, Any]]]


@dataclass
class Live:
    """A server in this process, on a port of its own."""

    service: Service
    client: httpx.Client
    port: int

    def stream(self, url: str, **headers: str) -> AbstractContextManager[httpx.Response]:
        return self.client.stream("GET", url, headers={**STREAM, **headers})

    def deaf(self, url: str, accept: str = "*/*") -> socket.socket:
        """Send a request and never read its answer."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(f"GET {url} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n\r\n".encode())
        return connection


@contextmanager
def serving(face: Face) -> Iterator[Live]:
    """Serve the face's database and store by another service."""
    app = create_app(face.service.settings, face.announced.append)
    service: Service = app.state.service
    service.streams.poll_s = 0.05
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted connections inherit it
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    until(lambda: server.started)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        yield Live(service, client, port)
    service.draining.set()
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def live(face: Face) -> Iterator[Live]:
    with serving(face) as served:
        yield served


def until(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    waited = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if is_so():
            return
        waited.wait(0.01)
    pytest.fail("it did not come to pass")


def told_by(lines: Iterator[str], most: int | None = None) -> tuple[Told, bool]:
    """Return the events of a stream, and whether it said that there are no more; stop after so many."""
    told: Told = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        elif fields.get("event") == "end":
            return told, True
        elif "id" in fields:
            told.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
            fields = {}
            if len(told) == most:
                break
        else:
            fields = {}
    return told, False


def warn(face: Face, job_id: str, count: int, text: str = "x") -> None:
    with face.work(), face.service.open_session() as session, session.begin():
        for _ in range(count):
            change(session, job_id, event="job.warning", data={"code": "c", "message": text})


def page(face: Face, job: dict[str, Any]) -> list[dict[str, Any]]:
    return face.client.get(f"{job['links']['events']}?limit=1000").json()["data"]


def test_the_stream_of_a_job_that_is_over_is_its_events_and_an_end(face: Face):
    job = face.post_job()
    face.client.post(job["links"]["cancel"])

    answer = face.client.get(job["links"]["events"], headers=STREAM)
    told, ended = told_by(iter(answer.text.split("\n")))

    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-store")
    assert answer.text.startswith("retry: 3000\n\n")
    assert [data for _, _, data in told] == page(face, job)
    assert [(seq, kind) for seq, kind, _ in told] == [(1, "job.created"), (2, "job.cancelled")]
    assert ended


def test_a_stream_goes_on_after_the_event_that_was_seen_last(face: Face):
    job = face.post_job()
    face.client.post(job["links"]["cancel"])

    def resumed(last: str) -> httpx.Response:
        return face.client.get(job["links"]["events"], headers={**STREAM, "Last-Event-ID": last})

    assert "id: 1\n" not in resumed("1").text
    assert "id: 2\n" in resumed("1").text
    assert (resumed("2").status_code, resumed("2").content) == (204, b"")
    assert face.client.get(f"{job['links']['events']}?after=2", headers=STREAM).status_code == 204


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "3", "9" * 20, "\u0661".encode()])
def test_an_id_that_no_event_has_is_refused(face: Face, last: str | bytes):
    events = face.post_job()["links"]["events"]

    answer = face.client.get(events, headers={**STREAM, "Last-Event-ID": last})

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_header")


@pytest.mark.parametrize(
    ("accept", "form"), [("*/*", "application/json"), (f"{EVENT_STREAM};q=0.5, application/json", "application/json")]
)
def test_a_page_is_given_where_a_stream_is_not_preferred(face: Face, accept: str, form: str):
    answer = face.client.get(face.post_job()["links"]["events"], headers={"Accept": accept})

    assert (answer.status_code, answer.headers["content-type"]) == (200, form)
    assert face.client.get("/v1/jobs/job_00000000000000000000000000/events", headers=STREAM).status_code == 404


def test_events_arrive_as_they_happen_and_a_silent_stream_shows_that_it_lives(face: Face, live: Live):
    live.service.streams.heartbeat_s = 0.1
    job = face.post_job()
    with live.stream(job["links"]["events"]) as answer:
        lines = answer.iter_lines()
        assert told_by(lines, 1)[0][0][1] == "job.created"
        assert any(line == ": " for line in lines), "a heartbeat"
        claim = face.claim(job["id"])
        assert told_by(lines, 1)[0][0][1] == "job.started"
        with face.work() as work:
            work.attempts.fail(claim, Cause("disk_full", "no room", retryable=False), backoff_s=0.0)
        told, ended = told_by(lines)

    assert ([kind for _, kind, _ in told], ended) == (["job.failed"], True)


def test_a_stream_that_is_cut_again_and_again_at_two_processes_tells_everything_once(face: Face):
    job = face.post_job()
    told: Told = []
    ended = False

    def happen() -> None:
        for number in range(50):
            warn(face, job["id"], 7, str(number))
        face.client.post(job["links"]["cancel"])

    with serving(face) as one, serving(face) as other:
        writer = threading.Thread(target=happen)
        writer.start()
        cut = 0
        while not ended:
            cut += 1
            last = {"Last-Event-ID": str(told[-1][0])} if told else {}
            with (one, other)[cut % 2].stream(job["links"]["events"], **last) as answer:
                more, ended = told_by(answer.iter_lines(), most=1 + 37 * cut % 61)
            told += more
        writer.join()

    assert cut > 5
    assert [data for _, _, data in told] == page(face, job)
    assert [seq for seq, _, _ in told] == list(range(1, 353))


def test_no_more_streams_are_opened_than_may_be(open_face: Any):
    with open_face(stream_limit=1) as face, serving(face) as live:
        events = face.post_job()["links"]["events"]
        with live.stream(events) as first:
            lines = first.iter_lines()  # kept: without it the client would close the connection
            told_by(lines, 1)
            with live.stream(events) as second:
                second.read()
                assert (second.status_code, second.json()["code"]) == (503, "unavailable")
                assert int(second.headers["retry-after"]) > 0
        until(lambda: live.service.streams.count == 0)
        with live.stream(events) as third:
            assert third.status_code == 200


def test_a_server_that_stops_closes_its_streams_without_an_end(face: Face, live: Live):
    with live.stream(face.post_job()["links"]["events"]) as answer:
        lines = answer.iter_lines()
        told_by(lines, 1)
        live.service.draining.set()

        assert told_by(lines) == ([], False)


def test_the_stream_of_a_job_that_is_deleted_ends(face: Face, live: Live):
    job = face.post_job()
    with ExitStack() as stack:
        answer = stack.enter_context(live.stream(job["links"]["events"]))
        lines = answer.iter_lines()
        told_by(lines, 1)
        with face.work(), face.service.open_session() as session, session.begin():
            from jobs.clock import now

            change(session, job["id"], deleted_at=now())

        assert told_by(lines) == ([], False)


def test_a_reader_that_does_not_read_is_let_go_of_and_delays_nobody(face: Face, live: Live):
    live.service.streams.write_timeout_s = 3.0  # whoever reads, though on a busy machine, is not that late
    job = face.post_job()
    url = job["links"]["events"]
    deaf = [live.deaf(url, EVENT_STREAM) for _ in range(5)]
    until(lambda: live.service.streams.count == 5)
    warn(face, job["id"], 600, "x" * 2000)

    with live.stream(url) as answer:
        lines = answer.iter_lines()
        told, _ = told_by(lines, 601)
        assert live.client.get(job["links"]["self"]).status_code == 200
        until(lambda: live.service.streams.count == 1)

    assert [seq for seq, _, _ in told] == list(range(1, 602))
    for connection in deaf:
        connection.close()


def test_a_download_that_nobody_reads_delays_nobody(face: Face, live: Live, tmp_path: Path):
    job = face.post_job()
    face.succeed(job["id"], {"model.safetensors": bytes(8 * 2**20)}, tmp_path / "out")
    url = f"{job['links']['artifact']}/files/model.safetensors"
    deaf = [live.deaf(url) for _ in range(60)]  # more than there are threads

    whole = live.client.get(url)
    answers = [live.client.get(job["links"]["self"]).status_code for _ in range(20)]

    assert len(whole.content) == 8 * 2**20
    assert answers == [200] * 20
    for connection in deaf:
        connection.close()
