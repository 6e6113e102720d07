"""The Celery application of a worker, with every setting that matters and its reason.

Celery is the wake-up channel and the process around it, nothing more: what ran, how often, and with what outcome is
the database's business. The names of queue and task, and what sender and receiver must agree on, are in ``jobs.queue``.
"""

from __future__ import annotations

import warnings
from typing import Any

from celery import signals
from celery.exceptions import SecurityWarning

from jobs.queue import make_celery
from worker.room import Room
from worker.tasks import register_run_job


def make_app(room: Room) -> Any:
    """Return the application that works in the room."""
    app = make_celery(room.settings)
    app.conf.update(
        # Threads, one of them: the main thread goes on listening while the job runs in a process of its own. Forking
        # pools and CUDA exclude each other; the solo pool loses the job on a soft shutdown.
        worker_pool="threads",
        worker_concurrency=1,
        # Together: reserve one message at a time, so that no second job waits behind a busy worker.
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        # A message that was worked on is done with, whatever came of it; the row remembers, the broker repeats nothing.
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=False,
        # A broker that goes away for a moment must not cost hours of computing.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # A broker that is away at the start, or for days, is waited for.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # Nobody commands a worker through the broker: cancelling goes through the row.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        # Logs are ours, JSON lines with the job's fields.
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    register_run_job(app, room)
    return app


def run_worker(app: Any, room: Room) -> int:
    """Work until SIGTERM; then let go of the present job and return the exit code."""

    def let_go(**_: Any) -> None:
        room.drain()

    # Celery warns of root because pickled messages would be root's code; ours are JSON only.
    warnings.simplefilter("ignore", SecurityWarning)
    signals.worker_shutting_down.connect(let_go)
    signals.setup_logging.connect(_keep_our_logging)
    worker = app.Worker(
        hostname=room.name,
        pool="threads",
        concurrency=1,
        # In this order: on Redis the first that has a message is heard.
        queues=list(room.classes),
        # Chatter between workers that nothing here listens to.
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    return worker.exitcode or 0


def _keep_our_logging(**_: Any) -> None:
    """Having a receiver is what tells Celery to leave logging alone."""
