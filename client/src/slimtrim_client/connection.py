"""Which service is spoken to, and how: its address, the key, and what both shells hand to httpx."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from slimtrim_client.errors import BadInput
from slimtrim_client.messages import Answer, Failed, Request
from slimtrim_client.retries import Patience

__version__ = "0.1.0"
DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "SLIMTRIM_URL"
KEY_VARIABLE = "SLIMTRIM_API_KEY"
KEY_FILE_VARIABLE = "SLIMTRIM_API_KEY_FILE"
_CONNECT_S = 10.0
_READ_S = 60.0


@dataclass(frozen=True)
class Connection:
    """Where to, as whom, and how patiently."""

    url: str
    key: str | None = field(default=None, repr=False)
    patience: Patience = field(default_factory=Patience)

    @staticmethod
    def of(url: str | None, key: str | None, patience: Patience | None) -> Connection:
        """Fill in what is not given from the environment. An empty key means none, whatever the environment has."""
        url = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        key = key_of_environment(os.environ) if key is None else key
        return Connection(_checked_url(url), _checked_key(key) if key else None, patience or Patience())

    @property
    def is_on_this_machine(self) -> bool:
        """Whether the address is a loopback one."""
        host = httpx.URL(self.url).host
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    @property
    def shows_its_key(self) -> bool:
        """Whether the key travels where others can read it."""
        return self.key is not None and self.url.startswith("http:") and not self.is_on_this_machine

    def options(self) -> dict[str, Any]:
        """Return what both kinds of httpx client are made with. The key is sent to the service alone, see ``headers``."""
        return {
            "base_url": self.url,
            "timeout": httpx.Timeout(_READ_S, connect=_CONNECT_S),
            "headers": {"User-Agent": f"slimtrim-client/{__version__}"},
            # A proxy of the environment cannot reach this machine.
            "trust_env": not self.is_on_this_machine,
        }

    def arguments(self, request: Request) -> dict[str, Any]:
        """Return what ``build_request`` takes, with the key."""
        given: dict[str, Any] = {"method": request.method, "url": request.path, "headers": dict(request.headers)}
        if self.key is not None:
            given["headers"]["Authorization"] = f"Bearer {self.key}"
        if request.parameters:
            given["params"] = list(request.parameters)
        if request.body is not None:
            given["content"] = request.body
        if request.read_s is not None:
            given["timeout"] = httpx.Timeout(_READ_S, connect=_CONNECT_S, read=request.read_s)
        return given


def answer_of(response: httpx.Response, body: bytes = b"") -> Answer:
    """Return what httpx received, as a message."""
    return Answer(response.status_code, dict(response.headers), body)


def failed_of(error: httpx.HTTPError, where: str) -> Failed:
    """Return what httpx raised, as a message."""
    return Failed(f"{where}: {str(error) or type(error).__name__}")


def key_of_environment(environment: Mapping[str, str]) -> str | None:
    """Return the key that the environment names, itself or by a file."""
    if key := environment.get(KEY_VARIABLE):
        return key
    if file := environment.get(KEY_FILE_VARIABLE):
        return key_of_file(Path(file))
    return None


def key_of_file(file: Path) -> str:
    """Return the key that a file holds."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the key cannot be read from {file}: {getattr(error, 'strerror', None) or 'not text'}") from error
    if not key:
        raise BadInput(f"the key file {file} is empty")
    return key


def _checked_key(key: str) -> str:
    # The value itself is never shown, nor left to an error message of a library.
    if not all("!" <= letter <= "~" for letter in key):
        raise BadInput("the API key holds white space or letters beyond ASCII; it is one word as the operator gave it")
    return key


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise BadInput(f"{url!r} is not an address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BadInput(f"{url!r} is not the address of a service; write it as {DEFAULT_URL}")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise BadInput("the address of the service is written without user, password, query or fragment")
    return url.rstrip("/")
