"""A child process for one piece of work: started, fed with the lease, listened to, and never left behind.

The child gets its work as the first JSON line on standard input and ``{"good_until": t}`` lines after it. It answers
with JSON lines on a pipe of its own, because libraries print on standard output; the last one is its result or its
error. It leads its own session, so that one signal reaches everything it starts.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from compression.errors import OutOfHostMemory, SlimtrimError
from jobs.errors import WorkerLost
from jobs.tether import with_our_modules
from worker.leash import Interruption, Leash
from worker.memory import MemoryWatch
from worker.output import start_passing_on

_LOOK_EVERY_S = 1.0
"""A child that died without closing its pipe (a grandchild holds it) is noticed this late."""
_EXIT_S = 10.0
"""Seconds a child has to end after its last word."""

_log = logging.getLogger(__name__)
Line = dict[str, Any]
OnEvent = Callable[[Line, Callable[[Line], None]], None]
"""Told a line of the child's, and what answers it."""


class ChildError(SlimtrimError):
    """The child named what went wrong."""

    def __init__(self, line: Line) -> None:
        super().__init__(line["message"])
        self.code = line["code"]
        self.retryable = line["retryable"]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the child is to be told, though it said something else meanwhile."""

    line: Line


class LeaseLapsed(WorkerLost):
    """The child stopped by itself, because no renewal of the lease reached it in time."""


def run_child(
    arguments: Sequence[str],
    work: Line,
    leash: Leash,
    *,
    environment: Mapping[str, str],
    grace_s: Mapping[Interruption, float],
    on_event: OnEvent,
    memory_limit: int = 0,
) -> Line:
    """Run ``python -m <arguments>`` to its end and return its result line.

    Raises ``Interrupted`` when the leash was pulled: the child was asked to stop, and killed after the reason's grace
    (0 when it has none). Raises ``ChildError`` for what the child reports, ``WorkerLost`` when it died without a word,
    ``OutOfHostMemory`` when it was killed because it used more than ``memory_limit`` bytes (0: any number).
    ``on_event`` may answer a line, now or later and from any thread.
    """
    leash.check()
    child = _Child(arguments, environment, work.get("log", {}))
    watch = MemoryWatch(memory_limit)
    try:
        with leash.held_by(child.inbox.put), watch.over(child.pid, lambda: child.signal(signal.SIGKILL)):
            child.tell(work)
            final = _listen(child, grace_s, on_event)
        leash.check()
        if final is None and watch.exceeded_by is not None:
            raise OutOfHostMemory(
                f"the process that did the work used {watch.exceeded_by} bytes of main memory; "
                f"SLIMTRIM_JOB_MEMORY_BYTES allows {memory_limit}"
            )
        return _understood(final, child)
    finally:
        child.end()


def _listen(child: _Child, grace_s: Mapping[Interruption, float], on_event: OnEvent) -> Line | None:
    """Serve the child until it has said its last word, or died."""
    kill_at = float("inf")
    while True:
        match child.next(kill_at):
            case Interruption() as reason:
                kill_at = min(kill_at, time.monotonic() + grace_s.get(reason, 0.0))
                child.signal(signal.SIGTERM)
            case float(good_until):
                child.tell({"good_until": good_until})
            case _Answer(line):
                child.tell(line)
            case {"type": "result" | "error" | "stopped"} as line:
                return line
            case dict() as line:
                on_event(line, lambda answer: child.inbox.put(_Answer(answer)))
            case None:
                return None


def _understood(final: Line | None, child: _Child) -> Line:
    match final:
        case {"type": "result"}:
            return final
        case {"type": "error"}:
            raise ChildError(final)
        case {"type": "stopped"}:
            raise LeaseLapsed("the lease was not renewed in time, so the work stopped")
        case _:
            raise WorkerLost(f"the process that did the work ended without a result: {child.epitaph()}")


class _Child:
    """The process, its pipe, and one inbox for all that concerns it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], fields: Mapping[str, Any]) -> None:
        self.inbox: SimpleQueue[Line | Interruption | float | _Answer | None] = SimpleQueue()
        read, write = os.pipe()
        own = ["--events", str(write), "--parent", str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments, *own],
            env=with_our_modules(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()
        assert self._process.stdout is not None
        self._output = start_passing_on(self._process.stdout, fields)

    @property
    def pid(self) -> int:
        return self._process.pid

    def next(self, kill_at: float) -> Line | Interruption | float | _Answer | None:
        """Return what comes next, None at the end; kill the child when its time is over."""
        while True:
            if time.monotonic() >= kill_at:
                self.signal(signal.SIGKILL)
            try:
                return self.inbox.get(timeout=max(0.01, min(_LOOK_EVERY_S, kill_at - time.monotonic())))
            except Empty:
                if self._process.poll() is not None:
                    self.signal(signal.SIGKILL)  # whoever of its session still holds the pipe

    def tell(self, message: Line) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is over; the inbox will say so
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def epitaph(self) -> str:
        """Say how the process ended."""
        code = self._process.wait()
        if code >= 0:
            return f"exit code {code}"
        killed = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{killed}"

    def end(self) -> None:
        """See to it that nothing of the child is left."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # for the child this is the end, whatever it is doing
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            _log.warning("child did not end by itself", extra={"pid": self._process.pid})
        self.signal(signal.SIGKILL)  # the rest of its session, whose number lives as long as any member
        self._process.wait()
        self._reader.join()
        self._output.join()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as pipe:
            for raw in pipe:
                with suppress(json.JSONDecodeError):  # the last line of a child that was killed
                    self.inbox.put(json.loads(raw))
        self.inbox.put(None)
