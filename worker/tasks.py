"""The one task: ``run_job(job_id)``. Claim the row, make an attempt, and leave the rest to the row.

A message that comes twice, late, or for a job that is over finds nothing to claim and is dropped. Retries are the
database's business, never the broker's: this task never fails.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from jobs.attempts import Claim
from jobs.logs import Fields, bound_fields
from jobs.queue import TASK
from worker.attempt import Attempt
from worker.leash import Leash
from worker.room import Room

_log = logging.getLogger("worker")


def register_run_job(app: Any, room: Room) -> None:
    """Give the Celery application its task."""

    @app.task(name=TASK)
    def run_job(job_id: str) -> None:  # pyright: ignore[reportUnusedFunction]
        work_on(room, job_id)


def work_on(room: Room, job_id: str) -> None:
    """Make one attempt at the job, if it can be claimed."""
    log = Fields(_log, {"job": job_id, "worker": room.name})
    if room.is_draining:
        # Celery hands out messages for up to two seconds after it was told to stop.
        log.info("not claimed: the worker is stopping; passed on")
        with room.work() as work:
            work.outbox.append(job_id)
        return
    asked_at = time.monotonic()
    with room.work() as work:
        claim = work.attempts.claim(job_id, room.name, room.settings.lease_s, room.classes)
    if claim is None:
        log.info("nothing to claim; message dropped")
        return
    _attempt(room, claim, Leash(asked_at + room.settings.lease_s))


def _attempt(room: Room, claim: Claim, leash: Leash) -> None:
    fields = {"job": claim.job_id, "attempt": claim.attempt, "fence": claim.fence, "worker": room.name}
    if claim.request_id is not None:
        fields["request_id"] = claim.request_id
    log = Fields(_log, fields)
    # Bound as well, for the lines of others that know nothing of a job.
    with bound_fields(**fields):
        log.info("claimed")
        room.attach(leash)
        room.job_id = claim.job_id
        try:
            status = Attempt(room, claim, leash, log).run()
        finally:
            room.job_id = None
        log.info("attempt over", extra={"status": status, "interrupted": leash.reason})
