"""The wake-up call: tell the workers that a job may be waiting. It carries the id and nothing else.

A call may be lost or doubled without harm. The row is the truth: a worker that hears of a job still has to claim it,
and the maintenance loop repeats the call for a job that nobody claimed. So a broker that is down fails no request.
Tasks are named, not imported; this module knows no task code.
"""

# celery and kombu ship without types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

from celery import Celery
from kombu.entity import Queue
from kombu.transport import filesystem

from jobs.settings import Settings

TASK = "slimtrim.run_job"
QUEUE = "jobs"

_log = logging.getLogger(__name__)


class FolderChannel(filesystem.Channel):
    """A folder as a queue, in which a message is either whole or not there, and is taken by exactly one reader.

    kombu's own channel writes a message under its final name, so that a reader can meet it half-written and die of
    it, and takes it through the shared temporary folder. Here both are renames inside one folder.
    """

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        folder = Path(self.data_folder_out)
        # Zero-padded nanoseconds since the epoch: names sort by age, also across a reboot.
        place = folder / f"{time.time_ns():020d}_{uuid.uuid4()}.{queue}.msg"
        unfinished = place.with_name(f".{place.name}")
        unfinished.write_text(json.dumps(payload), encoding="utf-8")
        unfinished.rename(place)

    def _get(self, queue: str) -> Any:
        folder = Path(self.data_folder_in)
        for name in sorted(os.listdir(folder)):
            if name.partition(".")[2] != f"{queue}.msg":
                continue
            taken = folder / f".{name}.taken"
            try:
                (folder / name).rename(taken)
            except FileNotFoundError:  # another worker was faster
                continue
            message = taken.read_text(encoding="utf-8")
            taken.unlink()
            return json.loads(message)
        raise Empty


class FolderTransport(filesystem.Transport):
    """kombu's filesystem transport over ``FolderChannel``."""

    Channel = FolderChannel


class Announcer:
    """Wakes workers. Safe to use from many threads."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings)

    def announce(self, job_id: str) -> None:
        """Send the wake-up call, once and without waiting; a failure is logged and the job waits for the next call."""
        try:
            self._app.send_task(TASK, args=[job_id], queue=QUEUE, ignore_result=True)
        except Exception:  # whatever a broker raises must not fail a request whose row is committed
            _log.exception("announcement failed", extra={"job": job_id})

    def pending(self) -> int | None:
        """Return how many calls wait to be heard, or None when the broker does not answer."""
        try:
            with self._app.connection_for_read() as connection:
                return connection.default_channel.queue_declare(queue=QUEUE, passive=True).message_count
        except Exception:  # as above
            _log.exception("the queue does not answer")
            return None

    def close(self) -> None:
        """Give the connections back."""
        self._app.close()


def make_celery(settings: Settings) -> Any:
    """Return a Celery application on the settings' broker, with what sender and receiver must agree on."""
    folder = settings.queue_folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    app: Any = Celery("slimtrim", set_as_current=False)
    app.conf.update(
        broker_url=settings.broker_url or "filesystem://",
        broker_transport="jobs.queue:FolderTransport",
        broker_transport_options={
            "data_folder_in": str(folder),
            "data_folder_out": str(folder),
            "control_folder": str(folder / "control"),
            # Seconds between two looks into the folder; half of it is the mean delay of a wake-up call.
            "polling_interval": settings.queue_poll_s,
        },
        # The nameless exchange routes by queue name: no binding files that two starting processes could race for.
        task_queues=[Queue(QUEUE, exchange="", routing_key=QUEUE, durable=True)],
        task_default_queue=QUEUE,
        task_create_missing_queues=False,  # a mistyped queue must fail, not strand jobs
        task_serializer="json",
        accept_content=["json"],  # pickle in a broker is remote code execution
        task_ignore_result=True,  # the row is the record; a result backend would be a second place to be wrong
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0, "interval_max": 0},  # keeps a POST fast
        broker_connection_timeout=2,
    )
    return app


def forget_announcements(settings: Settings) -> None:
    """Empty the queue's folder at start-up; every job in it is in the database too and is announced again."""
    if settings.queue_folder.is_dir():
        for path in settings.queue_folder.iterdir():
            if path.is_file():
                path.unlink(missing_ok=True)
