"""A fresh process for one piece of measuring: nothing of what came before it is in its memory, and nothing of it stays.

``python -m compression.evaluation.<module>`` gets its work as one JSON line on standard input and answers with JSON
lines. Standard input stays open: its end tells the child that its parent is gone, however that went, and the child ends
itself and all that it started. ``serve`` is the child's side, ``run_child`` the parent's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from compression.errors import (
    DownloadFailed,
    EvaluationFailed,
    OutOfGpuMemory,
    OutOfHostMemory,
    SlimtrimError,
    ValidationFailed,
)

_ASK_EVERY_S = 0.5
_TELL_EVERY_S = 1.0
_LONGEST = 1000
"""Characters of a stranger's error that are passed on."""
_KNOWN: dict[str, type[SlimtrimError]] = {
    kind.__name__: kind for kind in (ValidationFailed, DownloadFailed, EvaluationFailed, OutOfGpuMemory, OutOfHostMemory)
}

Line = dict[str, Any]
Say = Callable[[int, int], None]
"""Told how much of the work is done, of how much."""
Work = Callable[[Line, Say], Line]


def run_child(module: str, work: Line, *, check: Callable[[], None], on_progress: Say) -> Line:
    """Run the module on the work and return its result.

    ``check`` is called twice a second and may raise Stopped; then, as after any other error, the child and what it
    started are killed. Raises what the child reports, OutOfHostMemory when the system killed it, else EvaluationFailed.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            result = _listen(child, work, check, on_progress)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in filter(None, (child.stdin, child.stdout)):
                with suppress(OSError):
                    pipe.close()
        return _understood(result, child.returncode, module, noise)


def _listen(child: subprocess.Popen[bytes], work: Line, check: Callable[[], None], on_progress: Say) -> Line | None:
    """Return the child's last word; None when it died without one."""
    assert child.stdin is not None
    assert child.stdout is not None
    lines: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    with suppress(BrokenPipeError):  # it died at once; its silence says so below
        child.stdin.write(json.dumps(work).encode() + b"\n")
        child.stdin.flush()
    while True:
        check()
        try:
            said = lines.get(timeout=_ASK_EVERY_S)
        except Empty:
            continue
        if said is None:
            return None
        line: Line = json.loads(said)
        if "progress" not in line:
            return line
        on_progress(*line["progress"])


def _read(pipe: IO[bytes], lines: SimpleQueue[bytes | None]) -> None:
    with suppress(ValueError, OSError):  # closed from the other side of this process
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _understood(line: Line | None, status: int, module: str, noise: IO[bytes]) -> Line:
    if line is not None and "result" in line:
        return line["result"]
    if line is not None:
        error = line["error"]
        pointer = {"pointer": error["pointer"]} if error.get("pointer") else {}
        raise _KNOWN[error["kind"]](error["message"], **pointer)
    if status == -signal.SIGKILL:
        raise OutOfHostMemory(f"{module} was killed by the system, most likely because main memory ran out")
    noise.seek(max(0, noise.seek(0, os.SEEK_END) - _LONGEST))
    tail = noise.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
    raise EvaluationFailed(f"{module} ended with status {status} and without a result: {tail}")


def serve(work: Work) -> int:
    """Do the piece of work that standard input describes, and say what came of it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    given: Line = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(line: Line) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    told_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= _TELL_EVERY_S:
            told_at = time.monotonic()
            say({"progress": [done, total]})

    try:
        result = work(given, progress)
    except Exception as error:  # the parent must hear what happened, whatever it was
        say({"error": _described(error)})
        return 1
    say({"result": result})
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _described(error: Exception) -> Line:
    if isinstance(error, SlimtrimError) and type(error).__name__ in _KNOWN:
        return {"kind": type(error).__name__, "message": error.message, "pointer": getattr(error, "pointer", None)}
    # By name: torch's own class lies elsewhere in every release, and this module does not load torch.
    out_of_gpu = type(error).__name__ == "OutOfMemoryError"
    kind = OutOfGpuMemory if out_of_gpu else OutOfHostMemory if isinstance(error, MemoryError) else EvaluationFailed
    return {"kind": kind.__name__, "message": f"{type(error).__name__}: {error}"[:_LONGEST]}
