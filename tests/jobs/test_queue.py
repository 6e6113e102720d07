"""The wake-up call: only an id, whole or not at all, to one listener, and never at the caller's cost."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

from jobs.queue import QUEUE, TASK, Announcer, forget_announcements, make_celery
from jobs.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.fixture
def announcer(settings: Settings) -> Iterator[Announcer]:
    announcer = Announcer(settings)
    yield announcer
    announcer.close()


@pytest.fixture
def channel(settings: Settings) -> Iterator[Any]:
    with make_celery(settings).connection_for_read() as connection:
        yield connection.default_channel


def job_ids(channel: Any) -> list[str]:
    """Take every message and return the ids they carry."""
    found = list[str]()
    while True:
        try:
            message = channel._get(QUEUE)
        except Empty:
            return found
        args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
        assert message["headers"]["task"] == TASK
        assert (len(args), kwargs) == (1, {})
        found += args


def test_calls_are_heard_in_order_and_each_once(announcer: Announcer, channel: Any):
    sent = [f"job_{number}" for number in range(20)]

    for job_id in sent:
        announcer.announce(job_id)

    assert announcer.pending() == 20
    assert job_ids(channel) == sent
    assert announcer.pending() == 0
    assert job_ids(channel) == []


def test_many_senders_and_listeners_lose_and_double_nothing(settings: Settings, announcer: Announcer):
    heard, stop = list[str](), threading.Event()
    sent = [f"job_{number}" for number in range(200)]

    def listen() -> None:
        with make_celery(settings).connection_for_read() as connection:
            while not stop.is_set():
                heard.extend(job_ids(connection.default_channel))

    listeners = [threading.Thread(target=listen) for _ in range(3)]
    senders = [
        threading.Thread(target=lambda part=part: [announcer.announce(job_id) for job_id in sent[part::4]]) for part in range(4)
    ]
    for thread in listeners + senders:
        thread.start()
    for thread in senders:
        thread.join()
    while announcer.pending():
        pass
    stop.set()
    for thread in listeners:
        thread.join()

    assert sorted(heard) == sorted(sent)


def test_a_message_that_is_being_written_is_not_there_yet(announcer: Announcer, channel: Any, monkeypatch: pytest.MonkeyPatch):
    heard_meanwhile = list[str]()
    write = Path.write_text

    def write_in_two_halves(path: Path, text: str, **how: Any) -> int:
        write(path, text[:10], **how)
        heard_meanwhile.extend(job_ids(channel))
        return write(path, text, **how)

    monkeypatch.setattr(Path, "write_text", write_in_two_halves)
    announcer.announce("job_1")

    assert heard_meanwhile == []
    assert job_ids(channel) == ["job_1"]


def test_a_broker_that_fails_costs_the_caller_nothing(settings: Settings, announcer: Announcer, caplog: pytest.LogCaptureFixture):
    announcer.announce("job_1")
    for path in settings.queue_folder.glob("*.msg"):
        path.unlink()
    settings.queue_folder.rmdir()
    settings.queue_folder.write_text("a file where the folder was")

    announcer.announce("job_2")

    (record,) = [record for record in caplog.records if record.name == "jobs.queue"]
    assert (record.getMessage(), vars(record)["job"]) == ("announcement failed", "job_2")
    assert announcer.pending() is None


def test_start_up_forgets_old_calls_and_nothing_else(settings: Settings, announcer: Announcer):
    announcer.announce("job_old")
    (settings.queue_folder / ".123.jobs.msg.taken").write_text("left by a killed worker")
    (settings.queue_folder / "control").mkdir()

    forget_announcements(settings)

    assert announcer.pending() == 0
    assert [path.name for path in settings.queue_folder.iterdir()] == ["control"]
    assert settings.queue_folder.stat().st_mode & 0o777 == 0o700


def test_announcing_loads_no_worker_code():
    program = (
        "import jobs.queue, jobs.database, sys; sys.exit(any(name.split('.')[0] in ('worker', 'torch') for name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ), check=False).returncode == 0
