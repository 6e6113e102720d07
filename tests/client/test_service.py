"""Both clients and the command at a real service: real rows, queue, worker process and store; only the library is a stand-in."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from slimtrim_client import AsyncClient, Client, Job, Refused, require_success
from slimtrim_client.cli import main
from slimtrim_client.documents import (
    LAST_EVENTS,
    Event,
    JobList,
    Manifest,
    ManifestFile,
    Plan,
    Progress,
    Result,
)
from tests.client.conftest import House


@pytest.fixture
def client(house: House):
    with Client(house.url) as client:
        yield client


@pytest.fixture(scope="module")
def done(house: House) -> Job:
    """A job that has succeeded, for tests that only read."""
    with Client(house.url) as client:
        return client.wait(client.submit(house.body())["id"])


def test_a_job_from_submit_to_files_by_python(house: House, client: Client, tmp_path: Path):
    planned = client.plan(house.body())
    job = client.submit(house.body(), idempotency_key="first")
    again = client.submit(house.body(), idempotency_key="first")

    events = list(client.watch(job["id"]))
    over = client.wait(job["id"])
    require_success(over)
    got = client.download(job["id"], tmp_path / "artifact")

    manifest = client.manifest(job["id"])
    assert planned["feasible"]
    assert again["id"] == job["id"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["type"] == "job.created"
    assert events[-1]["type"] == "job.succeeded"
    assert list(client.watch(job["id"], after=3)) == events[3:]
    assert list(client.watch(job["id"], after=len(events))) == []
    assert [(file.path.name, file.sha256) for file in got.files] == [(file["path"], file["sha256"]) for file in manifest["files"]]
    assert (tmp_path / "artifact/block-1.bin").read_bytes() == b"\1" * 1000
    assert len(client.report(job["id"])["blocks"]) == 4


def test_a_part_is_gone_on_with_at_the_real_store(client: Client, done: Job, tmp_path: Path):
    file = next(file for file in client.manifest(done["id"])["files"] if file["path"] == "block-2.bin")
    (tmp_path / "block-2.bin.part").write_bytes(b"\2" * 400)
    (tmp_path / "block-2.bin.part.json").write_text(json.dumps({"sha256": file["sha256"], "etag": f'"{file["sha256"]}"'}))
    told: list[int] = []

    client.download(done["id"], tmp_path, on_progress=lambda path, done, size: path == "block-2.bin" and told.append(done))

    assert told[:2] == [0, 0]
    assert told[2] == 400
    assert (tmp_path / "block-2.bin").read_bytes() == b"\2" * 1000


def test_a_job_is_cancelled_deleted_and_tried_again(client: Client, house: House):
    job = client.submit(house.body(blocks=1000, block_s=0.05))
    followed = client.follow(job["id"])
    assert next(state for state in followed if state["progress"]["block"])["status"] == "running"

    client.cancel(job["id"])
    over = client.wait(job["id"])
    second = client.retry(job["id"])
    client.cancel(second["id"])
    client.wait(second["id"])
    client.delete(job["id"])

    assert over["status"] == "cancelled"
    assert second["retry_of"] == job["id"]
    with pytest.raises(Refused, match="not_found"):
        client.job(job["id"])


def test_the_verbs_of_the_command_at_a_real_service(house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "job.json").write_text(json.dumps(house.body()))

    def run(*arguments: str) -> Any:
        code = main(["--server", house.url, "--json", *arguments])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    code, [job] = run("submit", str(tmp_path / "job.json"), "--wait", "--label", "from=command")
    watched = run("watch", job["id"])
    low = run("watch", job["id"], "--min-retention", "0.5")
    downloaded = run("download", job["id"], str(tmp_path / "artifact"))
    listed = run("list", "--label", "from=command")
    broken = run(
        "submit", str(tmp_path / "job.json"), "--wait", "--set", 'calibration.source.inline=["{\\"ending\\": \\"permanent\\"}"]'
    )
    late = run("cancel", job["id"])

    assert (code, job["status"]) == (0, "succeeded")
    assert watched[0] == 0
    assert watched[1][-2]["type"] == "job.succeeded"
    assert watched[1][-1]["id"] == job["id"]
    assert low[0] == 5  # the stand-in measures nothing
    assert downloaded[0] == 0
    assert downloaded[1][0]["bytes"] == 4002
    assert [each["id"] for each in listed[1][0]["data"]] == [job["id"]]
    assert (broken[0], broken[1][0]["status_reason"]["code"]) == (1, "broken_checkpoint")
    assert late[1][0]["status"] == "succeeded"


def test_both_clients_give_the_same_at_the_same_service(client: Client, house: House, done: Job, tmp_path: Path):
    job_id = done["id"]

    async def by_async() -> list[Any]:
        async with AsyncClient(house.url) as other:
            files = await other.download(job_id, tmp_path / "async")
            return [
                await other.plan(house.body()), await other.job(job_id), await other.wait(job_id), await other.report(job_id),
                [event async for event in other.watch(job_id)], [state async for state in other.follow(job_id)],
                await other.list(limit=1, status=["succeeded"]), await other.cancel(job_id),
                [(file.path.name, file.sha256, file.fetched) for file in files.files], await refusals(other),
            ]  # fmt: skip

    async def refusals(other: AsyncClient) -> list[str]:
        with pytest.raises(Refused) as no_page:
            await other.report_page("job_x")
        with pytest.raises(Refused) as no_job:
            await other.retry("job_x")
        with pytest.raises(Refused) as nothing:
            await other.delete("job_x")
        return [str(each.value) for each in (no_page, no_job, nothing)]

    def sync_refusals() -> list[str]:
        with pytest.raises(Refused) as no_page:
            client.report_page("job_x")
        with pytest.raises(Refused) as no_job:
            client.retry("job_x")
        with pytest.raises(Refused) as nothing:
            client.delete("job_x")
        return [str(each.value) for each in (no_page, no_job, nothing)]

    files = client.download(job_id, tmp_path / "sync")
    by_sync = [
        client.plan(house.body()), client.job(job_id), client.wait(job_id), client.report(job_id),
        list(client.watch(job_id)), list(client.follow(job_id)),
        client.list(limit=1, status=["succeeded"]), client.cancel(job_id),
        [(file.path.name, file.sha256, file.fetched) for file in files.files], sync_refusals(),
    ]  # fmt: skip

    assert asyncio.run(by_async()) == by_sync


def test_both_clients_have_the_same_methods_with_the_same_arguments():
    def arguments(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if not name.startswith("_")}

    assert arguments(Client) == arguments(AsyncClient)
    assert {"plan", "submit", "watch", "report", "download", "cancel", "list"} <= arguments(Client).keys()


def test_the_types_name_the_fields_that_the_service_has(client: Client, house: House, done: Job):
    kinds = {
        Job: done, Progress: done["progress"], Result: done["result"], Plan: client.plan(house.body()),
        Event: next(iter(client.watch(done["id"]))), Manifest: client.manifest(done["id"]),
        ManifestFile: client.manifest(done["id"])["files"][0], JobList: client.list(limit=1),
    }  # fmt: skip

    # A service may send more; what the types promise has to be there.
    assert {kind.__name__: set(kind.__annotations__) - set(told or ()) for kind, told in kinds.items()} == {
        kind.__name__: set() for kind in kinds
    }
    assert f"job.{done['status']}" in LAST_EVENTS
