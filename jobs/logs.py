"""Logs as JSON lines on standard error: one event per line, with fields rather than sentences made of numbers.

``log.info("lease lost", extra={"job": id, "fence": 3})``. What looks like a secret is blanked before it is written.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bslim_[A-Za-z0-9_-]{16,}|(?i:\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}")


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
        line |= self._fields | extra
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return _SECRET.sub("[secret]", json.dumps(line, default=str, ensure_ascii=False))


class Fields(logging.LoggerAdapter[logging.Logger]):
    """A logger that adds the same fields to every line, such as ``job`` and ``fence``."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Merge the call's own fields over ours."""
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


def configure_logs(**fields: Any) -> None:
    """Send every log of this process to standard error as JSON lines that carry ``fields``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(**fields))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("alembic", "celery", "kombu", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It warns at every start that a folder has no host name.
    logging.getLogger("kombu.connection").setLevel(logging.ERROR)
