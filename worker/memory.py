"""Watches how much main memory a child process uses, its own children included, and ends it when that is too much.

A limit of our own, because the system's comes late: its killer may choose another process, such as the worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import psutil

_LOOK_EVERY_S = 1.0


class MemoryWatch:
    """What was seen."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.exceeded_by: int | None = None
        """Bytes that were in use when the limit was passed."""

    @contextmanager
    def over(self, pid: int, kill: Callable[[], None]) -> Generator[None]:
        """Look at the process about once a second, and kill it over the limit; a limit of 0 is none."""
        end = threading.Event()
        thread = threading.Thread(target=self._run, args=(pid, kill, end), name="memory-watch", daemon=True)
        if self.limit:
            thread.start()
        try:
            yield
        finally:
            end.set()
            if self.limit:
                thread.join()

    def _run(self, pid: int, kill: Callable[[], None], end: threading.Event) -> None:
        while not end.wait(_LOOK_EVERY_S):
            used = memory_of(pid)
            if used > self.limit:
                self.exceeded_by = used
                kill()
                return


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process and its children hold; 0 when there is none.

    Pages of mapped files do not count: the system takes them back as soon as somebody needs the room.
    """
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                info = member.memory_info()
                total += info.rss - getattr(info, "shared", 0)
    return total
