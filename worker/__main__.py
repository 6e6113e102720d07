"""``python -m worker``: one worker process, on one GPU or on none. It works on one job at a time until SIGTERM.

It takes jobs of the memory classes that its device fits: a GPU's own class and smaller ones, without a GPU only what
needs none. ``--classes`` or ``SLIMTRIM_WORKER_CLASSES`` say otherwise. With ``--alone``, as the embedded service starts
it, a worker without a GPU takes every job: slowly is better than never.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from compression.errors import SlimtrimError
from compression.planner.sizes import MEMORY_CLASSES
from jobs.alive import alive_file, keep_touched
from jobs.logs import configure_logs
from jobs.one_machine import refuse_divided_parts
from jobs.settings import Settings, load_settings
from jobs.traces import tracing
from worker.app import make_app, run_worker
from worker.child import COMPRESS
from worker.devices import CPU, VISIBLE, Device, dearest_first, fitting_classes, take_device, visible_devices
from worker.presence import Presence
from worker.room import Room


def main(arguments: Sequence[str]) -> int:
    """Run one worker and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker", description="Work on jobs until SIGTERM.")
    parser.add_argument("--name", default=_own_name(), help="unique among the workers of one database")
    parser.add_argument("--classes", metavar="CLASS,...", help="memory classes of the jobs to take")
    parser.add_argument("--alone", action="store_true", help="without a GPU take jobs of every class")
    parser.add_argument("--run", default=COMPRESS, metavar="MODULE:FUNCTION", help="what a job runs, in a process of its own")
    options = parser.parse_args(arguments)
    with ExitStack() as held:
        try:
            settings = load_settings(**({} if options.classes is None else {"worker_classes": options.classes}))
            refuse_divided_parts(settings)
            device = take_device(visible_devices(), options.name, held)
            room = Room(settings, options.name, options.run, _classes(settings, device, alone=options.alone))
        except SlimtrimError as refusal:
            sys.stderr.write(f"the worker does not start: {refusal}\n")
            return 2
        if device is not None:
            os.environ[VISIBLE] = device.uuid  # the job's process sees this GPU and no other
        configure_logs(service="worker", worker=room.name)
        keep_touched(alive_file(room.settings, "worker"))
        with tracing("worker"), Presence(room, CPU if device is None else f"{device.name} {device.uuid}"):
            return run_worker(make_app(room), room)


def _classes(settings: Settings, device: Device | None, *, alone: bool) -> tuple[str, ...]:
    if settings.worker_classes:
        return dearest_first(settings.worker_classes)
    return dearest_first(tuple(MEMORY_CLASSES)) if device is None and alone else fitting_classes(device)


def _own_name() -> str:
    # The random part tells a worker from the one that had its process id before.
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
