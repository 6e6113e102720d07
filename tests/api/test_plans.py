"""Plans through HTTP: what a job would do, and not a trace of having asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import compression.checkpoint.headers
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.planner.inventory import take_inventory
from compression.planner.known import remember
from compression.planner.levers import levers_of
from compression.planner.prior import usual_prices
from compression.request import Compression
from tests.api.checkpoints import EXPERTS, HIDDEN, TOP_K, WIDTH, tensor_bytes, write_sharded
from tests.api.conftest import Face

PLAN_FIELDS = {
    "feasible", "profile", "bytes_before", "bytes_after", "smallest_possible_bytes", "target_bytes", "memory_class", "steps",
    "components", "memory", "blocks", "frontier", "provisional", "warnings", "predicted_loss", "trials",
}  # fmt: skip
"""The contract's Plan, word for word, and what is said beyond it: what a plan costs, and what plans were tried."""
COMPONENTS = {"experts", "attention", "router", "shared_experts", "dense", "embeddings", "other", "kv_cache", "overhead"}
BLOCK_FIELDS = {"index", "action", "experts_kept", "expert_scheme", "attention_scheme", "bytes"}


def plan(face: Face, **members: Any) -> dict[str, Any]:
    answer = face.client.post("/v1/plans", json=face.body(**members))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_plan_has_every_field_of_the_contract(face: Face):
    planned = plan(face)

    assert set(planned) == PLAN_FIELDS
    assert set(planned["components"]) == COMPONENTS
    assert set(planned["memory"]) == {"packed_engine", "transformers"}
    assert all(set(block) == BLOCK_FIELDS for block in planned["blocks"])


def test_a_plan_counts_the_bytes_that_are_there_and_that_would_be(face: Face):
    planned = plan(face, recipe={"steps": [{"step": "expert_drop", "experts_kept": 4}]})
    one_expert = 3 * HIDDEN * WIDTH * 2
    one_router_row = HIDDEN * 2

    assert planned["bytes_before"] == tensor_bytes()
    assert planned["bytes_after"] == tensor_bytes() - 4 * (EXPERTS - 4) * (one_expert + one_router_row)
    assert sum(planned["components"].values()) == planned["bytes_after"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("20GB", 20 * 10**9),
        ("20GiB", 20 * 2**30),
        ("4.35GB", 4_350_000_000),
        (" 7 mib ", 7 * 2**20),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_a_size_means_exactly_what_it_says(face: Face, written: str, meant: int):
    assert plan(face, target_memory=written)["target_bytes"] == plan(face, target_memory=meant)["target_bytes"] == meant


def test_a_plan_writes_nothing(face: Face, tmp_path: Path):
    def everything() -> dict[str, float]:
        return {
            str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and "sqlite" not in path.name
        }

    face.client.get("/v1/jobs")
    before, rows = everything(), face.rows()

    plan(face)

    assert (everything(), face.rows(), face.announced) == (before, rows, [])


def test_a_plan_reads_no_weight(face: Face, monkeypatch: pytest.MonkeyPatch):
    """The headers of this model are a few kilobytes; its weights are thousands."""
    read = compression.checkpoint.headers.FolderFiles.read
    lengths: list[int] = []

    def counted(self: Any, name: str, start: int, length: int) -> bytes:
        lengths.append(length)
        return read(self, name, start, length)

    monkeypatch.setattr(compression.checkpoint.headers.FolderFiles, "read", counted)
    plan(face)

    assert lengths
    assert sum(lengths) < tensor_bytes() / 100


def test_the_job_shows_the_plan_that_was_made_from_the_same_body(face: Face):
    members = {"recipe": {"steps": [{"step": "block_drop", "blocks_dropped": 1}, {"step": "quantize"}]}, "target_memory": "2MB"}

    assert face.post_job(**members)["plan"] == plan(face, **members)


def test_a_sharded_model_plans_like_a_whole_one(face: Face):
    sharded = write_sharded(face.roots / "sharded")

    assert plan(face, model=f"file://{sharded}") == plan(face)


def test_a_model_may_be_reached_through_a_link_inside_the_roots(face: Face):
    os.symlink(face.roots / "mixtral", face.roots / "alias")

    assert plan(face, model=f"file://{face.roots}/alias") == plan(face)


def test_the_cache_and_the_overhead_count_against_the_target(face: Face):
    plain = plan(face)
    serving = {"context_tokens": 1000, "overhead": 12345}
    served = plan(face, serving=serving)
    cache = 2 * 4 * HIDDEN * 2 * 1000
    problem = face.client.post("/v1/plans", json=face.body(serving=serving, target_memory=plain["bytes_after"])).json()

    assert (served["components"]["kv_cache"], served["components"]["overhead"]) == (cache, 12345)
    assert served["bytes_after"] == plain["bytes_after"] + cache + 12345
    assert (problem["code"], problem["bytes_after"]) == ("recipe_exceeds_target", served["bytes_after"])


def test_the_smallest_possible_target_is_really_possible(face: Face):
    smallest = plan(face)["smallest_possible_bytes"]
    steps = [
        {"step": "block_drop", "blocks_dropped": 3},
        {"step": "expert_drop", "experts_kept": TOP_K},
        {"step": "quantize", "group_size": -1, "attention": "W4A16"},
    ]

    assert plan(face, recipe={"steps": steps}, target_memory=smallest)["bytes_after"] == smallest


def study(face: Face, body: dict[str, Any]) -> None:
    """Leave behind what a worker does when it has priced the model."""
    checkpoint = read_checkpoint(FolderFiles(Path(body["model"].removeprefix("file://"))))
    inventory = take_inventory(checkpoint)
    prices = usual_prices(inventory, levers_of(inventory)).model_copy(update={"measured": True})
    remember(face.service.settings.studies_folder, Compression.model_validate(body), checkpoint, prices)


def test_recipe_auto_is_planned_from_usual_prices_until_a_study_has_measured_some(face: Face):
    target = tensor_bytes() // 2
    body = face.body(target_memory=target)
    del body["recipe"]
    usual = face.client.post("/v1/plans", json=body).json()

    study(face, body)
    known = face.client.post("/v1/plans", json=body).json()

    assert (usual["provisional"], known["provisional"]) == (True, False)
    assert max(usual["bytes_after"], known["bytes_after"]) <= target
    assert len(known["frontier"]) >= 12
    assert [point["bytes"] for point in known["frontier"]] == sorted(point["bytes"] for point in known["frontier"])


def test_prices_of_another_text_are_not_taken_for_known(face: Face):
    body = face.body(target_memory=tensor_bytes() // 2)
    del body["recipe"]
    study(face, body)

    other = face.client.post("/v1/plans", json={**body, "calibration": {"samples": 7}}).json()

    assert other["provisional"]
