"""An attempt as spans: one for it, one below it per stage, one below that per block. Told by the worker, not by the child.

The process that opens other people's files gets no address of a collector; its events carry all that a span needs.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from opentelemetry.trace import Span

from jobs import traces
from jobs.attempts import Claim


class AttemptSpans:
    """The spans of one attempt, below the request that made the job."""

    def __init__(self, claim: Claim, worker: str) -> None:
        own = {"slimtrim.job_id": claim.job_id, "slimtrim.attempt": claim.attempt, "slimtrim.fence": claim.fence}
        asked = {} if claim.request_id is None else {"slimtrim.request_id": claim.request_id}
        self._attributes = {**own, **asked, "slimtrim.worker": worker}
        self._parent = claim.trace_parent
        self._open = ExitStack()
        self._attempt: Span | None = None
        self._stage: Span | None = None

    def begin(self) -> None:
        """Begin the attempt's span."""
        self._attempt = self._open.enter_context(traces.spanning("attempt", self._parent, self._attributes))

    def stage(self, stage: str, at_ns: int) -> None:
        """End the stage before, and begin this one."""
        assert self._attempt is not None
        self._end_stage(at_ns)
        self._stage = traces.start_span(self._attempt, f"stage {stage}", at_ns, {**self._attributes, "slimtrim.stage": stage})

    def block(self, block: int, blocks: int, began_ns: int, ended_ns: int) -> None:
        """Record a block that is finished."""
        assert self._attempt is not None
        attributes = {**self._attributes, "slimtrim.block": block, "slimtrim.blocks": blocks}
        traces.note_span(self._stage or self._attempt, "block", began_ns, ended_ns, attributes)

    def note_end(self, status: str) -> None:
        """Say on the attempt's span how the job stands after it."""
        assert self._attempt is not None
        self._attempt.set_attribute("slimtrim.status", status)
        if status in ("failed", "lost"):
            traces.fail_span(self._attempt, status)

    def end(self) -> None:
        """End whatever is open."""
        self._end_stage(time.time_ns())
        self._open.close()

    def _end_stage(self, at_ns: int) -> None:
        if self._stage is not None:
            self._stage.end(at_ns)
            self._stage = None
