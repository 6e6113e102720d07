"""Warnings that go by what was measured elsewhere; those that go by arithmetic stand beside the plan's tests."""

from __future__ import annotations

from typing import Any

import pytest

from compression.plan import Plan, make_plan
from compression.planner.collapses import COLLAPSES, collapse_of
from compression.recipe import STEPS, step_schema
from tests.compression.made_checkpoints import Config, Tensors, checkpoint, deepseek, gpt_oss, mixtral, qwen, request


def plan_of(*steps: dict[str, Any], family: Any = mixtral, profile: str = "custom") -> Plan:
    return make_plan(request(*steps, profile=profile), checkpoint(*family()))


def said(code: str, *steps: dict[str, Any], family: Any = mixtral, profile: str = "custom") -> list[str]:
    return [warning.message for warning in plan_of(*steps, family=family, profile=profile).warnings if warning.code == code]


def drop(criterion: str, kept: int, **more: Any) -> dict[str, Any]:
    return {"step": "expert_drop", "criterion": criterion, "experts_kept": kept, **more}


# Criteria that are known to fail


@pytest.mark.parametrize(
    ("family", "step", "word"),
    [
        (lambda: mixtral(experts=64), drop("frequency", 63), ".452 on code"),
        (mixtral, drop("reap", 5), ".031 on GSM8K"),
        (lambda: mixtral(experts=16), drop("reap", 10), ".031 on GSM8K"),
        (mixtral, drop("man", 6), "64.2"),
        (mixtral, drop("msan", 6), "64.2"),
        (mixtral, drop("hope", 4), "169.0"),
        (mixtral, drop("aimer", 4), "87.5"),
        (lambda: deepseek(experts=64), drop("reap", 48), "Moonlight"),
        (deepseek, drop("reap", 8), "Moonlight"),
        (mixtral, {"step": "expert_drop", "criterion": "man", "fraction_dropped": 0.25}, "64.2"),
        (mixtral, drop("man", 6, scope="global"), "64.2"),
    ],
)
def test_a_criterion_that_failed_on_such_models_is_warned_of_with_what_was_measured(family: Any, step: dict[str, Any], word: str):
    [message] = said("weak_criterion", step, family=family)

    assert message.startswith(f"{step['criterion']}: ")
    assert word in message


@pytest.mark.parametrize(
    ("family", "step"),
    [
        (lambda: mixtral(experts=63), drop("frequency", 32)),
        (mixtral, drop("reap", 6)),
        (lambda: mixtral(experts=17), drop("reap", 9)),
        (mixtral, drop("man", 7)),
        (lambda: mixtral(experts=17), drop("msan", 4)),
        (mixtral, drop("hope", 5)),
        (mixtral, drop("aimer", 5)),
        (mixtral, drop("reconstruction", 4)),
        (mixtral, drop("expert_norm", 4)),
        (lambda: deepseek(experts=64), drop("reap", 52)),
        (lambda: deepseek(experts=68), drop("reap", 32)),
        (lambda: mixtral(experts=64), drop("reap", 32)),
    ],
)
def test_a_criterion_is_not_warned_of_where_nothing_of_the_kind_was_measured(family: Any, step: dict[str, Any]):
    assert said("weak_criterion", step, family=family) == []


def test_drops_that_follow_one_another_are_judged_by_what_they_leave():
    assert said("weak_criterion", drop("man", 7)) == []
    assert len(said("weak_criterion", drop("man", 7), drop("man", 6))) == 2


def test_every_row_of_the_table_can_be_met_and_names_criteria_that_there_are():
    criteria = set(step_schema(STEPS["expert_drop"])["properties"]["criterion"]["enum"])

    for row in COLLAPSES:
        model_type = row.families[0] if row.families else "mixtral"
        assert set(row.criteria) <= criteria
        for criterion in row.criteria:
            assert collapse_of(criterion, experts=row.least, share=row.share, model_type=model_type) is row


# Hybrid attention


def minimax(*kinds: str) -> tuple[Config, Tensors]:
    config, tensors = mixtral()
    return config | {"model_type": "minimax", "layer_types": list(kinds)}, tensors


