"""The embedded service: ``python -m jobs.serve`` starts API, maintenance and workers, and keeps them running.

One service per data folder. A process that dies is started again, later each time it dies young. Ctrl-C or SIGTERM
lets all of them finish what they hold; a second one does not wait. Nothing outlives this process (``tether.py``).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from compression.errors import SlimtrimError
from jobs.database import make_engine, migrate
from jobs.errors import DataFolderBusy, SettingsRefused
from jobs.key_rows import require_keys
from jobs.logs import configure_logs
from jobs.one_machine import refuse_divided_parts
from jobs.queue import forget_announcements
from jobs.settings import Settings, load_settings
from jobs.tether import tethered, with_our_modules

REFUSED = 2
"""Exit code when the settings do not allow a start."""
_TICK_S = 0.1
_GROWN_UP_S = 30.0
"""Seconds after which a process no longer counts as having died young."""
_LONGEST_WAIT_S = 30.0

_log = logging.getLogger("serve")


def main() -> int:
    """Serve until told to stop; return the exit code."""
    try:
        settings = load_settings()
        refuse_divided_parts(settings)
        configure_logs(service="serve")
        with locked_data_folder(settings):
            _check_address(settings)
            migrate(settings)
            _check_keys(settings)
            forget_announcements(settings)
            Supervisor(settings).run()
    except (SlimtrimError, SettingsRefused) as refusal:
        sys.stderr.write(f"slimtrim does not start: {refusal}\n")
        return REFUSED
    return 0


@contextmanager
def locked_data_folder(settings: Settings) -> Generator[None]:
    """Hold the data folder for this process, or raise ``DataFolderBusy``."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (settings.data_dir / "serve.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise DataFolderBusy(f"another service already runs on {settings.data_dir.resolve()}") from held
        yield


@dataclass(slots=True)
class _Member:
    """One process of the service, and when to start it again."""

    name: str
    module: str
    arguments: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    young_deaths: int = 0

    def start(self) -> None:
        command = tethered([sys.executable, "-m", self.module, *self.arguments])
        # A session of its own: Ctrl-C in a terminal reaches the supervisor alone, which then drains in order.
        environment = with_our_modules(os.environ)
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self.started_at = time.monotonic()

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """Starts the members, restarts what dies, and ends them all."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._hurry = threading.Event()
        # Nobody else is there to take what a machine without an accelerator would rather leave.
        workers = [_Member(f"worker-{number}", "worker", ["--alone"]) for number in range(1, settings.workers + 1)]
        self._members = [_Member("api", "api"), _Member("maintenance", "worker.maintenance"), *workers]

    def run(self) -> None:
        """Keep the members running until a signal comes, then let them finish."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._announce_readiness, daemon=True).start()
        try:
            while not self._stop.wait(_TICK_S):
                for member in self._members:
                    self._tend(member)
        finally:
            self._drain()

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _tend(self, member: _Member) -> None:
        if member.is_alive:
            return
        if member.process is not None:
            self._plan_restart(member, member.process)
        if time.monotonic() >= member.start_at:
            member.start()

    def _plan_restart(self, member: _Member, dead: subprocess.Popen[bytes]) -> None:
        young = time.monotonic() - member.started_at < _GROWN_UP_S
        member.young_deaths = member.young_deaths + 1 if young else 1
        wait_s = min(_LONGEST_WAIT_S, 0.5 * 2 ** (member.young_deaths - 1))
        _log.warning("process ended", extra={"member": member.name, "exit": dead.returncode, "restart_in_s": wait_s})
        member.process, member.start_at = None, time.monotonic() + wait_s

    def _drain(self) -> None:
        _log.info("stopping")
        for member in self._members:
            member.signal(signal.SIGTERM)
        # A worker needs its grace, and a moment to write down that it gave the job back.
        end = time.monotonic() + self._settings.drain_grace_s + 10.0
        while any(member.is_alive for member in self._members) and time.monotonic() < end and not self._hurry.is_set():
            time.sleep(_TICK_S)
        for member in self._members:
            member.signal(signal.SIGKILL)
            if member.process is not None:
                member.process.wait()
        _log.info("stopped")

    def _announce_readiness(self) -> None:
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        address = f"http://{host}:{self._settings.port}"
        while not self._stop.wait(_TICK_S):
            if _answers(f"{address}/livez"):
                _log.info("ready", extra={"address": address})
                sys.stdout.write(f"slimtrim is ready at {address}\n")
                sys.stdout.flush()
                return


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2.0) as answer:
            return answer.status == 200
    except OSError:
        return False


def _check_keys(settings: Settings) -> None:
    engine = make_engine(settings)
    try:
        require_keys(settings, engine)
    finally:
        engine.dispose()


def _check_address(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as refusal:
            why = "is in use by another program" if refusal.errno == errno.EADDRINUSE else f"cannot be used: {refusal.strerror}"
            raise SettingsRefused(f"{settings.host}:{settings.port} {why}; set SLIMTRIM_PORT to a free port") from refusal


if __name__ == "__main__":
    raise SystemExit(main())
