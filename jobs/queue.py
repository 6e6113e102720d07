"""The wake-up call: tell the workers that a job may be waiting. It carries the id and nothing else.

A call may be lost or doubled without harm. The row is the truth: a worker that hears of a job still has to claim it,
and the maintenance loop repeats the call for a job that nobody claimed. So a broker that is down fails no request.
There is a queue for every memory class, named as the class; a worker listens to those whose jobs it takes. The broker
is a folder or Redis. Tasks are named, not imported; this module knows no task code.
"""

# celery and kombu ship without types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
import ssl
import time
from typing import Any

from celery import Celery
from kombu.entity import Queue

from compression.planner.sizes import MEMORY_CLASSES
from jobs.settings import Settings

TASK = "slimtrim.run_job"
QUIET_S = 5.0
"""Seconds for which nothing is announced after the broker did not take a call; the maintenance loop repeats what was missed."""
VISIBILITY_S = 31 * 86_400
"""Seconds after which Redis hands an unacknowledged message to another worker: more than the longest ``max_runtime_s``."""
_SENDING_S = 0.8
"""Seconds that a step of sending may take; a call that meets a hanging Redis makes two of them at most."""
_LISTENING_S = 30.0
_SENDERS = 64
"""Connections for sending at once, more than an API process has threads: none of them waits for another's timeout."""

_log = logging.getLogger(__name__)


class Announcer:
    """Wakes workers. Safe to use from many threads."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings)
        self._app.conf.update(broker_pool_limit=_SENDERS, broker_connection_timeout=_SENDING_S)
        if _is_redis(settings):
            # Whoever announces holds up a caller; whoever listens has time.
            patience = {"socket_timeout": _SENDING_S, "socket_connect_timeout": _SENDING_S, "retry_on_timeout": False}
            self._app.conf.broker_transport_options = {**self._app.conf.broker_transport_options, **patience}
        self._quiet_until = 0.0

    def announce(self, job_id: str, memory_class: str) -> None:
        """Send the wake-up call; a failure is logged and the job waits for the next call.

        A broker that hangs costs each caller its timeout; so after a failure nobody tries for a moment.
        """
        if time.monotonic() < self._quiet_until:
            _log.warning("not announced: the broker did not answer a moment ago", extra={"job": job_id})
            return
        try:
            self._app.send_task(TASK, args=[job_id], queue=memory_class, ignore_result=True)
        except Exception:  # whatever a broker raises must not fail a request whose row is committed
            self._quiet_until = time.monotonic() + QUIET_S
            _log.exception("announcement failed", extra={"job": job_id})

    def pending(self) -> dict[str, int] | None:
        """Return how many calls wait to be heard in every class's queue, or None when the broker does not answer."""
        try:
            with self._app.connection_for_read() as connection:
                channel = connection.default_channel
                return {name: channel.queue_declare(queue=name).message_count for name in MEMORY_CLASSES}
        except Exception:  # as above
            _log.exception("the queue does not answer")
            return None

    def close(self) -> None:
        """Give the connections back."""
        self._app.close()


def make_celery(settings: Settings) -> Any:
    """Return a Celery application on the settings' broker, with what sender and receiver must agree on."""
    app: Any = Celery("slimtrim", set_as_current=False)
    app.conf.update(
        **(_redis(settings) if _is_redis(settings) else _folder(settings)),
        # The nameless exchange routes by queue name: no bindings that two starting processes could race for.
        task_queues=[Queue(name, exchange="", routing_key=name, durable=True) for name in MEMORY_CLASSES],
        task_default_queue=next(iter(MEMORY_CLASSES)),
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


def _is_redis(settings: Settings) -> bool:
    return (settings.broker_url or "").startswith(("redis://", "rediss://"))


def _redis(settings: Settings) -> dict[str, Any]:
    assert settings.broker_url is not None
    options = {
        "visibility_timeout": VISIBILITY_S,
        # Several programs may share a Redis; these keys are ours.
        "global_keyprefix": "slimtrim:",
        # A worker hears its own class first and smaller ones only while that is silent: the order is that of its queues.
        "queue_order_strategy": "priority",
        # A connection that is half open must not leave a worker deaf.
        "socket_connect_timeout": 2.0,
        "socket_timeout": _LISTENING_S,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "retry_on_timeout": True,
    }
    return {
        "broker_url": settings.broker_url,
        "broker_transport": "jobs.transports:RedisTransport",
        # Left alone, kombu takes any certificate for a rediss:// address.
        "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED} if settings.broker_url.startswith("rediss:") else None,
        "broker_transport_options": options,
        "visibility_timeout": VISIBILITY_S,  # Celery reads it here too; the shorter one would count
    }


def _folder(settings: Settings) -> dict[str, Any]:
    folder = settings.queue_folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = {
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "control_folder": str(folder / "control"),
        # Seconds between two looks into the folder; half of it is the mean delay of a wake-up call.
        "polling_interval": settings.queue_poll_s,
    }
    return {
        "broker_url": settings.broker_url or "filesystem://",
        "broker_transport": "jobs.transports:FolderTransport",
        "broker_transport_options": options,
    }
