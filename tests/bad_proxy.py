"""A proxy that behaves as networks do on a bad day: it cuts connections, stalls, flips bytes, and answers 503 itself.

It stands between a client and a real server on loopback and knows no protocol: bytes go through as they come. With
``http=True`` it reads the head of each request, counts it, may answer 503 in the server's place, and lets one connection
carry one request, so that faults by position count from the request's first byte.

    with a_bad_proxy(server_port) as proxy:
        proxy.faults = Faults(cut_down=100_000)
        connect_to("127.0.0.1", proxy.port)
"""

from __future__ import annotations

import random
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_CHUNK = 65_536
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Faults:
    """What goes wrong. Up is from client to server. Positions count bytes of one connection in one direction."""

    refuse: float = 0.0
    """Share of the requests that are answered 503; only with ``http=True``."""
    cut_up: int | None = None
    cut_down: int | None = None
    """The connection is reset after so many bytes; of those, what the client has not read yet is lost as well."""
    end_down: int | None = None
    """The connection ends after so many bytes, which all arrive."""
    flip_up: int | None = None
    flip_down: int | None = None
    """The byte at this place is another one."""
    stall_up: int | None = None
    stall_down: int | None = None
    """After so many bytes nothing comes any more, and the connection stays open until ``heal`` or the end."""
    times: int | None = None
    """How many connections it happens to before all is well; None: to every one."""


@dataclass
class BadProxy:
    """A running proxy and what it has seen."""

    upstream: int
    http: bool
    port: int = 0
    faults: Faults = Faults()
    requests: list[str] = field(default_factory=list)
    """First lines of HTTP requests, such as "GET /a HTTP/1.1"; those that were refused included."""
    refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self._healed = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        """Where an HTTP client finds it."""
        return f"http://127.0.0.1:{self.port}"

    def cut_all(self) -> None:
        """Reset every connection that is open now."""
        with self._lock:
            for held in self._sockets:
                _reset(held)

    def heal(self) -> None:
        """Let everything through from now on, what was stalled included."""
        self.faults = Faults()
        self._healed.set()

    def serve(self) -> None:
        """Take connections until ``close``."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def close(self) -> None:
        """End it and every connection."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._healed.set()
        self.cut_all()

    def _carry(self, client: socket.socket) -> None:
        with self._held(client), suppress(OSError):
            head = self._request_head(client) if self.http else b""
            if head is None:
                return
            faults = self._next_faults()
            with socket.create_connection(("127.0.0.1", self.upstream)) as server, self._held(server):
                up = threading.Thread(target=self._pump, args=(client, server, head, "up", faults), daemon=True)
                up.start()
                self._pump(server, client, b"", "down", faults)
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
                up.join()

    def _request_head(self, client: socket.socket) -> bytes | None:
        """Return the bytes up to the body, told to be the connection's last; None when nothing came or it was refused."""
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := client.recv(_CHUNK)):
                return None
            head += data
        with self._lock:
            self.requests.append(head.split(b"\r\n", 1)[0].decode("latin-1"))
            refused = self._random.random() < self.faults.refuse
            self.refused += refused
        if refused:
            self._refuse(client, head)
            return None
        lines, body = head.split(b"\r\n\r\n", 1)
        # Signatures do not cover this header.
        lines = re.sub(rb"(?im)^connection:[^\r]*\r\n", b"", lines + b"\r\n") + b"Connection: close"
        return lines + b"\r\n\r\n" + body

    def _refuse(self, client: socket.socket, head: bytes) -> None:
        body = b"" if head.startswith(b"HEAD ") else _SLOW_DOWN
        about = f"Content-Type: application/xml\r\nContent-Length: {len(_SLOW_DOWN)}\r\nConnection: close\r\n\r\n"
        client.sendall(f"HTTP/1.1 503 Slow Down\r\n{about}".encode() + body)
        client.shutdown(socket.SHUT_WR)
        while client.recv(_CHUNK):  # a reset would overtake the answer
            pass

    def _next_faults(self) -> Faults:
        with self._lock:
            faults = self.faults
            if faults.times is None:
                return faults
            if faults.times == 0:
                return Faults()
            self.faults = Faults(**{**vars(faults), "times": faults.times - 1})
            return faults

    def _pump(self, source: socket.socket, sink: socket.socket, first: bytes, way: str, faults: Faults) -> None:
        """Carry bytes one way until the end, or until what is to happen has happened."""
        cut, flip, stall = (getattr(faults, f"{name}_{way}") for name in ("cut", "flip", "stall"))
        end = faults.end_down if way == "down" else None
        passed = 0
        with suppress(OSError):
            while data := first or source.recv(_CHUNK):
                first = b""
                if flip is not None and passed <= flip < passed + len(data):
                    place = flip - passed
                    data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
                stop = min((limit for limit in (cut, stall, end) if limit is not None), default=None)
                whole = stop is None or passed + len(data) <= stop
                sink.sendall(data if whole else data[: stop - passed])
                passed += len(data)
                self._count(way, len(data))
                if not whole and stop == end:
                    break
                if not whole and stop == cut:
                    _reset(source)
                    _reset(sink)
                    return
                if not whole:
                    self._healed.wait()
                    sink.sendall(data[stop - passed :])
                    stall = None
            sink.shutdown(socket.SHUT_WR)

    def _count(self, way: str, count: int) -> None:
        with self._lock:
            setattr(self, f"bytes_{way}", getattr(self, f"bytes_{way}") + count)

    @contextmanager
    def _held(self, held: socket.socket) -> Iterator[None]:
        with self._lock:
            self._sockets.add(held)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(held)
            held.close()


@contextmanager
def a_bad_proxy(upstream: int, *, http: bool = False) -> Iterator[BadProxy]:
    """Run a proxy in front of the loopback port ``upstream``; without faults it is a good one."""
    proxy = BadProxy(upstream, http)
    server = threading.Thread(target=proxy.serve, daemon=True)
    server.start()
    try:
        yield proxy
    finally:
        proxy.close()
        server.join()


def _reset(held: socket.socket) -> None:
    """End a connection the hard way: the other end gets a reset, not an end of stream."""
    with suppress(OSError):
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        held.shutdown(socket.SHUT_RDWR)
