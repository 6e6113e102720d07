"""What is supported, as the service tells it; and what is not built yet, by name."""

from __future__ import annotations

from compression.architectures import ARCHITECTURES
from compression.planner.availability import STEP_FACTS
from compression.recipe import STEPS
from tests.api.conftest import Face


def test_every_step_of_the_contract_is_listed_with_its_settings(face: Face):
    steps = {step["name"]: step for step in face.client.get("/v1/steps").json()["data"]}

    assert set(steps) == set(STEPS)
    for name, step in steps.items():
        assert step["schema"] == STEPS[name].model_json_schema()
        assert step["paper"]
        assert step["evidence"]
        assert step["explanation"] == STEP_FACTS[name].explanation


def test_a_step_that_is_listed_as_available_is_accepted_and_another_is_refused(face: Face):
    smallest = {
        "prune": {"sparsity": 0.5}, "expert_drop": {"experts_kept": 4}, "expert_merge": {"experts_kept": 4},
        "layer_drop": {"layers_dropped": 1}, "block_drop": {"blocks_dropped": 1}, "recover": {"method": "lora"},
    }  # fmt: skip
    for step in face.client.get("/v1/steps").json()["data"]:
        body = face.body(recipe={"steps": [{"step": step["name"], **smallest.get(step["name"], {})}]}, profile="custom")
        answer = face.client.post("/v1/plans", json=body)

        assert (answer.status_code == 200) == step["available"], step["name"]
        assert answer.status_code == 200 or answer.json()["code"] == "not_available"


def test_a_value_that_is_listed_as_missing_is_refused(face: Face):
    for step in face.client.get("/v1/steps").json()["data"]:
        for setting, values in step["not_available"].items() if step["available"] else ():
            for value in values:
                given = {"step": step["name"], **({"experts_kept": 4} if step["name"] == "expert_drop" else {}), setting: value}
                given |= {"blocks_dropped": 1} if step["name"] == "block_drop" else {}
                problem = face.client.post("/v1/plans", json=face.body(recipe={"steps": [given]})).json()

                assert problem["code"] == "not_available", given
                assert problem["errors"][0]["pointer"] == f"/recipe/steps/0/{setting}"


def test_the_architectures_are_those_of_the_table(face: Face):
    listed = face.client.get("/v1/architectures").json()["data"]

    assert [row["model_type"] for row in listed] == list(ARCHITECTURES)
    assert {row["model_type"] for row in listed if not row["quantize"]} == {
        "gpt_oss", "kimi_linear", "bailing_hybrid", "qwen3_vl_moe",
        "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa",
    }  # fmt: skip
    assert {row["model_type"]: row["refuses"] for row in listed} == {name: row.refuses for name, row in ARCHITECTURES.items()}
