"""One try to deliver: a signed POST to an address that was looked at, within a deadline, of whose answer little is read.

httpcore rather than httpx: it takes the network as an argument, so the connection goes to the checked address while the
name stays in ``Host`` and in the TLS handshake; it follows no redirect, reads no proxy from the environment, and the
deadline can be put under every read and write.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore

from compression.errors import SlimtrimError
from jobs.receivers import Receiver, Resolve, checked_addresses, parse_receiver, system_resolver
from jobs.webhooks import Answer, Outgoing, encoded, signed_headers

DEADLINE_S = 15.0
"""Seconds for a whole try, connecting included."""
_READ = 1024
"""Bytes that are read of an answer."""
_ERROR = 1000


class Sender:
    """Sends deliveries. Safe to use from many threads."""

    def __init__(
        self,
        listed: Sequence[str],
        *,
        resolve: Resolve = system_resolver,
        tls: ssl.SSLContext | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._listed = listed
        self._resolve = resolve
        self._tls = tls or ssl.create_default_context()
        self._deadline_s = deadline_s

    def send(self, outgoing: Outgoing, secret: str) -> Answer:
        """Try once; whatever goes wrong is the answer."""
        try:
            receiver = parse_receiver(outgoing.url, self._listed)
            # Looked at anew each time: the name may have been public when the job was created and not be so now.
            addresses = checked_addresses(receiver, self._listed, self._resolve)
            # Another one each time, for one of them may not be reachable from here.
            return self._post(receiver, addresses[(outgoing.tries - 1) % len(addresses)], outgoing, secret)
        except SlimtrimError as refusal:
            return Answer(None, refusal.message[:_ERROR])
        except (OSError, httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            return Answer(None, f"{type(error).__name__}: {error}"[:_ERROR])

    def _post(self, receiver: Receiver, address: str, outgoing: Outgoing, secret: str) -> Answer:
        body = encoded(outgoing.payload)
        headers = {
            "Host": receiver.authority,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "User-Agent": "slimtrim-webhooks",
            "Connection": "close",
            **signed_headers(secret, outgoing.id, int(time.time()), body),
        }
        url = httpcore.URL(scheme=receiver.scheme, host=receiver.host, port=receiver.port, target=receiver.target)
        network = _OneAddress(address, time.monotonic() + self._deadline_s)
        with (
            httpcore.ConnectionPool(ssl_context=self._tls, network_backend=network, http2=False) as pool,
            pool.stream("POST", url, headers=list(headers.items()), content=body) as answer,
        ):
            _read_a_little(answer)
            fields = {name.lower(): value for name, value in answer.headers}
            error = None if 200 <= answer.status < 300 else f"the receiver answered {answer.status}"
            wait_s = _retry_after_s(fields.get(b"retry-after")) if answer.status in (429, 503) else 0.0
            return Answer(answer.status, error, wait_s)


class _OneAddress(httpcore.NetworkBackend):
    """The network, as far as one try may use it: one address, until the deadline."""

    def __init__(self, address: str, deadline: float) -> None:
        self._address = address
        self._deadline = deadline
        self._network = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the address that was checked, whatever the name says by now."""
        left = _left(self._deadline, httpcore.ConnectTimeout)
        stream = self._network.connect_tcp(self._address, port, left, local_address, socket_options)
        return _Bounded(stream, self._deadline)


class _Bounded(httpcore.NetworkStream):
    """A connection that ends at the deadline, however slowly its other end keeps it busy."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read what is there."""
        return self._stream.read(max_bytes, _left(self._deadline, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all of it."""
        self._stream.write(buffer, _left(self._deadline, httpcore.WriteTimeout))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Begin TLS with the name of the url."""
        left = _left(self._deadline, httpcore.ConnectTimeout)
        return _Bounded(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """Tell what httpcore asks about the connection."""
        return self._stream.get_extra_info(info)


def _left(deadline: float, late: type[httpcore.TimeoutException]) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise late("the deadline of this try is over")
    return left


def _read_a_little(answer: httpcore.Response) -> None:
    taken = 0
    for chunk in answer.iter_stream():
        taken += len(chunk)
        if taken >= _READ:
            return


def _retry_after_s(value: bytes | None) -> float:
    """Return the seconds that a receiver asks for, as a number or a date; none when it cannot be read."""
    text = (value or b"").decode("latin-1").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
