from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from compression.recipe import STEPS, AnyStep, Prune, Quantize, Recipe, parse_pattern, step_schema
from compression.request import Bytes, Compression, parse_bytes

BASE: dict[str, Any] = {"model": "owner/name", "recipe": {"steps": [{"step": "quantize"}]}}


def accepted(**settings: Any) -> Compression:
    return Compression.model_validate({**BASE, **settings})


def faults_of(**settings: Any) -> list[tuple[Any, ...]]:
    """Return where the request is at fault, but not that a recipe written out is not the word "auto"."""
    with pytest.raises(ValidationError) as refusal:
        accepted(**settings)
    places = [error["loc"] for error in refusal.value.errors()]
    return [place for place in places if place != ("recipe", "literal['auto']")] or places


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("20GiB", 20 * 2**30),
        ("1.5 KB", 1500),
        ("7", 7),
        ("7B", 7),
        (" 2 mib ", 2 * 2**20),
        ("0.5TiB", 2**39),
        (12, 12),
    ],
)
def test_a_size_is_an_integer_or_a_number_with_a_unit(text: object, size: int):
    assert TypeAdapter(Bytes).validate_python(text) == size


@pytest.mark.parametrize("text", ["20 gigabytes", "GB", "-1GB", "1e3GB", "", "20GB extra", "1,5GB", -1, 1.5, None])
def test_what_is_no_size_is_refused(text: object):
    with pytest.raises(ValidationError):
        TypeAdapter(Bytes).validate_python(text)


@given(st.integers(0, 10**15))
def test_every_count_of_bytes_written_out_is_read_back(size: int):
    assert parse_bytes(f"{size}B") == parse_bytes(size) == size


def test_a_target_or_a_recipe_is_enough():
    assert Compression.model_validate({"model": "a/b", "target_memory": "20GB"}).recipe == "auto"
    assert accepted().target_memory is None
    with pytest.raises(ValidationError, match="target_memory"):
        Compression.model_validate({"model": "a/b"})


@pytest.mark.parametrize(
    "place",
    [(), ("serving",), ("constraints",), ("calibration",), ("evaluation",), ("evaluation", "perplexity"), ("recipe",)],
)
def test_an_unknown_name_is_refused_wherever_it_stands(place: tuple[str, ...]):
    body: dict[str, Any] = {**BASE, "recipe": {"steps": [{"step": "quantize"}]}}
    inner = body
    for name in place:
        inner = inner.setdefault(name, {})
    inner["target_memrity"] = 1

    with pytest.raises(ValidationError) as refusal:
        Compression.model_validate(body)

    assert any("target_memrity" in error["loc"] for error in refusal.value.errors())


@pytest.mark.parametrize("step", sorted(STEPS))
def test_an_unknown_setting_of_a_step_is_refused(step: str):
    faults = faults_of(recipe={"steps": [{"step": step, "spasity": 0.5}]})

    assert ("recipe", "Recipe", "steps", 0, step, "spasity") in faults


@pytest.mark.parametrize(
    "step",
    [
        {"step": "squeeze"},
        {},
        {"step": "prune"},
        {"step": "prune", "sparsity": 1.5},
        {"step": "prune", "sparsity": 1.0},
        {"step": "prune", "sparsity": -0.1},
        {"step": "prune", "sparsity": 0.5, "pattern": "2:4"},
        {"step": "prune", "pattern": "4:4"},
        {"step": "prune", "pattern": "0:4"},
        {"step": "prune", "pattern": "2:65"},
        {"step": "prune", "pattern": "2 of 4"},
        {"step": "prune", "pattern": 4},
        {"step": "prune", "sparsity": 0.5, "method": "magnitude", "routing_weighted": True},
        {"step": "quantize", "method": "rtn", "routing_weighted": True},
        {"step": "quantize", "group_size": 100},
        {"step": "quantize", "scheme": "W5A16"},
        {"step": "quantize", "attention": None},
        {"step": "expert_drop"},
        {"step": "expert_drop", "experts_kept": 0},
        {"step": "expert_drop", "experts_kept": 4, "fraction_dropped": 0.5},
        {"step": "expert_drop", "fraction_dropped": 1.0},
        {"step": "expert_drop", "fraction_dropped": float("nan")},
        {"step": "expert_drop", "experts_kept": 4, "criterion": "luck"},
        {"step": "block_drop"},
        {"step": "block_drop", "blocks_dropped": 0},
        {"step": "expert_merge"},
        {"step": "layer_drop"},
        {"step": "expert_skip", "beta": 2.0},
        {"step": "recover"},
    ],
    ids=str,
)
def test_a_step_refuses_what_its_settings_do_not_allow(step: dict[str, Any]):
    assert ("recipe", "Recipe", "steps", 0) in {place[:4] for place in faults_of(recipe={"steps": [step]})}


