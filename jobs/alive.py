"""A file that a living process touches, for whoever supervises it without speaking HTTP.

``python -m jobs.alive worker`` (or ``maintenance``) succeeds when the one on this host touched its file lately. A worker's
file is touched by a thread, the maintenance loop's by each round. A lease that is not renewed is another matter: the
rows tell that (``slimtrim_workers``).
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.settings import Settings, load_settings

_EVERY_S = 5.0
_SILENT_S = 60.0


def alive_file(settings: Settings, kind: str) -> Path:
    """Return the file of this host's worker or maintenance."""
    return settings.data_dir / "alive" / f"{kind}-{socket.gethostname()}"


def touch(file: Path) -> None:
    """Say that this process lives; a full disk is no reason to die."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch()
    except OSError:
        return


def keep_touched(file: Path) -> None:
    """Touch the file every few seconds for as long as the interpreter runs."""

    def run() -> None:
        while True:
            touch(file)
            time.sleep(_EVERY_S)

    threading.Thread(target=run, name="alive", daemon=True).start()


def is_alive(file: Path) -> bool:
    """Say whether the file was touched lately."""
    try:
        return time.time() - file.stat().st_mtime < _SILENT_S
    except OSError:
        return False


def main(arguments: Sequence[str]) -> int:
    """Return 0 when the named process lives, 1 when it is silent."""
    if arguments not in (["worker"], ["maintenance"]):
        sys.stderr.write("usage: python -m jobs.alive worker|maintenance\n")
        return 2
    return 0 if is_alive(alive_file(load_settings(), arguments[0])) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
