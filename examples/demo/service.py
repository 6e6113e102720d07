"""The embedded service for as long as the demo needs it; it ends with the demo, however the demo ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx

from examples.demo.errors import DemoFailed

_SERVE = (sys.executable, "-m", "jobs.serve")
_START_S = 60.0


class Service:
    """``python -m jobs.serve`` on a free loopback port, with its data and its models below one folder."""

    def __init__(self, folder: Path, command: tuple[str, ...] = _SERVE, *, stop_s: float = 15.0) -> None:
        """``stop_s``: what the service is given to end in order before it is killed."""
        self._folder = folder.resolve()
        self._command = command
        self._stop_s = stop_s
        self._log = self._folder / "service.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Service:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which first cancels its job and then ends the service.
            self._process = subprocess.Popen(
                self._command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _environment(self) -> dict[str, str]:
        """Return ours without the settings of any other service, which would not be the demo's."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIMTRIM_")}
        return {
            **inherited,
            "SLIMTRIM_HOST": "127.0.0.1",
            "SLIMTRIM_PORT": str(self.port),
            "SLIMTRIM_DATA_DIR": str(self._folder / "data"),
            "SLIMTRIM_MODEL_ROOTS": str(self._folder),
            "SLIMTRIM_DRAIN_GRACE_S": "2",
        }

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + _START_S
        with httpx.Client(base_url=self.url, trust_env=False, timeout=2.0) as client:
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    raise DemoFailed(f"the service ended with exit status {self._process.returncode}:\n{self._last_lines()}")
                try:
                    if client.get("/readyz").status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                time.sleep(0.1)
        raise DemoFailed(f"the service was not ready after {_START_S:.0f} s:\n{self._last_lines()}")

    def _stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                try:
                    self._process.wait(self._stop_s)
                except subprocess.TimeoutExpired:
                    continue

    def _last_lines(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
