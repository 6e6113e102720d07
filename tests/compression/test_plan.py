from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compression.checkpoint.headers import Checkpoint
from compression.errors import (
    ImpossibleStep,
    NotAvailable,
    NotLoadableInProfile,
    QuantizedSource,
    RecipeExceedsTarget,
    TargetUnreachable,
)
from compression.plan import Plan, make_plan
from compression.request import Compression
from tests.compression.made_checkpoints import checkpoint, deepseek, gpt_oss, mixtral, qwen, request

FIELDS = {
    "feasible", "profile", "bytes_before", "bytes_after", "smallest_possible_bytes", "target_bytes", "memory_class", "steps",
    "components", "memory", "blocks", "frontier", "provisional", "warnings", "predicted_loss", "trials",
}  # fmt: skip
COMPONENTS = {
    "experts", "attention", "router", "shared_experts", "dense", "embeddings", "other", "kv_cache", "overhead",
}  # fmt: skip

# A tiny Mixtral of bf16: 4 blocks, 8 experts, hidden 64, expert width 128, 32 keys, 96 words.
EXPERT = 3 * 64 * 128
ATTENTION = 2 * 64 * 64 + 2 * 32 * 64
OUTSIDE = 2 * (2 * 96 * 64 + 64)
ONE_SAMPLE = {"samples": 1, "sequence_length": 1023}
PACKED_EXPERT = EXPERT // 2 + 2 * (64 * 128 // 64) * 3 + 3 * 16
"""Half a byte per weight, two bytes per group of 64, and 16 bytes per matrix for its shape."""


def plan_of(*steps: dict[str, Any], family: Any = mixtral, **settings: Any) -> Plan:
    return make_plan(request(*steps, **settings), checkpoint(*family()))


def test_a_plan_counts_the_bytes_that_were_counted_by_hand():
    plan = plan_of(
        {"step": "expert_drop", "experts_kept": 6},
        {"step": "block_drop", "blocks_dropped": 1},
        {"step": "quantize", "attention": "W8A16"},
    )

    attention = ATTENTION + 2 * ATTENTION // 64 + 4 * 16
    assert plan.bytes_before == OUTSIDE + 4 * 2 * (8 * EXPERT + ATTENTION + 8 * 64 + 2 * 64)
    assert plan.components == {
        "experts": 3 * 6 * PACKED_EXPERT,
        "attention": 3 * attention,
        "router": 3 * 6 * 64 * 2,
        "shared_experts": 0,
        "dense": 0,
        "embeddings": 2 * 2 * 96 * 64,
        "other": 3 * 2 * 64 * 2 + 64 * 2,
        "kv_cache": 0,
        "overhead": 0,
    }
    assert plan.bytes_after == plan.tensor_bytes == sum(plan.components.values())
    assert {block.bytes for block in plan.blocks} == {6 * PACKED_EXPERT + attention + 6 * 64 * 2 + 2 * 64 * 2}


def test_a_plan_has_exactly_the_fields_of_the_contract():
    plan = plan_of({"step": "quantize"}).model_dump(mode="json")

    assert set(plan) == FIELDS
    assert set(plan["components"]) == COMPONENTS
    assert set(plan["memory"]) == {"packed_engine", "transformers"}
    assert set(plan["blocks"][0]) == {"index", "action", "experts_kept", "expert_scheme", "attention_scheme", "bytes"}
    assert (plan["feasible"], plan["provisional"], plan["frontier"], plan["target_bytes"]) == (True, False, [], None)


def test_blocks_say_what_surely_stays_and_what_the_study_chooses_from():
    plan = plan_of({"step": "block_drop", "blocks_dropped": 1}, {"step": "expert_drop", "experts_kept": 4}, family=qwen)

    assert [block.action for block in plan.blocks] == ["keep", "keep_or_drop", "keep_or_drop", "keep_or_drop"]
    assert [block.experts_kept for block in plan.blocks] == [None, 4, 4, 4]
    assert [block.expert_scheme for block in plan.blocks] == [None, "keep", "keep", "keep"]
    assert [block.attention_scheme for block in plan.blocks] == ["keep"] * 4


