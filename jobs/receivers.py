"""Where a webhook may go: a public address on the https port, or what the operator lists by name.

A caller chooses the url, and the service would connect to it from inside its own network. So a name is resolved, every
address it has must be a public one, and the delivery then connects to one of the addresses that were looked at
(``worker/delivery.py``), not to the name again: a name that changes its mind in between gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from jobs.errors import ReceiverRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]
"""Host and port -> addresses; ``OSError`` when there are none."""

_PORTS = {"https": 443, "http": 80}
_SLOWEST_LOOKUP_S = 5.0
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
_REFUSED = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # for protocols; some versions of Python take it for public
        "168.63.129.16/32",  # public in form, but answered by the cloud's own host
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # Teredo and other protocols that carry an IPv4 address inside
        "2002::/16",  # 6to4: an IPv4 address inside
    )
]
"""Addresses that look public and lead elsewhere. Mapped and NAT64 addresses lie outside ``2000::/3``."""
_lookups = ThreadPoolExecutor(8, thread_name_prefix="lookup")


@dataclass(frozen=True, slots=True)
class Receiver:
    """A url, taken apart."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query, as they are sent."""

    @property
    def name(self) -> str:
        """Host and port, as the operator lists them."""
        return f"{self._bracketed}:{self.port}"

    @property
    def authority(self) -> str:
        """What the ``Host`` header says."""
        return self._bracketed if self.port == _PORTS[self.scheme] else self.name

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def check_receiver(url: str, listed: Sequence[str], resolve: Resolve | None = None) -> None:
    """Refuse a url to which nothing will be sent. A name that has no address at the moment may have one by then."""
    receiver = parse_receiver(url, listed)
    with suppress(OSError):
        checked_addresses(receiver, listed, resolve or system_resolver)


def parse_receiver(url: str, listed: Sequence[str]) -> Receiver:
    """Take a url apart, or say why nothing is ever sent there. ``listed``: hosts and ports that the operator trusts."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
        host.encode("ascii")
    except ValueError as error:
        raise _refused("the webhook's url cannot be read; a name with other letters is written in punycode") from error
    if parts.scheme not in _PORTS or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise _refused("the webhook's url must be https://host/path in visible ASCII characters")
    if parts.username is not None or parts.password is not None:
        raise _refused("the webhook's url must not hold a user or a password; deliveries are signed instead")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    receiver = Receiver(parts.scheme, host, port or _PORTS[parts.scheme], target)
    if receiver.name not in listed and (receiver.scheme, receiver.port) != ("https", 443):
        raise _refused(
            f"a webhook goes to port 443 by https; {receiver.scheme} to {receiver.name} would need an entry in "
            "SLIMTRIM_WEBHOOK_HOSTS"
        )
    return receiver


def system_resolver(host: str, port: int) -> Sequence[str]:
    """Ask the system for a host's addresses, for a few seconds at most."""
    asked = _lookups.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = asked.result(_SLOWEST_LOOKUP_S)
    except (Late, UnicodeError) as error:
        raise OSError(f"the name {host} was not resolved") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def checked_addresses(receiver: Receiver, listed: Sequence[str], resolve: Resolve = system_resolver) -> Sequence[str]:
    """Return the receiver's addresses; raise ``ReceiverRefused`` if any is not public, ``OSError`` if there are none."""
    addresses = resolve(receiver.host, receiver.port)
    if not addresses:
        raise OSError(f"the name {receiver.host} has no address")
    if receiver.name not in listed and (bad := [address for address in addresses if not is_public(address)]):
        raise _refused(f"{receiver.host} resolves to {bad[0]}, which is not a public address")
    return addresses


def is_public(address: str) -> bool:
    """Say whether an address is one of the public internet's, and says plainly which."""
    try:
        parsed: Address = ipaddress.ip_address(address)
    except ValueError:  # with a scope, such as fe80::1%eth0
        return False
    if parsed.version == 6 and parsed not in _GLOBAL_V6:
        return False
    return parsed.is_global and not parsed.is_multicast and not any(parsed in refused for refused in _REFUSED)


def _refused(message: str) -> ReceiverRefused:
    return ReceiverRefused(message, pointer="/webhook/url")
