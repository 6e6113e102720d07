"""One job, from POST to a downloaded model that the stock loader opens and generates with; every part real."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.service import Service
from tests.compression.test_pipeline import GPTQ, WORDS

TRIMS = [{"step": "expert_drop", "criterion": "reap", "experts_kept": 4}, {"step": "block_drop", "blocks_dropped": 1}]


@pytest.fixture(scope="module")
def house(tiny_model_factory, tmp_path_factory) -> Iterator[tuple[httpx.Client, Path]]:
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(tiny_model_factory("qwen2_moe", dtype="bfloat16"), folder / "model")
    (folder / "calibration.txt").write_text(WORDS * 30)
    with Service(folder) as service, httpx.Client(base_url=service.url, trust_env=False, timeout=120) as client:
        yield client, folder


def body(folder: Path, steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "model": (folder / "model").as_uri(),
        "recipe": {"steps": steps},
        "calibration": {"source": (folder / "calibration.txt").as_uri(), "samples": 8, "sequence_length": 32},
        "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 8]}, "samples": 4}},
        **more,
    }


def finished(client: httpx.Client, job_id: str, timeout_s: float = 900.0) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        job = client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=10"}).json()
        if job["finished_at"] is not None:
            return job
    raise AssertionError(f"not finished after {timeout_s} s: {job}")


def test_a_posted_job_becomes_a_smaller_model_that_opens_and_generates(house, tmp_path):
    client, folder = house
    request = body(folder, [*TRIMS, {**GPTQ, "attention": "W8A16"}], target_memory="1MB")

    plan = client.post("/v1/plans", json=request).json()
    created = client.post("/v1/jobs", json=request)
    assert created.status_code == 201, created.text
    job = finished(client, created.json()["id"])

    assert job["status"] == "succeeded", job["status_reason"]
    assert job["progress"]["fraction"] == 1.0
    assert job["result"]["bytes_after"] == plan["bytes_after"] <= 10**6
    manifest = client.get(f"/v1/jobs/{job['id']}/artifact").json()
    for file in manifest["files"]:
        content = client.get(file["url"], follow_redirects=True).content
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        (tmp_path / file["path"]).write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = AutoTokenizer.from_pretrained(tmp_path)("the router", return_tensors="pt")
    assert model.config.num_experts == 4
    assert model.config.num_hidden_layers == 3
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 5
    assert torch.isfinite(model(**prompt).logits).all()


def test_a_job_that_names_only_a_target_follows_the_plan_it_settled_and_the_next_plan_is_known_before(house):
    client, folder = house
    request = body(folder, [], target_memory="1MB")
    del request["recipe"]
    provisional = client.post("/v1/plans", json=request).json()

    job = finished(client, client.post("/v1/jobs", json=request).json()["id"])

    assert job["status"] == "succeeded", job["status_reason"]
    events = client.get(f"/v1/jobs/{job['id']}/events?limit=100").json()["data"]
    planned = [event for event in events if event["type"] == "job.planned"]
    assert [event["data"]["steps"] for event in planned] == [job["plan"]["steps"]]
    assert job["result"]["bytes_after"] == job["plan"]["bytes_after"] <= 10**6
    assert [trial["steps"] for trial in job["plan"]["trials"] if trial["chosen"]] == [job["plan"]["steps"]]
    known = client.post("/v1/plans", json=request).json()
    assert (provisional["provisional"], job["plan"]["provisional"], known["provisional"]) == (True, False, False)
    assert known["frontier"] == job["plan"]["frontier"]


def test_the_report_served_is_the_report_in_the_artifact_and_what_its_run_alone_knows(house):
    client, folder = house
    job = finished(client, client.post("/v1/jobs", json=body(folder, [{**GPTQ, "method": "rtn"}])).json()["id"])

    served = client.get(f"/v1/jobs/{job['id']}/report").json()
    stored = client.get(f"/v1/jobs/{job['id']}/artifact/files/report.json", follow_redirects=True).json()

    assert {name: served.pop(name) for name in ("seconds", "speed", "peak_memory_bytes", "resumed")}.keys().isdisjoint(stored)
    assert served["verification"].pop("mode") == "whole"
    assert served == stored
    assert served["quality"]["retention"] == job["result"]["retention"]
    assert {row["method_used"] for row in served["ledger"]} == {"rtn"}


def test_a_violated_constraint_fails_the_job_and_publishes_nothing(house):
    client, folder = house
    # Dropping half of the experts costs this random model 8 % of its likelihood; other recipes happen to gain.
    text = {"source": {"inline": [WORDS * 20]}, "samples": 8, "sequence_length": 32}
    request = body(folder, TRIMS[:1], calibration=text, constraints={"min_retention": 0.99})
    job = finished(client, client.post("/v1/jobs", json=request).json()["id"])

    assert job["status"] == "failed"
    assert job["status_reason"]["code"] == "constraint_violated"
    assert client.get(f"/v1/jobs/{job['id']}/artifact").json()["code"] == "artifact_not_ready"


def test_evaluation_text_that_is_calibration_text_fails_the_job_by_name(house):
    client, folder = house
    same = {"perplexity": {"source": (folder / "calibration.txt").as_uri(), "samples": 4}}
    answer = client.post("/v1/jobs", json=body(folder, [GPTQ], evaluation=same))
    job = finished(client, answer.json()["id"])

    assert job["status"] == "failed"
    assert "evaluation" in job["status_reason"]["message"]