def test_without_block_drop_every_block_stays():
    plan = plan_of({"step": "quantize", "attention": "W8A16"})

    assert {block.action for block in plan.blocks} == {"keep"}
    assert {(block.expert_scheme, block.attention_scheme) for block in plan.blocks} == {("W4A16", "W8A16")}


def test_stock_transformers_needs_what_the_trims_leave_unpacked():
    trims = ({"step": "expert_drop", "experts_kept": 6}, {"step": "block_drop", "blocks_dropped": 1})
    serving = {"context_tokens": 10, "overhead": 1000}

    packed = plan_of(*trims, {"step": "quantize", "attention": "W8A16"}, serving=serving)
    unpacked = plan_of(*trims, serving=serving)

    assert packed.memory["transformers"] == unpacked.bytes_after
    assert packed.memory["packed_engine"] == packed.bytes_after < unpacked.bytes_after


def test_serving_is_part_of_what_the_target_bounds_and_no_part_of_the_tensors():
    plain = plan_of({"step": "quantize"})
    served = plan_of({"step": "quantize"}, serving={"context_tokens": 100, "batch_size": 2, "overhead": "1MB"})

    cache = 2 * 100 * 4 * (32 + 32) * 2
    assert served.components["kv_cache"] == cache
    assert served.components["overhead"] == 10**6
    assert served.bytes_after == plain.bytes_after + cache + 10**6
    assert served.tensor_bytes == plain.bytes_after


def test_a_target_is_met_to_the_byte_or_refused_with_what_the_recipe_leaves():
    exact = plan_of({"step": "quantize"}).bytes_after

    assert plan_of({"step": "quantize"}, target_memory=exact).target_bytes == exact
    with pytest.raises(RecipeExceedsTarget) as refusal:
        plan_of({"step": "quantize"}, target_memory=exact - 1)

    assert refusal.value.details == {"bytes_after": exact}
    assert refusal.value.pointer == "/target_memory"


def test_a_target_below_every_plan_is_unreachable_and_says_what_is():
    smallest = plan_of({"step": "quantize"}).smallest_possible_bytes

    with pytest.raises(TargetUnreachable) as refusal:
        plan_of({"step": "quantize"}, target_memory=smallest - 1)
    with pytest.raises(RecipeExceedsTarget):
        plan_of({"step": "quantize"}, target_memory=smallest)

    assert refusal.value.details == {"smallest_possible_bytes": smallest}


def test_the_smallest_possible_size_is_reached_by_the_recipe_that_asks_for_everything():
    everything = plan_of(
        {"step": "expert_drop", "experts_kept": 2},
        {"step": "block_drop", "blocks_dropped": 3},
        {"step": "quantize", "attention": "W4A16", "group_size": -1},
        serving={"context_tokens": 10, "overhead": 5},
    )

    assert everything.bytes_after == everything.smallest_possible_bytes


def test_what_is_not_built_is_refused_before_the_checkpoint_is_looked_at():
    with pytest.raises(NotAvailable):
        make_plan(request({"step": "recover", "method": "lora"}), checkpoint({}, {}))


def test_a_quantized_source_is_refused():
    config, tensors = mixtral()

    with pytest.raises(QuantizedSource):
        make_plan(request({"step": "quantize"}), checkpoint(config | {"quantization_config": {"bits": 4}}, tensors))


