"""Deliveries, to receivers on this machine: to the checked address, under the name, signed, bounded, and again until taken."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from jobs.tables import WebhookDelivery
from jobs.webhooks import Answer, Outgoing, secret_of
from tests.jobs.conftest import OWNER, Rows
from worker.delivery import Sender
from worker.webhooks import Dispatcher

NAME = "hooks.invalid"
"""Resolves nowhere; only the address that the sender was given leads to the receiver."""
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


@dataclass
class Receiver:
    """An HTTP server that answers as it is told, and remembers what came."""

    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    heard: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    hang: threading.Event | None = None
    port: int = 0

    @property
    def listed(self) -> tuple[str, ...]:
        return (f"{NAME}:{self.port}",)

    def url(self, scheme: str = "http", path: str = "/x?a=b") -> str:
        return f"{scheme}://{NAME}:{self.port}{path}"


@contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.heard.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            if receiver.hang is not None:
                receiver.hang.wait(60)
            status, headers, content = receiver.answers.pop(0) if receiver.answers else (204, {}, b"")
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        tls.sni_callback = lambda _connection, name, _context: receiver.names.append(name)
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield receiver
    if receiver.hang is not None:
        receiver.hang.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


def here(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


def outgoing(url: str, tries: int = 1) -> Outgoing:
    return Outgoing("whd_1", "ann", url, url.split("/")[2], {"type": "job.failed", "data": {}}, tries)


def send(receiver: Receiver, url: str | None = None, **options: Any) -> Answer:
    return Sender(receiver.listed, **{"resolve": here, **options}).send(outgoing(url or receiver.url()), SECRET)


def test_a_delivery_comes_signed_to_the_checked_address_under_its_name(receiver: Receiver):
    assert send(receiver) == Answer(204)

    [(path, headers, body)] = receiver.heard
    assert (path, headers["host"], headers["content-type"]) == ("/x?a=b", f"{NAME}:{receiver.port}", "application/json")
    message = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(b"k" * 32, message, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["webhook-id"] == "whd_1"
    assert abs(int(headers["webhook-timestamp"]) - datetime.now(UTC).timestamp()) < 60
    assert json.loads(body)["type"] == "job.failed"


def test_a_name_that_turned_inside_is_not_connected_to(receiver: Receiver):
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])
    sender = Sender((), resolve=lambda _host, _port: next(answers), deadline_s=1.0)
    from jobs.receivers import check_receiver

    check_receiver(f"https://{NAME}/x", (), lambda _host, _port: next(answers))
    answer = sender.send(outgoing(f"https://{NAME}/x"), SECRET)

    assert answer.status is None
    assert "127.0.0.1, which is not a public address" in (answer.error or "")


def test_the_name_is_asked_once_and_what_was_checked_is_what_is_connected_to(receiver: Receiver):
    asked: list[str] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        assert not asked, "asked again"
        asked.append(host)
        return ["127.0.0.1"]

    assert send(receiver, resolve=resolve).is_success
    assert asked == [NAME]


def test_the_name_is_in_the_tls_handshake_and_in_the_certificate(tmp_path: Path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("NOT RUN: openssl is not installed (apt-get install openssl)")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))

    with receiving(theirs) as receiver:
        assert send(receiver, receiver.url("https"), tls=trusting) == Answer(204)
        assert receiver.names == [NAME]
        other = send(receiver, receiver.url("https").replace(NAME, "other.invalid"), tls=trusting)
        stranger = send(receiver, receiver.url("https"))
        wrong = Sender((f"other.invalid:{receiver.port}",), resolve=here, tls=trusting)
        mistaken = wrong.send(outgoing(receiver.url("https").replace(NAME, "other.invalid")), SECRET)

    assert "SLIMTRIM_WEBHOOK_HOSTS" in (other.error or "")
    assert "certificate" in (stranger.error or "").lower(), "nobody whom we do not trust"
    assert "certificate" in (mistaken.error or "").lower(), "nobody of another name"
    assert len(receiver.heard) == 1


def test_a_redirect_is_a_failure_and_is_not_followed(receiver: Receiver):
    receiver.answers = [(307, {"Location": receiver.url(path="/elsewhere")}, b"")]

    answer = send(receiver)

    assert (answer.status, answer.is_success, len(receiver.heard)) == (307, False, 1)


def test_of_an_endless_answer_little_is_read(receiver: Receiver):
    receiver.answers = [(200, {"Content-Length": str(2**40)}, b"x" * 2**22)]

    assert send(receiver, deadline_s=20.0) == Answer(200)


def test_a_receiver_that_hangs_or_drips_is_left_at_the_deadline(receiver: Receiver):
    receiver.hang = threading.Event()
    assert send(receiver, deadline_s=0.3).error is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b"H")
                    except OSError:
                        return

        threading.Thread(target=drip, daemon=True).start()
        port = listener.getsockname()[1]
        answer = Sender((f"{NAME}:{port}",), resolve=here, deadline_s=0.5).send(outgoing(f"http://{NAME}:{port}/"), SECRET)
        stop.set()

    assert answer.status is None


@pytest.mark.parametrize("status", [429, 503])
def test_a_receiver_says_when_it_wants_to_hear_again(receiver: Receiver, status: int):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    receiver.answers = [(status, {"Retry-After": text}, b"") for text in ("70", date, "soon", "")]

    waits = [send(receiver).retry_after_s for _ in range(4)]

    assert waits[0] == 70
    assert 60 < waits[1] <= 91
    assert waits[2:] == [0.0, 0.0]


def test_nobody_at_home_is_an_answer_too(receiver: Receiver):
    (port,) = [receiver.port]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    answer = Sender((f"{NAME}:{port}",), resolve=here).send(outgoing(f"http://{NAME}:{port}/"), SECRET)

    assert (answer.status, answer.error is not None) == (None, True)


def hooked(rows: Rows, receiver: Receiver, *events: str) -> str:
    return rows.add(request={"webhook": {"url": receiver.url(), "events": list(events or ("job.created",))}})


def dispatcher(rows: Rows, *receivers: Receiver) -> Dispatcher:
    listed = tuple(name for receiver in receivers for name in receiver.listed)
    return Dispatcher(rows.settings, rows.open_session, Sender(listed, resolve=here))


def states(rows: Rows) -> list[tuple[str, int]]:
    with rows.open_reader() as session:
        return [(row.state, row.tries) for row in session.query(WebhookDelivery).order_by(WebhookDelivery.id)]


def until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if is_so():
            return
        pause.wait(0.01)
    pytest.fail("it did not come to pass")


def test_a_delivery_is_repeated_under_the_same_id_until_it_is_taken(rows: Rows, receiver: Receiver):
    receiver.answers = [(500, {}, b"")]
    hooked(rows, receiver)
    for tries, state in ((1, "pending"), (2, "delivered")):
        round_ = dispatcher(rows, receiver)
        assert round_.look() == 1
        round_.close()
        assert states(rows) == [(state, tries)]
        with rows.open_session() as session, session.begin():
            session.execute(update(WebhookDelivery).values(due_at=datetime.now(UTC) - timedelta(seconds=1)))

    assert dispatcher(rows, receiver).look() == 0
    first, second = receiver.heard
    assert first[1]["webhook-id"] == second[1]["webhook-id"]
    assert first[2] == second[2]
    secret = base64.b64decode(secret_of(rows.settings, OWNER).removeprefix("whsec_"))
    message = f"{second[1]['webhook-id']}.{second[1]['webhook-timestamp']}.".encode() + second[2]
    expected = base64.b64encode(hmac.new(secret, message, hashlib.sha256).digest()).decode()
    assert second[1]["webhook-signature"] == f"v1,{expected}"


def test_a_receiver_that_hangs_keeps_no_other_waiting(rows: Rows, receiver: Receiver):
    receiver.hang = threading.Event()
    for _ in range(20):
        hooked(rows, receiver)
    stop = threading.Event()
    with receiving() as other:
        running = threading.Thread(target=dispatcher(rows, receiver, other).run, args=(stop,), daemon=True)
        running.start()
        until(lambda: len(receiver.heard) == 2)
        for _ in range(5):
            hooked(rows, other)
        until(lambda: len(other.heard) == 5)
        assert len(receiver.heard) == 2, "few at a time to one receiver"
        receiver.hang.set()
        until(lambda: [state for state, _ in states(rows)] == ["delivered"] * 25)
        stop.set()
        running.join(30)
    assert not running.is_alive()
