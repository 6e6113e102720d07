"""Strangers' requests: every answer is one that the document promises, and no file of theirs makes the service fail."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.errors import CODES, PROBLEM_JSON
from tests.faults.face import a_face
from tests.faults.fuzz_checkpoints import AUTO, RECIPES
from tests.faults.fuzz_contract import World, fuzz
from tests.faults.hostile import draw, write

CASES = int(os.environ.get("FUZZ_CASES", "200"))
PLANS = 50


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, World, Path]]:
    folder = tmp_path_factory.mktemp("strangers")
    with a_face(folder) as (client, world):
        yield client, world, folder


def test_generated_requests_get_answers_that_the_document_promises(there: tuple[TestClient, World, Path]):
    """Thousands are sent by hand: ``python -m tests.faults.fuzz_contract``, or with FUZZ_CASES in the environment."""
    client, world, _ = there

    answers = fuzz(client, world, CASES, 7)

    assert answers.faults == {}
    assert answers.cases > CASES // 2
    assert {200, 404, 422} <= set(answers.statuses)


def test_an_answer_that_the_document_does_not_promise_is_noticed(there: tuple[TestClient, World, Path]):
    client, world, _ = there

    class Poorer:
        """The same client, whose document promises no 404."""

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def get(self, path: str) -> Any:
            answer = client.get(path)
            document = answer.json()
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("404", None)
            answer.json = lambda: document
            return answer

    assert fuzz(Poorer(), world, 100, 7).faults  # type: ignore[arg-type]


def test_a_plan_of_a_hostile_model_is_a_plan_or_a_problem(there: tuple[TestClient, World, Path]):
    client, _, folder = there
    statuses: Counter[int] = Counter()

    for number in range(9001, 9001 + PLANS):
        random = Random(number)
        kind, draft = draw(random)
        write(draft, folder / "models" / "hostile")
        body = {"model": f"file://{folder}/models/hostile", **random.choice((*RECIPES, *AUTO))}
        answer = client.post("/v1/plans", json=body)
        statuses[answer.status_code] += 1
        assert answer.status_code in (200, 422), f"case {number} ({kind}): {answer.text[:300]}"
        if answer.status_code != 200:
            assert answer.headers["content-type"] == PROBLEM_JSON
            assert CODES[answer.json()["code"]].status == 422

    assert statuses[422] > PLANS // 2


SPELLINGS = (
    "../../db.sqlite3", "..%2f..%2fdb.sqlite3", "%2e%2e/%2e%2e/db.sqlite3", "%252e%252e%252fdb.sqlite3",
    "/etc/passwd", "%2fetc%2fpasswd",
    "..\\..\\db.sqlite3", "..%5c..%5cdb.sqlite3", "config.json%00", "config.json%00.png", "a//b.safetensors",
    "a%2fb.safetensors/", "CONFIG.JSON", "manifest.json", "%c0%ae%c0%ae/config.json", "\u202econfig.json", "",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, str]]:
    """A service that nobody else asks, and where the files of a finished job are."""
    with a_face(tmp_path_factory.mktemp("files")) as (client, world):
        yield client, f"/v1/jobs/{world.values['job_id'][0]}/artifact/files"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_a_path_leads_out_of_an_artifact(files: tuple[TestClient, str], spelling: str):
    client, url = files
    assert client.get(f"{url}/config.json").content == b"{}"  # there is something to find

    answer = client.get(f"{url}/{spelling}")

    assert answer.status_code == 404, answer.text[:300]
    assert answer.headers["content-type"] == PROBLEM_JSON


@pytest.mark.parametrize("spelling", ["./config.json", "a/../config.json"])
def test_a_path_that_clients_shorten_before_they_send_it_is_the_short_one(files: tuple[TestClient, str], spelling: str):
    client, url = files

    assert client.get(f"{url}/{spelling}").content == b"{}"


MODELS = (
    "..", ".", "a/..", "../a", "a/../b", "a/b/../c", "a/b@main", "a@b/c", "a%2fb", "a%2e%2e/b", "%2e%2e/b",
    "a/b?x=1", "a/b#c", "a/b/c",
    "/etc", "//etc/passwd", "http://hub/a/b", "hub:a/b", "a\\b", "a/b\0", "a/b\n", " a/b", "a /b", "\u0430/b",
    "a/b..", "a/..b", "-a/b",
    "s3://", "s3://a/../b", "file://", "file:///", "file://host/x", "file:///..", "FILE:///etc", "file:/etc/passwd",
    "file:///etc/passwd",
    "file:///etc", "file:///proc/self/environ", "file:///etc/../etc", "file:///%2e%2e/etc", "file:///etc\0", "~", "file://~/x",
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_no_spelling_of_a_model_leads_out_of_what_may_be_read(there: tuple[TestClient, World, Path], model: str):
    client, _, _ = there

    answer = client.post("/v1/plans", json={"model": model, "recipe": {"steps": [{"step": "quantize"}]}})

    assert answer.status_code == 422, answer.text[:300]
    assert answer.json()["code"] in ("validation_failed", "source_not_allowed", "not_available", "model_not_found")
    assert "root:" not in answer.text


@pytest.mark.parametrize("way", ["..", "../models/../..", "%2e%2e", "x/../../..", "\\..\\..", "./././../.."])
def test_no_way_leads_from_a_root_out_of_it(there: tuple[TestClient, World, Path], way: str):
    client, _, folder = there

    answer = client.post(
        "/v1/plans", json={"model": f"file://{folder}/models/{way}", "recipe": {"steps": [{"step": "quantize"}]}}
    )

    assert answer.status_code == 422
    assert answer.json()["code"] in ("source_not_allowed", "model_not_found")