@pytest.mark.parametrize(
    ("code", "family", "steps", "settings"),
    [
        ("steps_reordered", mixtral, [{"step": "quantize"}, {"step": "block_drop", "blocks_dropped": 1}], {}),
        ("deep_expert_drop", mixtral, [{"step": "expert_drop", "experts_kept": 3}], {}),
        (
            "weak_criterion",
            lambda: mixtral(experts=64),
            [{"step": "expert_drop", "experts_kept": 60, "criterion": "frequency"}],
            {},
        ),
        ("few_tokens_per_expert", mixtral, [{"step": "quantize"}], {"calibration": ONE_SAMPLE}),
        ("default_calibration_text", mixtral, [{"step": "quantize"}], {}),
        ("default_calibration_text", mixtral, [{"step": "block_drop", "blocks_dropped": 1}], {}),
        ("mtp_dropped", deepseek, [{"step": "quantize"}], {}),
        ("nothing_to_quantize", mixtral, [{"step": "quantize", "shared_experts": "W8A16"}], {}),
        ("nothing_to_prune", mixtral, [{"step": "prune", "sparsity": 0.5, "shared_experts": True}], {}),
        ("zeros_save_nothing", mixtral, [{"step": "prune", "pattern": "2:4"}], {}),
        ("zeros_save_nothing", mixtral, [{"step": "prune", "sparsity": 0.5}], {"profile": "custom"}),
        ("zeros_save_nothing", gpt_oss, [{"step": "prune", "pattern": "2:4"}], {"profile": "custom"}),
        ("zeros_save_nothing", mixtral, [{"step": "prune", "pattern": "2:4"}, {"step": "quantize"}], {"profile": "custom"}),
        ("needs_loader", mixtral, [{"step": "prune", "pattern": "2:4"}], {"profile": "custom"}),
        ("not_for_vllm", mixtral, [{"step": "quantize", "attention": "W3A16"}], {"profile": "custom"}),
        *(
            ("few_tokens_per_expert", mixtral, [step], {"calibration": ONE_SAMPLE})
            for step in ({"step": "quantize", "method": "awq"}, {"step": "prune", "sparsity": 0.5})
        ),
        ("default_calibration_text", mixtral, [{"step": "prune", "sparsity": 0.5, "method": "wanda"}], {}),
        ("default_calibration_text", mixtral, [{"step": "quantize", "method": "awq"}], {}),
    ],
)
def test_a_warning_is_given(code: str, family: Any, steps: list[dict[str, Any]], settings: dict[str, Any]):
    assert code in {warning.code for warning in plan_of(*steps, family=family, **settings).warnings}


@pytest.mark.parametrize(
    ("code", "family", "steps", "settings"),
    [
        ("steps_reordered", mixtral, [{"step": "block_drop", "blocks_dropped": 1}, {"step": "quantize"}], {}),
        ("deep_expert_drop", mixtral, [{"step": "expert_drop", "experts_kept": 4}], {}),
        ("deep_expert_drop", lambda: mixtral(experts=18), [{"step": "expert_drop", "experts_kept": 2}], {}),
        (
            "weak_criterion",
            lambda: mixtral(experts=63),
            [{"step": "expert_drop", "experts_kept": 60, "criterion": "frequency"}],
            {},
        ),
        ("weak_criterion", lambda: mixtral(experts=64), [{"step": "expert_drop", "experts_kept": 60}], {}),
        ("few_tokens_per_expert", mixtral, [{"step": "quantize"}], {"calibration": {"samples": 1, "sequence_length": 1024}}),
        ("few_tokens_per_expert", mixtral, [{"step": "quantize", "method": "rtn"}], {"calibration": {"samples": 1}}),
        ("default_calibration_text", mixtral, [{"step": "quantize", "method": "rtn"}], {}),
        ("default_calibration_text", mixtral, [{"step": "quantize"}], {"calibration": {"source": "hub:owner/text"}}),
        ("nothing_to_quantize", qwen, [{"step": "quantize", "shared_experts": "W8A16", "dense": "W4A16"}], {}),
        ("mtp_dropped", lambda: deepseek(mtp=0), [{"step": "quantize"}], {}),
        ("nothing_to_prune", qwen, [{"step": "prune", "sparsity": 0.5, "shared_experts": True}], {}),
        ("nothing_to_prune", mixtral, [{"step": "prune", "sparsity": 0.5}], {}),
        ("zeros_save_nothing", mixtral, [{"step": "prune", "pattern": "2:4"}], {"profile": "custom"}),
        ("zeros_save_nothing", mixtral, [{"step": "quantize"}], {}),
        ("needs_loader", mixtral, [{"step": "prune", "pattern": "2:4"}], {}),
        ("needs_loader", mixtral, [{"step": "quantize", "scheme": "W2A16"}], {"profile": "custom"}),
        ("not_for_vllm", mixtral, [{"step": "quantize", "attention": "FP8_DYNAMIC"}], {"profile": "custom"}),
        (
            "few_tokens_per_expert",
            mixtral,
            [{"step": "prune", "sparsity": 0.5, "method": "wanda"}],
            {"calibration": {"samples": 1}},
        ),
        ("default_calibration_text", mixtral, [{"step": "prune", "sparsity": 0.5, "method": "magnitude"}], {}),
    ],
)
def test_a_warning_is_not_given_without_its_cause(code: str, family: Any, steps: list[dict[str, Any]], settings: dict[str, Any]):
    assert code not in {warning.code for warning in plan_of(*steps, family=family, **settings).warnings}