@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("recipe", {"recipe": {"steps": []}}),
        ("recipe", {"recipe": {"steps": [{"step": "analyze"}] * 33}}),
        ("recipe", {"recipe": "best"}),
        ("profile", {"profile": "anything"}),
        ("model", {"model": ""}),
        ("serving", {"serving": {"context_tokens": -1}}),
        ("serving", {"serving": {"batch_size": 0}}),
        ("constraints", {"constraints": {"min_retention": 1.5}}),
        ("calibration", {"calibration": {"samples": 0}}),
        ("calibration", {"calibration": {"source": "ftp://text"}}),
        ("calibration", {"calibration": {"source": []}}),
        ("calibration", {"calibration": {"source": {"inline": []}}}),
        ("calibration", {"calibration": {"source": {"inline": ["x" * 2**20, "y"]}}}),
        ("calibration", {"calibration": {"source": [{"source": "hub:a/b", "weight": 0}]}}),
    ],
    ids=str,
)
def test_a_request_refuses_what_the_contract_does_not_allow(place: str, settings: dict[str, Any]):
    assert {fault[0] for fault in faults_of(**settings)} == {place}


@pytest.mark.parametrize(
    "source", ["default", "hub:allenai/c4:en:train", "s3://bucket/key", "file:///texts/a.jsonl", {"inline": ["a"]}]
)
def test_every_kind_of_text_source_is_known(source: Any):
    assert accepted(calibration={"source": source}, evaluation={"perplexity": {"source": source}})


def test_the_normal_form_keeps_the_order_of_trims_and_moves_the_rest():
    given_steps = ["recover", "quantize", "block_drop", "prune", "expert_drop", "analyze", "block_drop"]
    settings: dict[str, dict[str, Any]] = {
        "recover": {"method": "lora"},
        "block_drop": {"blocks_dropped": 1},
        "prune": {"sparsity": 0.5},
        "expert_drop": {"experts_kept": 4},
    }
    recipe = Recipe.model_validate({"steps": [{"step": name, **settings.get(name, {})} for name in given_steps]})

    normal = recipe.in_normal_form()

    assert [step.step for step in normal.steps] == [
        "analyze", "block_drop", "expert_drop", "block_drop", "prune", "quantize", "recover"
    ]  # fmt: skip
    assert recipe.normal_order() == (5, 2, 4, 6, 3, 1, 0)
    assert normal.in_normal_form() == normal


def test_a_request_is_frozen():
    with pytest.raises(ValidationError):
        accepted().model = "other/name"  # type: ignore[misc]


def test_a_request_comes_back_equal_from_its_own_json():
    request = accepted(
        target_memory="1GB",
        calibration={"source": [{"source": {"inline": ["a", "b"]}, "weight": 0.5, "name": "x"}]},
        serving={"overhead": "2GiB"},
    )

    assert Compression.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_steps_schema_is_closed_and_names_every_setting(name: str):
    schema = step_schema(STEPS[name])

    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(STEPS[name].model_fields)
    assert schema["properties"]["step"]["const"] == name


def test_every_step_class_is_one_of_the_steps_that_a_recipe_takes():
    for name, step in STEPS.items():
        assert step.model_fields["step"].default == name
        discriminated = TypeAdapter(AnyStep).json_schema()["discriminator"]["mapping"]
        assert set(discriminated) == set(STEPS)


def test_group_size_stays_open_until_a_plan_fills_it():
    assert Quantize().group_size is None
    assert Quantize(group_size=-1).group_size == -1


@pytest.mark.parametrize(("text", "pattern"), [("2:4", (2, 4)), ("4:8", (4, 8)), ("1:64", (1, 64)), ("63:64", (63, 64))])
def test_a_pattern_is_the_non_zeros_and_the_inputs_among_which_they_are(text: str, pattern: tuple[int, int]):
    assert parse_pattern(text) == pattern
    assert Prune(pattern=text).pattern == text


@pytest.mark.parametrize("text", ["4:4", "4:2", "0:4", "1:65", "02:4", "2:4 ", "2/4", "", "\u0662:4"])
def test_what_is_no_pattern_is_named_with_what_would_be(text: str):
    with pytest.raises(ValueError, match="at most n non-zero in every m inputs, 1 <= n < m <= 64") as refusal:
        parse_pattern(text)

    assert repr(text) in str(refusal.value)


def test_a_method_is_calibrated_when_it_looks_at_what_enters_a_weight():
    steps = [Prune(method=method, sparsity=0.5) for method in ("magnitude", "wanda", "sparsegpt")]
    steps += [Quantize(method=method) for method in ("rtn", "gptq", "awq")]

    assert [step.method for step in steps if step.calibrated] == ["wanda", "sparsegpt", "gptq", "awq"]
    assert all(step.propagate_error and not step.routing_weighted for step in steps)
