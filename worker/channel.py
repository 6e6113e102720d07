"""The child's end of the line to its worker (the other end is ``process.py``).

Work arrives as the first JSON line on standard input, renewals of the lease and answers after it. Events and questions
leave as JSON lines on a pipe of their own. When standard input ends, the worker is gone, and so is this process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from compression.errors import SlimtrimError
from jobs.tether import die_with_parent


class Channel:
    """What the child hears and says."""

    def __init__(self, events: int) -> None:
        self._events = os.fdopen(events, "w", encoding="utf-8")
        self._good_until = float("inf")
        self._stop = threading.Event()
        self._answers: SimpleQueue[dict[str, Any]] = SimpleQueue()
        lines = _lines(0)
        self.work: dict[str, Any] = json.loads(next(lines))
        threading.Thread(target=self._hear, args=(lines,), daemon=True).start()

    def stop_on_sigterm(self) -> None:
        """Take SIGTERM as the wish to end at the next block, instead of dying of it."""
        signal.signal(signal.SIGTERM, lambda _number, _frame: self._stop.set())

    @property
    def should_stop(self) -> bool:
        """Whether the worker asked, or its lease has passed without a renewal: then another may have the job."""
        return self._stop.is_set() or time.monotonic() > self._good_until

    def say(self, line: Mapping[str, Any]) -> None:
        """Send one line."""
        self._events.write(json.dumps(line) + "\n")
        self._events.flush()

    def ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line and return what answers it. There is one question at a time."""
        self.say(line)
        return self._answers.get()

    def say_result(self, **result: Any) -> None:
        """Send the last line of work that is done."""
        self.say({"type": "result", **result})

    def say_error(self, error: SlimtrimError) -> None:
        """Send the last line of work that failed."""
        self.say({"type": "error", "code": error.code, "message": error.message, "retryable": error.retryable})

    def _hear(self, lines: Iterator[bytes]) -> None:
        for line in lines:
            heard = json.loads(line)
            if "good_until" in heard:
                self._good_until = heard["good_until"]
            else:
                self._answers.put(heard)
        os._exit(1)


def open_channel(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Channel]:
    """Tie this process to its worker and return its arguments and its channel."""
    parser.add_argument("--events", type=int, required=True, help="descriptor of the pipe that takes JSON lines")
    parser.add_argument("--parent", type=int, required=True, help="process id of the worker")
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    return options, Channel(options.events)


def _lines(descriptor: int) -> Iterator[bytes]:
    """Yield lines as they come. Not through ``sys.stdin``: a thread that waits in its buffer blocks the interpreter's end."""
    rest = b""
    while chunk := os.read(descriptor, 65_536):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