def test_dropping_experts_leaves_more_calibration_tokens_for_each():
    recipe = [{"step": "expert_drop", "experts_kept": 7}, {"step": "quantize"}]

    codes = {warning.code for warning in plan_of(*recipe, calibration=ONE_SAMPLE).warnings}

    assert "few_tokens_per_expert" not in codes  # 1023 * 2 / 7 reaches twice the 128 inputs, 1023 * 2 / 8 does not


def plan_or_none(wish: Compression, whole: Checkpoint) -> Plan | None:
    """Return the plan, or None where it is refused for a reason that a recipe can have; another error is a failure."""
    try:
        return make_plan(wish, whole)
    except (ImpossibleStep, NotLoadableInProfile, RecipeExceedsTarget, TargetUnreachable):
        return None


@pytest.mark.parametrize(
    ("steps", "family", "profile", "word"),
    [
        ([{"step": "prune", "pattern": "2:4"}], mixtral, "portable", 'profile "custom" stores them packed'),
        ([{"step": "prune", "sparsity": 0.5}], mixtral, "custom", 'pattern such as "2:4"'),
        ([{"step": "prune", "pattern": "2:4"}, {"step": "quantize"}], mixtral, "custom", "inside the integers"),
        ([{"step": "prune", "pattern": "2:4"}], gpt_oss, "custom", "gpt_oss saves all experts"),
        ([{"step": "prune", "pattern": "15:16"}], mixtral, "custom", "15:16 would take more bytes"),
    ],
)
def test_the_warning_of_zeros_says_why_they_are_stored_dense(steps: list[dict[str, Any]], family: Any, profile: str, word: str):
    plan = plan_of(*steps, family=family, profile=profile)

    [message] = [warning.message for warning in plan.warnings if warning.code == "zeros_save_nothing"]
    assert word in message
    assert plan.memory["transformers"] >= plan.bytes_after


