from __future__ import annotations

import re
from typing import Any, get_args, get_origin

import pytest

from compression.errors import NotAvailable
from compression.planner.availability import STEP_FACTS, available_steps, check_request, missing_in
from compression.recipe import STEPS
from tests.compression.made_checkpoints import request

BUILT: list[dict[str, Any]] = [
    {"step": "quantize", "method": "rtn", "scheme": "W8A16", "attention": "W4A16", "shared_experts": "W8A16", "dense": "keep"},
    {"step": "quantize", "method": "gptq", "scheme": "W4A16"},
    {"step": "quantize", "method": "awq", "scheme": "W3A16", "attention": "FP8_DYNAMIC", "dense": "W2A16"},
    {"step": "prune", "method": "magnitude", "sparsity": 0.5},
    {"step": "prune", "method": "wanda", "pattern": "2:4"},
    {"step": "prune", "method": "sparsegpt", "pattern": "3:7", "shared_experts": True},
    {"step": "expert_drop", "criterion": "routing_score", "experts_kept": 4},
    {"step": "expert_drop", "criterion": "frequency", "experts_kept": 4},
    {"step": "expert_drop", "criterion": "reap", "fraction_dropped": 0.5},
    *(
        {"step": "expert_drop", "experts_kept": 4, "criterion": criterion}
        for criterion in ("expert_norm", "man", "msan", "hope", "aimer", "reconstruction", "random")
    ),
    {"step": "expert_drop", "experts_kept": 4, "scope": "global"},
    {"step": "expert_merge", "experts_kept": 4},
    {"step": "layer_drop", "layers_dropped": 1},
    {"step": "block_drop", "blocks_dropped": 1, "selection": "discrete"},
    {"step": "block_drop", "blocks_dropped": 1, "selection": "consecutive"},
    {"step": "expert_skip"},
    {"step": "analyze"},
]
NOT_BUILT: list[tuple[dict[str, Any], str, str]] = [
    ({"step": "recover", "method": "lora"}, "/step", "recover"),
    ({"step": "recover", "method": "router_distill"}, "/step", "recover"),
]


@pytest.mark.parametrize("step", BUILT, ids=str)
def test_what_is_built_passes(step: dict[str, Any]):
    assert list(missing_in(request(step))) == []


@pytest.mark.parametrize(("step", "place", "word"), NOT_BUILT, ids=str)
def test_a_step_or_setting_that_is_not_built_is_refused_by_name(step: dict[str, Any], place: str, word: str):
    with pytest.raises(NotAvailable) as refusal:
        check_request(request({"step": "quantize"}, step))

    assert refusal.value.pointer == f"/recipe/steps/1{place}"
    assert word in refusal.value.message
    assert "available" in refusal.value.message


def test_a_message_says_what_to_use_instead():
    messages = [next(missing_in(request(step))).message for step, _, _ in NOT_BUILT]

    assert set(messages) == {"step recover is not available yet; leave the step out and compare the report's retention"}


def test_everything_missing_is_listed_at_once():
    found = list(
        missing_in(request({"step": "recover", "method": "full"}, {"step": "analyze"}, {"step": "recover", "method": "lora"}))
    )

    assert [missing.pointer for missing in found] == ["/recipe/steps/0/step", "/recipe/steps/2/step"]


def test_every_step_of_the_contract_is_listed_with_schema_paper_and_evidence():
    listed = {step["name"]: step for step in available_steps()}

    assert set(listed) == set(STEPS) == set(STEP_FACTS)
    assert {name for name, step in listed.items() if not step["available"]} == {"recover"}
    for name, step in listed.items():
        assert step["schema"]["properties"]["step"]["const"] == name
        assert step["summary"].endswith(".")
        assert step["evidence"].endswith(".")
        assert step["explanation"] == STEP_FACTS[name].explanation
        assert step["paper"]


@pytest.mark.parametrize("name", STEP_FACTS)
def test_every_step_is_explained_in_a_paragraph_that_tells_its_price_its_use_and_its_engines(name: str):
    explanation = STEP_FACTS[name].explanation

    assert 70 <= len(explanation.split()) <= 180
    assert explanation.endswith(".")
    assert re.search(r"\n|  |[a-z][.,;][A-Za-z]", explanation) is None  # pieces of a string that were joined badly
    assert re.search(r"[Uu]se it|Worth its time|first lever", explanation)
    assert re.search(r"\b(saves?|shrinks)\b", explanation, re.IGNORECASE)
    assert re.search(r"engine|transformers|everywhere|loader", explanation)
    assert len({facts.explanation for facts in STEP_FACTS.values()}) == len(STEP_FACTS)


def test_the_table_names_only_values_that_the_settings_know():
    for name, facts in STEP_FACTS.items():
        for setting, values in facts.missing.items():
            annotation: Any = STEPS[name].model_fields[setting].annotation
            assert get_origin(annotation) is not None
            assert set(values) < set(get_args(annotation))
