"""What a child process prints, made into log lines: its own JSON lines pass, stray prints are wrapped.

Libraries print, an interpreter that crashes leaves its last words, and a collector of logs that expects JSON stumbles
over both.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import IO, Any

from jobs.logs import blank_secrets

_LONGEST = 8192
"""Bytes of a line that are kept."""
_STDERR = 2
_log = logging.getLogger("worker.output")


def start_passing_on(pipe: IO[bytes], fields: Mapping[str, Any]) -> threading.Thread:
    """Start the thread that reads the pipe to its end; ``fields`` go into the lines that are wrapped."""
    thread = threading.Thread(target=_pass_on, args=(pipe, fields), name="output", daemon=True)
    thread.start()
    return thread


def _pass_on(pipe: IO[bytes], fields: Mapping[str, Any]) -> None:
    extra = {name: value for name, value in fields.items() if name != "service"} | {"printed_by": fields.get("service")}
    with pipe:
        for line in _lines(pipe):
            if _is_ours(line):
                os.write(_STDERR, blank_secrets(line).encode() + b"\n")
            else:
                _log.info("printed", extra={**extra, "text": line})


def _lines(pipe: IO[bytes]) -> Iterator[str]:
    """Yield lines that are not empty. A progress bar ends its lines with a carriage return; a line may have no end."""
    rest = b""
    while chunk := os.read(pipe.fileno(), 65_536):
        *whole, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        rest = rest[:_LONGEST]
        yield from (text for raw in whole if (text := _text(raw)))
    if text := _text(rest):
        yield text


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace").strip()


def _is_ours(line: str) -> bool:
    try:
        known = json.loads(line)
    except ValueError:
        return False
    return isinstance(known, dict) and {"at", "level", "event"} <= known.keys()
