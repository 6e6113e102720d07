"""A file says whether a process without an HTTP face lives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from jobs.alive import alive_file, is_alive, touch
from jobs.settings import Settings


def test_a_process_lives_while_its_file_is_young(tmp_path: Path):
    file = alive_file(Settings(data_dir=tmp_path), "worker")
    assert not is_alive(file)

    touch(file)
    assert is_alive(file)

    long_ago = time.time() - 3600
    os.utime(file, (long_ago, long_ago))
    assert not is_alive(file)


def test_the_check_is_a_command(tmp_path: Path):
    environment = {**os.environ, "SLIMTRIM_DATA_DIR": str(tmp_path)}

    def check(*arguments: str) -> int:
        return subprocess.run([sys.executable, "-m", "jobs.alive", *arguments], env=environment, capture_output=True).returncode

    touch(alive_file(Settings(data_dir=tmp_path), "maintenance"))

    assert (check("maintenance"), check("worker"), check("api")) == (0, 1, 2)
