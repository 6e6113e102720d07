"""``python -m worker``: one worker process. It works on one job at a time until SIGTERM."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from collections.abc import Sequence

from compression.errors import SlimtrimError
from jobs.alive import alive_file, keep_touched
from jobs.logs import configure_logs
from jobs.settings import load_settings
from jobs.traces import tracing
from worker.app import make_app, run_worker
from worker.child import COMPRESS
from worker.room import Room


def main(arguments: Sequence[str]) -> int:
    """Run one worker and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker", description="Work on jobs until SIGTERM.")
    parser.add_argument("--name", default=_own_name(), help="unique among the workers of one database")
    parser.add_argument("--run", default=COMPRESS, metavar="MODULE:FUNCTION", help="what a job runs, in a process of its own")
    options = parser.parse_args(arguments)
    try:
        room = Room(load_settings(), options.name, options.run)
    except SlimtrimError as refusal:
        sys.stderr.write(f"the worker does not start: {refusal}\n")
        return 2
    configure_logs(service="worker", worker=room.name)
    keep_touched(alive_file(room.settings, "worker"))
    with tracing("worker"):
        return run_worker(make_app(room), room)


def _own_name() -> str:
    # The random part tells a worker from the one that had its process id before.
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
