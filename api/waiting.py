"""``Prefer: wait``: hold the answer until the job has changed or ended, by reading its row now and then.

The one asynchronous part of the face: a waiting request holds no thread and no connection, so hundreds may wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import anyio
from anyio import to_thread
from fastapi import Request

from api.schemas import JobView
from api.service import Service
from api.views import job_headers, job_view
from jobs.database import reading
from jobs.status import TERMINAL

_LOOK_EVERY_S = 0.25
_LOOK_LATE_S = 1.0
"""Seconds between two looks, at first and after some of them."""
_EARLY_LOOKS = 20


@dataclass(frozen=True, slots=True)
class Seen:
    """A job as it was when it was read."""

    view: JobView
    headers: dict[str, str]

    @property
    def tag(self) -> str:
        """The ETag of this state."""
        return self.headers["ETag"]

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.view.status in TERMINAL


def see(service: Service, owner: str, job_id: str) -> Seen:
    """Read the job once."""
    with reading(service.open_reader) as work:
        job = work.jobs.get(owner, job_id)
        view = job_view(job, work)
        return Seen(view, job_headers(job, view))


async def see_when(
    service: Service, owner: str, job_id: str, *, ready: Callable[[Seen], bool], seconds: float, request: Request
) -> Seen:
    """Read the job until it is ready, the time is over, the caller has gone, or the service stops."""
    deadline = anyio.current_time() + seconds
    looks = 0
    while True:
        seen = await to_thread.run_sync(see, service, owner, job_id)
        left = deadline - anyio.current_time()
        if ready(seen) or left <= 0 or service.draining.is_set() or await request.is_disconnected():
            return seen
        looks += 1
        await anyio.sleep(min(left, _LOOK_EVERY_S if looks < _EARLY_LOOKS else _LOOK_LATE_S))
