"""Logs as JSON lines on standard error: one event per line, with fields rather than sentences made of numbers.

``log.info("lease lost", extra={"job": id, "fence": 3})``. What looks like a secret is blanked before it is written, and so
is every secret that this process was given in its environment, whatever it looks like.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Generator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_BLANK = "[secret]"
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bslim_[A-Za-z0-9_-]{16,}|\bwhsec_[A-Za-z0-9+/=_-]{8,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|(?i:(?<=bearer )|(?<=basic ))[A-Za-z0-9._~+/=-]{8,}"
    r"|(?i:(?<=authorization: )|(?<=authorization=))(?!bearer |basic )[^\s\"',}]+"
    r"|(?i:(?<=x-amz-signature=)|(?<=x-amz-credential=)|(?<=x-amz-security-token=)|(?<=signature=))[^&\s\"'\\]+"
    r"|(?<=://)[^\s/@:\"']*:[^\s\"'<>\\]+(?=@)"
)
"""Tokens by their prefixes, what follows Bearer, signatures in links, user and password in an address."""
_NAMES = ("SLIMTRIM_HF_TOKEN", "HF_TOKEN", "SLIMTRIM_SECRET", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_ADDRESSES = ("SLIMTRIM_DATABASE_URL", "SLIMTRIM_BROKER_URL")
_SHORTEST = 6
"""A shorter password would blank half of every line, and is found out anyway."""
_bound: ContextVar[Mapping[str, Any]] = ContextVar("fields")


class JsonLines(logging.Formatter):
    """One JSON object per record, extra fields included."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        extra = {name: value for name, value in vars(record).items() if name not in _OWN and not name.startswith("_")}
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"at": at, "level": record.levelname.lower(), "event": record.getMessage(), "logger": record.name}
        line |= {**self._fields, **_bound.get({}), **extra}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return blank_secrets(json.dumps(line, default=str, ensure_ascii=False))


class Fields(logging.LoggerAdapter[logging.Logger]):
    """A logger that adds the same fields to every line, such as ``job`` and ``fence``."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Merge the call's own fields over ours."""
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


def bind_fields(**fields: Any) -> None:
    """Add the fields to every line that is logged from this context on; for one that ends by itself, such as a request's."""
    _bound.set({**_bound.get({}), **fields})


@contextmanager
def bound_fields(**fields: Any) -> Generator[None]:
    """Add the fields to every line that this thread logs inside."""
    before = _bound.set({**_bound.get({}), **fields})
    try:
        yield
    finally:
        _bound.reset(before)


def blank_secrets(text: str) -> str:
    """Return the text without what is, or looks like, a secret."""
    for value in _given_secrets():
        text = text.replace(value, _BLANK)
    return _SECRET.sub(_BLANK, text)


def configure_logs(**fields: Any) -> None:
    """Send every log of this process to standard error as JSON lines that carry ``fields``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(**fields))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _note_crash
    threading.excepthook = lambda crash: _note_crash(crash.exc_type, crash.exc_value, crash.exc_traceback)
    for chatty in ("alembic", "celery", "kombu", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It warns at every start that a folder has no host name.
    logging.getLogger("kombu.connection").setLevel(logging.ERROR)


def _note_crash(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None and issubclass(kind, Exception):
        logging.getLogger("crash").critical("not caught", exc_info=(kind, error, trace))


def _given_secrets() -> list[str]:
    """Return the secrets in this process's environment, as written and as they look inside JSON and addresses."""
    values = [os.environ.get(name, "") for name in _NAMES]
    values += [_password(os.environ.get(name, "")) for name in _ADDRESSES]
    spellings = {form for value in values for form in (value, unquote(value), json.dumps(value)[1:-1])}
    return sorted((form for form in spellings if len(form) >= _SHORTEST), key=len, reverse=True)


def _password(address: str) -> str:
    try:
        return urlsplit(address).password or ""
    except ValueError:
        return ""
