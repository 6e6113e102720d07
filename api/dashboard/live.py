"""What moves on a page, as server-sent events: ready-made pieces of the page, sent again whenever their job has changed.

One stream serves all jobs of a page, because a browser opens only a few connections to one host. Each look asks for the
visitor's key anew, so that a revoked key ends the stream, and reads the version of each job first; nothing else is read until
one has changed. A stream that was cut begins again with the present state, so it needs no place to go on from.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import anyio
from anyio import to_thread
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response, StreamingResponse

from api.errors import Problem
from api.service import Service
from api.streams import EVENT_STREAM, RETRY_MS
from jobs.errors import JobNotFound

LOOK_EVERY_S = 1.0
_QUIET_LOOKS = 15
"""Looks without news after which a line is sent that says nothing, so that a client that has gone is noticed."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What a look found: the pieces of the jobs that have changed, and whether nothing will change any more."""

    versions: dict[str, int]
    pieces: dict[str, dict[str, str]]
    """Job -> name of the piece -> its text."""
    is_over: bool


Look = Callable[[dict[str, int]], Glance | None]
"""Takes the versions seen before; None when the visitor may not look any more."""


def stream(service: Service, look: Look) -> Response:
    """Return the answer that goes on looking until all is over, the visitor leaves, or the service stops."""
    service.streams.check_room()
    return StreamingResponse(_lines(service, look), media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})


async def _lines(service: Service, look: Look) -> AsyncGenerator[bytes]:
    seen: dict[str, int] = {}
    quiet = 0
    with service.streams.counted():
        yield f"retry: {RETRY_MS}\n\n".encode()
        while not service.streams.is_ending:
            try:
                glance = await to_thread.run_sync(look, seen)
            except (SQLAlchemyError, JobNotFound, Problem):  # the browser comes back, and is told then what is the matter
                return
            if glance is None:
                return
            seen, quiet = glance.versions, 0 if glance.pieces else quiet + 1
            for job_id, pieces in glance.pieces.items():
                yield f"event: pieces\ndata: {json.dumps({'job': job_id, 'pieces': pieces})}\n\n".encode()
            if glance.is_over:
                yield b"event: end\ndata: {}\n\n"
                return
            if quiet % _QUIET_LOOKS == _QUIET_LOOKS - 1:
                yield b": \n\n"
            await anyio.sleep(LOOK_EVERY_S)
