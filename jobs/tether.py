"""A process that must not outlive its parent.

On Linux the kernel kills it the moment the *thread* that started it ends (``PR_SET_PDEATHSIG``), so start it from a
thread that waits for it. A parent that died before the request was made is noticed by its changed process id.
Elsewhere nothing is done here; the job's child process also ends when its standard input does.

``python -m jobs.tether PARENT_PID COMMAND ...`` ties itself and becomes the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; end it now if the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def tethered(command: Sequence[str]) -> list[str]:
    """Return the command line that runs the command tied to this process."""
    return [sys.executable, "-m", "jobs.tether", str(os.getpid()), *command]


def with_our_modules(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which our packages are found from any folder; relative paths in it stay as they are."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    return {**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path))}


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
