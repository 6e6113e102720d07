"""The whole of docker-compose.yml, with real containers: a job from POST to a model that opens, over PostgreSQL, Redis and S3.

    SLIMTRIM_TEST_COMPOSE=1 python -m pytest tests/end_to_end/test_compose.py

Images that are there are used as they are; build them first, or let the compose file do it. Where no registry can be
reached, ``tests/end_to_end/stand_ins.py`` makes stand-ins for those of others.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from transformers import AutoModelForCausalLM

from jobs.keys import new_key
from tests.compression.test_pipeline import GPTQ, WORDS
from tests.servers import free_ports

ROOT = Path(__file__).resolve().parents[2]
_UP_S, _JOB_S = 240.0, 300.0

if os.environ.get("SLIMTRIM_TEST_COMPOSE") != "1":
    pytest.skip("NOT RUN: containers are started only with SLIMTRIM_TEST_COMPOSE=1", allow_module_level=True)
if shutil.which("docker") is None:
    pytest.skip("NOT RUN: there is no docker (apt-get install docker.io docker-compose)", allow_module_level=True)


@dataclass
class Stack:
    """The running containers."""

    project: list[str]
    client: httpx.Client
    s3: Any
    folder: Path
    secrets: list[str]

    def compose(self, *arguments: str) -> str:
        """Run docker-compose and return what it said."""
        done = subprocess.run([*self.project, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def health(self) -> dict[str, str]:
        """Return the state of every container that is to stay up, by service."""
        names = self.compose("ps", "-q").split()
        found = dict[str, str]()
        for one in json.loads(subprocess.run(["docker", "inspect", *names], capture_output=True, check=True).stdout):
            if one["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped":
                service = one["Config"]["Labels"]["com.docker.compose.service"]
                found[service] = one["State"].get("Health", {}).get("Status", one["State"]["Status"])
        return found


@pytest.fixture(scope="module")
def stack(tiny_model_factory: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("compose")
    shutil.copytree(tiny_model_factory("qwen2_moe", dtype="bfloat16"), folder / "models" / "tiny")
    for path in (folder, *folder.rglob("*")):  # for the containers' own user
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in [folder.parent, folder.parent.parent]:
        parent.chmod(0o755)
    api, s3 = free_ports(2)
    key, entry = new_key("tests")
    given = {name: secrets.token_hex(20) for name in ("SLIMTRIM_SECRET", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_KEY")}
    given |= {
        "SLIMTRIM_API_KEYS": entry, "S3_ACCESS_KEY": f"AK{secrets.token_hex(8)}", "MODELS_FOLDER": str(folder / "models"),
        "API_ADDRESS": f"127.0.0.1:{api}", "S3_ADDRESS": f"127.0.0.1:{s3}", "S3_PUBLIC_URL": f"http://127.0.0.1:{s3}",
    }  # fmt: skip
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    project = [*compose, "--env-file", str(folder / "env"), "-p", f"slimtrim-test-{secrets.token_hex(3)}"]
    store = boto3.client(
        "s3", endpoint_url=given["S3_PUBLIC_URL"], region_name="us-east-1", aws_access_key_id=given["S3_ACCESS_KEY"],
        aws_secret_access_key=given["S3_SECRET_KEY"],
    )  # fmt: skip
    url, headers = f"http://127.0.0.1:{api}", {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
        secret = [value for name, value in given.items() if "SECRET" in name or "PASSWORD" in name]
        running = Stack(project, client, store, folder, [*secret, key])
        try:
            running.compose("up", "--detach", "--no-build")
            wait(lambda: is_ready(client), "a ready API", running)
            yield running
        finally:
            running.compose("down", "--volumes", "--timeout", "60")


def wait(condition: Any, what: str, stack: Stack) -> None:
    end = time.monotonic() + _UP_S
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.5)
    raise AssertionError(f"waited in vain for {what}\n{stack.compose('ps')}\n{stack.compose('logs', '--tail=60')}")


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def finished(stack: Stack, model: str) -> dict[str, Any]:
    """Post a job and return it when it is over."""
    body = {
        "model": model, "recipe": {"steps": [{**GPTQ, "method": "rtn"}]},
        "calibration": {"source": {"inline": [WORDS * 30]}, "samples": 8, "sequence_length": 32},
        "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 8]}, "samples": 4}},
    }  # fmt: skip
    created = stack.client.post("/v1/jobs", json=body)
    assert created.status_code == 201, created.text
    end = time.monotonic() + _JOB_S
    while time.monotonic() < end:
        job = stack.client.get(f"/v1/jobs/{created.json()['id']}", headers={"Prefer": "wait=10"}).json()
        if job["finished_at"] is not None:
            assert job["status"] == "succeeded", (job["status_reason"], stack.compose("logs", "--tail=80", "worker"))
            return job
    raise AssertionError(f"not finished: {job}\n{stack.compose('logs', '--tail=80')}")


def test_every_container_becomes_healthy(stack: Stack):
    expected = {"postgres", "redis", "s3", "api", "worker", "maintenance"}

    wait(lambda: stack.health() == dict.fromkeys(expected, "healthy"), "health", stack)


def test_a_model_on_a_volume_becomes_an_artifact_that_opens_from_presigned_links(stack: Stack, tmp_path: Path):
    job = finished(stack, "file:///models/tiny")

    manifest = stack.client.get(f"/v1/jobs/{job['id']}/artifact").json()
    for file in manifest["files"]:
        assert file["url"].startswith(str(stack.s3.meta.endpoint_url)), "links lead to the store, not through the API"
        content = httpx.get(file["url"], trust_env=False).content
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        (tmp_path / file["path"]).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_experts == 8


def test_a_model_in_a_bucket_is_worked_on_as_well(stack: Stack):
    for path in (stack.folder / "models" / "tiny").iterdir():
        stack.s3.upload_file(str(path), "models", f"tiny/{path.name}")

    assert finished(stack, "s3://models/tiny")["result"]["verified"]


def test_metrics_see_the_work_of_the_worker(stack: Stack):
    stack.client.get("/v1/queues")
    text = stack.client.get("/metrics").text

    assert "slimtrim_database_up 1.0" in text
    assert 'slimtrim_moved_bytes_total{direction="stored"}' in text


def test_our_containers_are_nobody_and_cannot_write_to_their_root(stack: Stack):
    for service in ("api", "worker", "maintenance"):
        said = stack.compose("exec", "-T", service, "sh", "-c", "id -u; touch /app/x 2>&1; true")
        assert said.split()[0] == "10001"
        assert "Read-only file system" in said


def test_the_logs_are_json_and_hold_no_secret(stack: Stack):
    said = stack.compose("logs", "--no-color", "api", "worker", "maintenance")

    lines = [line.partition("|")[2].strip() for line in said.splitlines() if "|" in line]
    assert len(lines) > 10
    assert [line for line in lines if not line.startswith("{")] == []
    assert [secret for secret in stack.secrets if secret in stack.compose("logs")] == []


def test_a_worker_that_is_stopped_ends_in_time_and_in_order(stack: Stack):
    stack.compose("stop", "worker")

    name = stack.compose("ps", "-q", "-a", "worker").split()[0]
    [state] = json.loads(subprocess.run(["docker", "inspect", name], capture_output=True, check=True).stdout)
    assert state["State"]["ExitCode"] == 0
