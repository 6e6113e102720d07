"""The embedded service: one command starts everything, keeps it running, and leaves nothing behind."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.keys import new_key
from tests.worker.stand import Stand, a_stand, has_ended


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Stand]:
    with a_stand(tmp_path, PORT=free_port(), DRAIN_GRACE_S=2) as stand:
        yield stand


def get(stand: Stand, path: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{stand.settings.port}{path}", timeout=10) as answer:
        return json.loads(answer.read())


def members(supervisor: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """The processes of the service by the module they run, once each is what it will be."""
    found = dict[str, psutil.Process]()
    for process in psutil.Process(supervisor.pid).children():
        with suppress(psutil.Error):
            command = process.cmdline()
            if "jobs.tether" not in command and "-m" in command:
                found[command[command.index("-m") + 1]] = process
    return found


def ready(stand: Stand) -> subprocess.Popen[bytes]:
    """Start the service and wait until it says that it is ready and all of it is there."""
    supervisor = stand.start("jobs.serve")
    stand.wait(lambda: "slimtrim is ready at http://127.0.0.1" in stand.logs(), "the ready line")
    stand.wait(lambda: set(members(supervisor)) == {"api", "worker", "worker.maintenance"}, "all members")
    return supervisor


def gone(stand: Stand, processes: list[psutil.Process]) -> bool:
    stand.wait(lambda: all(has_ended(process) for process in processes), "their end")
    return True


def test_everything_starts_and_a_signal_ends_everything(house: Stand):
    supervisor = ready(house)
    family = psutil.Process(supervisor.pid).children(recursive=True)

    assert get(house, "/livez")
    supervisor.send_signal(signal.SIGTERM)

    assert supervisor.wait(60) == 0
    assert gone(house, family)


def test_a_running_job_is_given_back_when_the_service_stops(house: Stand):
    supervisor = ready(house)
    # The model is no checkpoint, so the library would refuse it; what counts is who holds the job at the end.
    claimed = house.post(announce=False)
    house.wait(lambda: house.job(claimed).fence, "the worker's claim")

    supervisor.send_signal(signal.SIGINT)

    assert supervisor.wait(60) == 0
    assert house.job(claimed).status in ("queued", "failed")
    assert house.job(claimed).worker is None


@pytest.mark.parametrize("module", ["api", "worker", "worker.maintenance"])
def test_a_member_that_dies_is_started_again(house: Stand, module: str):
    supervisor = ready(house)
    first = members(supervisor)[module]

    first.kill()
    house.wait(lambda: (again := members(supervisor).get(module)) and again.pid != first.pid, "a new one")

    assert supervisor.poll() is None


def test_nothing_outlives_a_supervisor_that_is_killed(house: Stand):
    supervisor = ready(house)
    family = psutil.Process(supervisor.pid).children(recursive=True)
    assert len(family) >= 3
    house.relatives += family

    supervisor.kill()

    assert gone(house, family)


def test_two_services_cannot_run_on_one_folder(house: Stand):
    supervisor = ready(house)

    house.environment["SLIMTRIM_PORT"] = str(free_port())
    second = house.start("jobs.serve")

    assert second.wait(60) == 2
    assert "another service already runs on" in house.logs()
    assert supervisor.poll() is None


def test_a_restart_finds_its_jobs_and_clears_old_messages(house: Stand):
    house.announcer.announce("job_of_yesterday", "gpu.cpu")
    house.environment["SLIMTRIM_WORKERS"] = "0"
    job_id = house.post()

    supervisor = house.start("jobs.serve")
    house.wait(lambda: "slimtrim is ready" in house.logs(), "the ready line")
    house.wait(lambda: house.unheard() > 0, "the job announced again")
    # Nobody listens, so it may have been repeated by now; of the old message nothing is left.
    messages = [json.loads(path.read_text()) for path in house.settings.queue_folder.glob("[!.]*.msg")]
    assert {json.loads(base64.b64decode(message["body"]))[0][0] for message in messages} == {job_id}

    assert house.job(job_id).status == "queued"
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(60) == 0


def test_a_port_in_use_is_named(house: Stand):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", house.settings.port))
        taken.listen()
        assert house.start("jobs.serve").wait(60) == 2

    assert f"127.0.0.1:{house.settings.port} is in use" in house.logs()
    assert "SLIMTRIM_PORT" in house.logs()


def test_another_address_needs_keys(house: Stand):
    house.environment["SLIMTRIM_HOST"] = "0.0.0.0"

    assert house.start("jobs.serve").wait(60) == 2

    assert "SLIMTRIM_API_KEYS" in house.logs()
    assert "ready" not in house.logs()


@pytest.mark.parametrize("module", ["api", "worker", "worker.maintenance"])
def test_every_command_refuses_a_file_of_rows_that_other_machines_could_not_see(house: Stand, module: str):
    house.environment["SLIMTRIM_BROKER_URL"] = "redis://127.0.0.1:1/0"

    assert house.start(module).wait(60) == 2

    assert "set SLIMTRIM_DATABASE_URL to a PostgreSQL database" in house.logs()
    assert "Traceback" not in house.logs()


@pytest.mark.parametrize("module", ["api", "jobs.serve", "worker", "worker.maintenance"])
def test_every_command_refuses_an_address_of_an_unknown_kind(house: Stand, module: str):
    house.environment["SLIMTRIM_BROKER_URL"] = "amqp://127.0.0.1:1/0"

    assert house.start(module).wait(60) == 2

    assert "SLIMTRIM_BROKER_URL must start with filesystem://" in house.logs()
    assert "Traceback" not in house.logs()


def test_a_key_opens_another_address(house: Stand):
    # 127.0.0.2 is loopback as well; what is tested is that keys travel through the environment to the members.
    key, entry = new_key("ann")
    house.environment["SLIMTRIM_API_KEYS"] = entry
    house.environment["PYTHONUNBUFFERED"] = "1"
    ready(house)
    url = f"http://127.0.0.1:{house.settings.port}/v1/jobs"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    with pytest.raises(urllib.request.HTTPError, match="401"):
        opener.open(url, timeout=10)
    with opener.open(urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"}), timeout=10) as answer:
        assert json.loads(answer.read())["data"] == []
    assert key not in house.logs()
    assert os.environ.get("SLIMTRIM_API_KEYS") is None
