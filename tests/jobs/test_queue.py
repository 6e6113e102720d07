"""The wake-up call: only an id, whole or not at all, to one listener, and never at the caller's cost."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

from api.schemas import Limits
from compression.planner.sizes import MEMORY_CLASSES
from jobs.queue import TASK, VISIBILITY_S, Announcer, forget_announcements, make_celery
from jobs.settings import Settings

CPU = "gpu.cpu"
NOTHING = dict.fromkeys(MEMORY_CLASSES, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.fixture(params=["folder", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "folder":
        return Settings(data_dir=tmp_path)
    return Settings(data_dir=tmp_path, broker_url=request.getfixturevalue("redis_server").fresh_url())


@pytest.fixture
def announcer(settings: Settings) -> Iterator[Announcer]:
    announcer = Announcer(settings)
    yield announcer
    announcer.close()


@pytest.fixture
def channel(settings: Settings) -> Iterator[Any]:
    with make_celery(settings).connection_for_read() as connection:
        yield connection.default_channel


def job_ids(channel: Any, memory_class: str = CPU) -> list[str]:
    """Take every message and return the ids they carry."""
    found = list[str]()
    while True:
        try:
            message = channel._get(memory_class)
        except Empty:
            return found
        args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
        assert message["headers"]["task"] == TASK
        assert (len(args), kwargs) == (1, {})
        found += args


def test_calls_are_heard_in_order_and_each_once(announcer: Announcer, channel: Any):
    sent = [f"job_{number}" for number in range(20)]

    for job_id in sent:
        announcer.announce(job_id, CPU)

    assert announcer.pending() == {**NOTHING, CPU: 20}
    assert job_ids(channel) == sent
    assert announcer.pending() == NOTHING
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
        threading.Thread(target=lambda part=part: [announcer.announce(job_id, CPU) for job_id in sent[part::4]])
        for part in range(4)
    ]
    for thread in listeners + senders:
        thread.start()
    for thread in senders:
        thread.join()
    while announcer.pending() != NOTHING:
        pass
    stop.set()
    for thread in listeners:
        thread.join()

    assert sorted(heard) == sorted(sent)


def test_every_class_has_its_own_queue(announcer: Announcer, channel: Any):
    for memory_class in MEMORY_CLASSES:
        announcer.announce(f"job_{memory_class}", memory_class)

    assert announcer.pending() == dict.fromkeys(MEMORY_CLASSES, 1)
    assert [job_ids(channel, name) for name in MEMORY_CLASSES] == [[f"job_{name}"] for name in MEMORY_CLASSES]


def test_a_queue_that_nobody_listens_to_takes_nothing(settings: Settings, announcer: Announcer, caplog: pytest.LogCaptureFixture):
    announcer.announce("job_1", "gpu.17g")

    assert announcer.pending() == NOTHING
    assert "announcement failed" in caplog.text


def test_nothing_runs_longer_than_redis_waits_for_its_end():
    assert max(part.le for part in Limits.model_fields["max_runtime_s"].metadata if hasattr(part, "le")) < VISIBILITY_S


def test_a_message_that_is_being_written_is_not_there_yet(folder: Settings, monkeypatch: pytest.MonkeyPatch):
    announcer, channel = Announcer(folder), make_celery(folder).connection_for_read().default_channel
    heard_meanwhile = list[str]()
    write = Path.write_text

    def write_in_two_halves(path: Path, text: str, **how: Any) -> int:
        write(path, text[:10], **how)
        heard_meanwhile.extend(job_ids(channel))
        return write(path, text, **how)

    monkeypatch.setattr(Path, "write_text", write_in_two_halves)
    announcer.announce("job_1", CPU)

    assert heard_meanwhile == []
    assert job_ids(channel) == ["job_1"]


def test_a_broker_that_fails_costs_the_caller_nothing(folder: Settings, caplog: pytest.LogCaptureFixture):
    settings, announcer = folder, Announcer(folder)
    announcer.announce("job_1", CPU)
    shutil.rmtree(settings.queue_folder)
    settings.queue_folder.write_text("a file where the folder was")

    announcer.announce("job_2", CPU)

    (record,) = [record for record in caplog.records if record.name == "jobs.queue"]
    assert (record.getMessage(), vars(record)["job"]) == ("announcement failed", "job_2")
    assert announcer.pending() is None


@pytest.mark.parametrize("redis", ["refuses", "never answers"])
def test_a_redis_that_fails_is_asked_once_by_all_callers_and_shows_no_password(
    redis: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if redis == "never answers":
            silent.listen(64)
        url = f"redis://:canary-of-redis@127.0.0.1:{silent.getsockname()[1]}/0"
        announcer = Announcer(Settings(data_dir=tmp_path, broker_url=url))
        for number in range(20):
            announcer.announce(f"job_{number}", CPU)
        announcer.close()

    said = [record.getMessage().partition(":")[0] for record in caplog.records if record.name == "jobs.queue"]
    assert said == ["announcement failed", *["not announced"] * 19]
    assert "canary" not in caplog.text


def test_start_up_forgets_old_calls_and_nothing_else(folder: Settings):
    settings, announcer = folder, Announcer(folder)
    announcer.announce("job_old", CPU)
    (settings.queue_folder / ".123.gpu.cpu.msg.taken").write_text("left by a killed worker")
    (settings.queue_folder / "control").mkdir()

    forget_announcements(settings)

    assert announcer.pending() == NOTHING
    assert [path.name for path in settings.queue_folder.iterdir()] == ["control"]
    assert settings.queue_folder.stat().st_mode & 0o777 == 0o700


def test_announcing_loads_no_worker_code():
    program = (
        "import jobs.queue, jobs.database, sys; sys.exit(any(name.split('.')[0] in ('worker', 'torch') for name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ), check=False).returncode == 0