def test_a_packed_pattern_counts_nine_sixteenths_on_disk_and_all_of_it_in_memory():
    plan = plan_of({"step": "prune", "pattern": "2:4"}, profile="custom")

    assert plan.components["experts"] == 4 * 8 * (2 * EXPERT * 9 // 16 + 3 * 16)
    assert plan.bytes_before - plan.bytes_after == 4 * 8 * (2 * EXPERT * 7 // 16 - 3 * 16)
    assert plan.memory["transformers"] == plan.bytes_before


@pytest.mark.parametrize(
    ("scheme", "profile", "expert"),
    [
        ("FP8_DYNAMIC", "portable", EXPERT + 2 * (128 + 128 + 64)),
        ("W3A16", "custom", EXPERT * 3 // 8 + 2 * (EXPERT // 64) + 3 * 16),
        ("W2A16", "custom", EXPERT // 4 + 2 * (EXPERT // 64) + 3 * 16),
    ],
)
def test_other_schemes_count_as_by_hand_and_unpack_to_the_whole_model(scheme: str, profile: str, expert: int):
    plan = plan_of({"step": "quantize", "scheme": scheme}, profile=profile)

    assert plan.components["experts"] == 4 * 8 * expert
    assert plan.memory["transformers"] == plan.bytes_before
    assert {block.expert_scheme for block in plan.blocks} == {scheme}


def test_the_least_that_is_possible_is_less_in_the_custom_profile():
    portable, custom = (plan_of({"step": "quantize"}, profile=profile) for profile in ("portable", "custom"))

    assert custom.smallest_possible_bytes < portable.smallest_possible_bytes
    assert custom.bytes_after == portable.bytes_after


quantize_steps = st.fixed_dictionaries(
    {"step": st.just("quantize")},
    optional={
        "method": st.sampled_from(["rtn", "gptq", "awq"]),
        "scheme": st.sampled_from(["W4A16", "W8A16", "W3A16", "W2A16", "FP8_DYNAMIC"]),
        "group_size": st.sampled_from([32, 64, 128, -1]),
        "attention": st.sampled_from(["W4A16", "W8A16", "W2A16", "FP8_DYNAMIC", "keep"]),
        "shared_experts": st.sampled_from(["W4A16", "W8A16", "keep"]),
        "dense": st.sampled_from(["W4A16", "W8A16", "keep"]),
    },
)
prune_steps = st.fixed_dictionaries(
    {"step": st.just("prune"), "pattern": st.sampled_from(["2:4", "4:8", "1:64", "3:4", "15:16", "1:3"])},
    optional={"method": st.sampled_from(["magnitude", "wanda", "sparsegpt"]), "shared_experts": st.booleans()},
) | st.fixed_dictionaries({"step": st.just("prune"), "sparsity": st.sampled_from([0.0, 0.5])})
profiles = st.sampled_from(["portable", "custom"])
recipes = st.lists(
    st.one_of(
        quantize_steps,
        prune_steps,
        st.fixed_dictionaries({"step": st.just("expert_drop"), "experts_kept": st.integers(1, 17)}),
        st.fixed_dictionaries({"step": st.just("expert_drop"), "fraction_dropped": st.floats(0.01, 0.99)}),
        st.fixed_dictionaries({"step": st.just("block_drop"), "blocks_dropped": st.integers(1, 4)}),
    ),
    min_size=1,
    max_size=4,
)
servings = st.fixed_dictionaries(
    {},
    optional={
        "context_tokens": st.integers(0, 10**6),
        "batch_size": st.integers(1, 9),
        "tensor_parallel": st.sampled_from([1, 2, 4]),
        "expert_parallel": st.sampled_from([1, 2, 3]),
        "overhead": st.integers(0, 10**9),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from([mixtral, qwen, deepseek, gpt_oss]),
    steps=recipes,
    serving=servings,
    target=st.none() | st.integers(0, 10**7),
    profile=profiles,
)
def test_every_plan_keeps_its_promises(
    family: Any, steps: list[dict[str, Any]], serving: dict[str, Any], target: int | None, profile: str
):
    whole = checkpoint(*family())
    plan = plan_or_none(request(*steps, serving=serving, target_memory=target, profile=profile), whole)
    if plan is None:
        return

    assert target is None or plan.bytes_after <= target
    assert plan.smallest_possible_bytes <= plan.bytes_after == sum(plan.components.values())
    assert plan.memory["packed_engine"] == plan.bytes_after <= plan.memory["transformers"]
    assert len(plan.blocks) == whole.config["num_hidden_layers"]
    dropped = sum(step["blocks_dropped"] for step in plan.steps if step["step"] == "block_drop")
    smallest_block = min((block.bytes for block in plan.blocks if block.action == "keep_or_drop"), default=0)
    outside = plan.tensor_bytes + dropped * smallest_block - sum(block.bytes for block in plan.blocks)
    assert outside == 2 * (2 * 96 * 64 + 64)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(family=st.sampled_from([mixtral, qwen, deepseek, gpt_oss]), steps=recipes, profile=profiles)
def test_a_plans_own_steps_are_a_recipe_for_the_same_plan(family: Any, steps: list[dict[str, Any]], profile: str):
    whole = checkpoint(*family())
    plan = plan_or_none(request(*steps, profile=profile), whole)
    if plan is None:
        return

    again = make_plan(request(*plan.steps, profile=profile), whole)

    without_order = [warning for warning in plan.warnings if warning.code != "steps_reordered"]
    assert again == plan.model_copy(update={"warnings": tuple(without_order)})


def test_the_text_of_a_plan_is_json_and_comes_back_equal():
    plan = plan_of({"step": "quantize"}, target_memory="1MB")

    assert Plan.model_validate_json(plan.model_dump_json()) == plan
