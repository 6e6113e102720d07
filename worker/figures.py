"""What is measured of an attempt while it runs: blocks and their times, memory, bytes moved; in its row, and as spans.

Processes come and go with their counters; the attempt's row stays, so the figures are kept there and ``jobs/census.py``
adds them up. They are for looking at: a figure that cannot be written is logged, and the attempt goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from jobs.attempts import Claim
from jobs.census import BLOCK_S, Histogram
from jobs.logs import Fields
from jobs.status import JobStatus
from worker.room import Room
from worker.spans import AttemptSpans

Line = dict[str, Any]
_SUMS = ("bytes_fetched", "bytes_stored")
_PEAKS = ("host_memory_peak", "gpu_memory_peak")


class Figures:
    """The sums of one attempt."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._blocks: dict[str, Histogram] = {}

    def add(self, line: Line) -> None:
        """Take what a process of the attempt says about itself."""
        for name in _SUMS:
            if name in line:
                self._known[name] = self._known.get(name, 0) + int(line[name])
        for name in _PEAKS:
            if name in line:
                self._known[name] = max(self._known.get(name, 0), int(line[name]))

    def add_block(self, stage: str, seconds: float) -> None:
        """Count one more finished block."""
        self._blocks.setdefault(stage, Histogram(BLOCK_S)).add(seconds)

    def as_document(self) -> dict[str, Any]:
        """Return the figures as the row keeps them."""
        blocks = {stage: {"counts": list(seen.counts), "sum": round(seen.sum, 3)} for stage, seen in self._blocks.items()}
        return {**self._known, "block_seconds": blocks}


class Watch:
    """Looks on while an attempt runs, from its claim to its end."""

    def __init__(self, room: Room, claim: Claim, log: Fields) -> None:
        self._room, self._claim, self._log = room, claim, log
        self._figures = Figures()
        self._spans = AttemptSpans(claim, room.name)
        self._written_at = time.monotonic()
        self._mark_ns = time.time_ns()

    def __enter__(self) -> None:
        self._spans.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._spans.end()
        self._write()

    def stage(self, stage: str) -> None:
        """Note that a stage begins."""
        self._mark_ns = time.time_ns()
        self._spans.stage(stage, self._mark_ns)

    def stored(self, size: int) -> None:
        """Count bytes that were stored while the run went on."""
        self._figures.add({"bytes_stored": size})

    def before(self, take: Callable[[Line], None]) -> Callable[[Line], None]:
        """Return what looks at each line of a child process before ``take`` gets it; figures are not passed on."""

        def look(line: Line) -> None:
            if line["type"] == "figures":
                self._figures.add(line)
                self._write()
                return
            if line["type"] == "stage":
                self.stage(line["stage"])
            elif line["type"] == "block":
                self._block(line)
            take(line)

        return look

    def ended(self, status: JobStatus | None) -> None:
        """Note how it went: the job's status after the attempt, None when the job was lost."""
        self._spans.note_end("lost" if status is None else status.value)

    def _block(self, line: Line) -> None:
        began_ns, self._mark_ns = self._mark_ns, time.time_ns()
        self._figures.add_block(line["stage"], (self._mark_ns - began_ns) / 1e9)
        self._spans.block(line["block"], line["blocks"], began_ns, self._mark_ns)
        if time.monotonic() - self._written_at >= self._room.settings.heartbeat_s:
            self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        try:
            with self._room.work() as work:
                work.attempts.note_figures(self._claim, self._figures.as_document())
        except SQLAlchemyError:
            self._log.exception("figures not written")