def unlisted() -> tuple[Config, Tensors]:
    """Return a model whose linear attention shows in its tensors alone."""
    config, tensors = qwen(dense=())
    renamed = {name.replace("layers.1.self_attn.", "layers.1.linear_attn."): tensor for name, tensor in tensors.items()}
    return config | {"model_type": "qwen3_next"}, renamed


LISTED = ("linear_attention", "linear_attention", "linear_attention", "full_attention")


@pytest.mark.parametrize("family", [lambda: minimax(*LISTED), unlisted])
@pytest.mark.parametrize("step", [drop("reap", 7), {"step": "expert_merge", "experts_kept": 7}])
def test_dropping_experts_of_a_model_with_linear_attention_is_warned_of(family: Any, step: dict[str, Any]):
    [message] = said("hybrid_attention", step, family=family)

    assert "linear attention" in message


def test_a_model_whose_config_describes_its_linear_attention_counts_as_hybrid():
    config, tensors = mixtral()

    assert said("hybrid_attention", drop("reap", 7), family=lambda: (config | {"linear_attn_config": {}}, tensors))


@pytest.mark.parametrize(
    ("family", "step"),
    [
        (lambda: minimax(*LISTED), {"step": "quantize"}),
        (lambda: minimax(*["full_attention"] * 4), drop("reap", 7)),
        (lambda: (mixtral()[0] | {"layer_types": 5}, mixtral()[1]), drop("reap", 7)),
        (mixtral, drop("reap", 7)),
        (gpt_oss, drop("reap", 7)),
    ],
)
def test_hybrids_are_not_warned_of_without_linear_attention_or_without_a_drop(family: Any, step: dict[str, Any]):
    assert said("hybrid_attention", step, family=family) == []


# Levers that another one outdoes


@pytest.mark.parametrize("more", [{"attention": "W2A16"}, {"by_block": {1: {"attention": "W2A16"}}}])
def test_attention_at_two_bits_is_warned_of_with_its_share_of_the_bytes(more: dict[str, Any]):
    [message] = said("dear_attention_bits", {"step": "quantize", **more})

    # A block's attention takes 12 288 of its 209 536 weights; the embeddings make 12 288 + 64 more beside the four blocks.
    assert f"{4 * 12288 / (4 * 209536 + 12352):.1%}" in message


@pytest.mark.parametrize("more", [{"scheme": "W2A16"}, {"attention": "W3A16"}, {"dense": "W2A16"}])
def test_other_bits_are_not(more: dict[str, Any]):
    assert said("dear_attention_bits", {"step": "quantize", **more}) == []


@pytest.mark.parametrize(("pattern", "share"), [("2:4", "56%"), ("1:4", "31%"), ("3:16", "25%")])
def test_a_packed_pattern_is_warned_of_with_what_saves_more_and_costs_less(pattern: str, share: str):
    [message] = said("pattern_outdone", {"step": "prune", "pattern": pattern})

    assert f"{pattern} takes {share}" in message
    assert "W3A16" in message


def kimi() -> tuple[Config, Tensors]:
    """Return a model of a family whose weights are never quantized."""
    config, tensors = mixtral()
    own = {"num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 0}
    return config | {"model_type": "kimi_linear", **own}, tensors


@pytest.mark.parametrize(
    ("step", "family", "profile"),
    [
        ({"step": "prune", "pattern": "2:4"}, kimi, "custom"),
        ({"step": "prune", "pattern": "1:8"}, mixtral, "custom"),  # 3 bits a weight, less than 3 with their scales
        ({"step": "prune", "pattern": "2:4"}, mixtral, "portable"),
        ({"step": "prune", "pattern": "2:4"}, gpt_oss, "custom"),
        ({"step": "prune", "sparsity": 0.5}, mixtral, "custom"),
    ],
)
def test_a_pattern_that_has_no_better_or_saves_nothing_is_not(step: dict[str, Any], family: Any, profile: str):
    assert said("pattern_outdone", step, family=family, profile=profile) == []
