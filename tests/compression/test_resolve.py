from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compression.errors import ImpossibleStep, NotAvailable, NotLoadableInProfile, RequestError
from compression.planner.inventory import Inventory, take_inventory
from compression.planner.resolve import Resolved, resolve
from compression.planner.sizes import Cut, artifact_sizes
from compression.planner.trims import workable_counts
from compression.recipe import (
    BlockDrop,
    ExpertDrop,
    ExpertMerge,
    ExpertSkip,
    LayerDrop,
    Pattern,
    Profile,
    Quantize,
    Recipe,
    Recover,
)
from compression.request import Serving
from tests.compression.made_checkpoints import checkpoint, deepseek, gpt_oss, mixtral, qwen


def inventory_of(family: Any = mixtral, **shape: Any) -> Inventory:
    return take_inventory(checkpoint(*family(**shape)))


def resolved(
    *steps: dict[str, Any], inventory: Inventory | None = None, profile: Profile = "portable", **serving: Any
) -> Resolved:
    recipe = Recipe.model_validate({"steps": list(steps)})
    return resolve(recipe, Serving(**serving), inventory or inventory_of(), profile=profile)


def drop(**settings: Any) -> dict[str, Any]:
    return {"step": "expert_drop", **settings}


def quantize(**settings: Any) -> dict[str, Any]:
    return {"step": "quantize", **settings}


def prune(**settings: Any) -> dict[str, Any]:
    return {"step": "prune", **settings}


def refusal(
    *steps: dict[str, Any], inventory: Inventory | None = None, profile: Profile = "portable", **serving: Any
) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolved(*steps, inventory=inventory, profile=profile, **serving)
    return caught.value


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(0.25, 6), (0.5, 4), (0.3, 6), (0.7, 2), (0.01, 8)],  # 0.3 of 8 is 2.4, which rounds to 2
)
def test_a_fraction_becomes_a_count_and_is_no_longer_a_fraction(fraction: float, kept: int):
    result = resolved(drop(fraction_dropped=fraction))

    assert result.steps == (ExpertDrop(experts_kept=kept),)
    assert result.cut == Cut(kept)


def test_a_second_drop_keeps_of_what_the_first_one_left():
    result = resolved(drop(experts_kept=6, criterion="frequency"), drop(fraction_dropped=0.5, criterion="reap"))

    assert [step.experts_kept for step in result.steps if isinstance(step, ExpertDrop)] == [6, 3]
    assert refusal(drop(experts_kept=4), drop(experts_kept=6)).message.endswith("4 are left")


def test_block_drops_add_up():
    result = resolved(
        {"step": "block_drop", "blocks_dropped": 1}, drop(experts_kept=6), {"step": "block_drop", "blocks_dropped": 2}
    )

    assert result.cut == Cut(6, 3)
    assert [step.step for step in result.steps] == ["block_drop", "expert_drop", "block_drop"]


def test_quantize_is_worked_last_and_says_its_group():
    result = resolved(quantize(attention="W8A16"), drop(experts_kept=6))

    assert result.steps == (ExpertDrop(experts_kept=6), Quantize(attention="W8A16", group_size=64))
    assert result.cut == Cut(6, 0, {"experts": "W4A16", "attention": "W8A16"}, 64)


@pytest.mark.parametrize(
    ("kept", "words"),
    [(1, ("1 experts", "chooses 2", "keep at least 2")), (9, ("9 experts", "8 are left"))],
)
def test_a_count_below_top_k_or_above_what_there_is_is_impossible(kept: int, words: tuple[str, ...]):
    error = refusal(drop(experts_kept=kept))

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/0/experts_kept"
    assert all(word in error.message for word in words)


def test_a_fraction_that_leaves_too_few_points_at_the_fraction():
    error = refusal(quantize(), drop(fraction_dropped=0.9))

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/1/fraction_dropped"


def test_pointers_name_the_place_in_the_request_and_not_in_normal_form():
    assert refusal(quantize(), drop(experts_kept=1)).pointer == "/recipe/steps/1/experts_kept"
    assert refusal(quantize(group_size=128), drop(experts_kept=4)).pointer == "/recipe/steps/0/group_size"


@pytest.mark.parametrize("kept", [10, 3, 4])
def test_group_limited_routing_lists_the_counts_that_work(kept: int):
    # 4 groups of 4 experts, 2 groups used, 2 experts per token; a group is scored by its two best experts.
    error = refusal(drop(experts_kept=kept), inventory=inventory_of(deepseek))

    assert isinstance(error, ImpossibleStep)
    assert error.message.endswith("counts that work: 8, 12, 16")


def test_the_groups_that_are_used_must_hold_enough_experts_for_one_token():
    inventory = inventory_of(deepseek, experts=32, top_k=6, groups=4, groups_used=1)

    assert workable_counts(inventory) == [24, 28, 32]
    assert isinstance(refusal(drop(experts_kept=20), inventory=inventory), ImpossibleStep)
    assert resolved(drop(experts_kept=24), inventory=inventory).cut == Cut(24)


def test_experts_must_spread_evenly_over_the_devices_that_share_them():
    error = refusal(drop(experts_kept=6), expert_parallel=4)

    assert isinstance(error, NotLoadableInProfile)
    assert error.pointer == "/serving/expert_parallel"
    assert error.message.endswith("counts that work: 4, 8")
    assert resolved(drop(experts_kept=6), drop(experts_kept=4), expert_parallel=4).cut.experts_kept == 4


def test_experts_that_are_all_kept_must_spread_evenly_too():
    assert isinstance(refusal(quantize(), expert_parallel=3), NotLoadableInProfile)


def test_block_drop_chooses_among_alike_mixtures_and_one_must_stay():
    inventory = inventory_of(qwen, blocks=5, dense=(0, 3))

    error = refusal({"step": "block_drop", "blocks_dropped": 2}, {"step": "block_drop", "blocks_dropped": 1}, inventory=inventory)

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/1/blocks_dropped"
    assert "would leave 0 of the 3 blocks" in error.message
    assert resolved({"step": "block_drop", "blocks_dropped": 2}, inventory=inventory).cut.blocks_dropped == 2


def test_a_weight_is_quantized_once():
    error = refusal(quantize(), quantize(scheme="W8A16"))

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/1"


def test_experts_saved_in_one_tensor_cannot_be_packed():
    error = refusal(quantize(), inventory=inventory_of(gpt_oss))

    assert isinstance(error, NotLoadableInProfile)
    assert "gpt_oss" in error.message
    assert "3-D" in error.message


@pytest.mark.parametrize(
    ("hidden", "width", "group"),
    [(256, 128, 128), (256, 192, 64), (96, 128, 32), (80, 128, -1)],
)
def test_the_group_is_the_largest_that_divides_every_quantized_width(hidden: int, width: int, group: int):
    assert resolved(quantize(), inventory=inventory_of(hidden=hidden, width=width)).cut.group_size == group


def test_what_is_not_quantized_does_not_limit_the_group():
    inventory = inventory_of(deepseek, hidden=128, width=128, latent=96)

    assert resolved(quantize(), inventory=inventory).cut.group_size == 128
    assert resolved(quantize(attention="W4A16"), inventory=inventory).cut.group_size == 32


def test_a_group_that_does_not_divide_names_tensor_width_and_what_would():
    error = refusal(quantize(group_size=128), inventory=inventory_of(hidden=256, width=192))

    assert isinstance(error, NotLoadableInProfile)
    assert "192 inputs" in error.message
    assert "experts.0.w2.weight" in error.message
    assert "64, 32, -1" in error.message
    assert resolved(quantize(group_size=-1), inventory=inventory_of(hidden=256, width=192)).cut.group_size == -1


@pytest.mark.parametrize(
    ("devices", "group"),
    [(1, 128), (2, 128), (3, 128), (4, 64), (6, 128), (8, 32)],  # 768 / 4 is 192, 768 / 8 is 96
)
def test_groups_divide_what_each_device_holds_of_an_experts_inner_width(devices: int, group: int):
    inventory = inventory_of(hidden=2048, width=768, kv=256)

    assert resolved(quantize(), inventory=inventory, tensor_parallel=devices).cut.group_size == group


def test_the_output_projection_of_attention_is_split_over_devices_too():
    inventory = inventory_of(hidden=256, width=1024, kv=256)

    assert resolved(quantize(), inventory=inventory, tensor_parallel=4).cut.group_size == 128
    assert resolved(quantize(attention="W4A16"), inventory=inventory, tensor_parallel=4).cut.group_size == 64


def test_a_width_that_devices_cannot_share_is_not_loadable():
    error = refusal(drop(experts_kept=4), tensor_parallel=3)

    assert isinstance(error, NotLoadableInProfile)
    assert error.pointer == "/serving/tensor_parallel"
    assert "128" in error.message


def test_a_step_without_a_resolution_is_refused_and_not_skipped():
    with pytest.raises(NotAvailable):
        resolve(Recipe(steps=(Recover(method="lora"),)), Serving(), inventory_of())


@pytest.mark.parametrize("setting", ["scheme", "attention", "shared_experts", "dense"])
@pytest.mark.parametrize("scheme", ["W3A16", "W2A16"])
def test_fewer_than_four_bits_need_the_custom_profile(setting: str, scheme: str):
    error = refusal(quantize(**{setting: scheme}))

    assert isinstance(error, NotLoadableInProfile)
    assert error.pointer == f"/recipe/steps/0/{setting}"
    assert scheme in error.message
    assert 'profile "custom"' in error.message
    component = "experts" if setting == "scheme" else setting
    assert dict(resolved(quantize(**{setting: scheme}), profile="custom").cut.schemes)[component] == scheme


def test_floats_take_part_in_the_portable_profile_beside_integers():
    result = resolved(quantize(scheme="W4A16", attention="FP8_DYNAMIC"))

    assert result.cut == Cut(8, 0, {"experts": "W4A16", "attention": "FP8_DYNAMIC"}, 64)


def test_floats_have_no_groups_and_limit_those_of_no_other_scheme():
    inventory = inventory_of(deepseek, hidden=128, width=128, latent=96)  # kv_b_proj takes 96 inputs: 128 does not divide

    assert resolved(quantize(attention="FP8_DYNAMIC"), inventory=inventory).cut.group_size == 128
    assert resolved(quantize(attention="W8A16"), inventory=inventory).cut.group_size == 32


def test_where_all_schemes_are_floats_the_group_is_the_whole_row_and_another_is_impossible():
    floats = {"scheme": "FP8_DYNAMIC", "attention": "FP8_DYNAMIC"}

    error = refusal(quantize(**floats, group_size=64))

    assert resolved(quantize(**floats)).cut.group_size == -1
    assert resolved(quantize(**floats, group_size=-1)).steps == (Quantize(**floats, group_size=-1),)
    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/0/group_size"


def test_floats_are_split_over_devices_as_integers_are():
    error = refusal(quantize(scheme="FP8_DYNAMIC", attention="FP8_DYNAMIC"), inventory=inventory_of(hidden=66), tensor_parallel=4)

    assert isinstance(error, NotLoadableInProfile)
    assert "66 inputs" in error.message


def test_fewer_bits_name_the_groups_that_divide_over_devices_too():
    inventory = inventory_of(hidden=256, width=768, kv=256)

    error = refusal(quantize(scheme="W3A16", group_size=128), inventory=inventory, profile="custom", tensor_parallel=4)

    assert isinstance(error, NotLoadableInProfile)
    assert "192 inputs per device" in error.message
    assert "64, 32, -1" in error.message


def test_awq_is_impossible_where_the_gating_function_clamps():
    inventory = inventory_of()
    clamping = replace(inventory, architecture=replace(inventory.architecture, gating="clamped"))

    error = refusal(quantize(method="awq"), inventory=clamping)

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/0/method"
    assert resolved(quantize(method="awq")).cut == resolved(quantize(method="gptq")).cut


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("profile", ["portable", "custom"])
def test_no_method_and_no_profile_packs_experts_saved_in_one_tensor(method: str, profile: Profile):
    error = refusal(quantize(method=method), inventory=inventory_of(gpt_oss), profile=profile)

    assert isinstance(error, NotLoadableInProfile)
    assert error.pointer == "/recipe/steps/0"


@pytest.mark.parametrize("family", [mixtral, qwen, deepseek, gpt_oss])
@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_pruning_changes_no_byte_of_any_family_in_the_portable_profile(family: Any, settings: dict[str, Any]):
    inventory = inventory_of(family)

    result = resolved(prune(**settings), inventory=inventory)

    assert result.cut == Cut(inventory.experts, pruned=frozenset({"experts"}))
    assert artifact_sizes(inventory, result.cut).total == inventory.bytes


def test_a_weight_is_pruned_once():
    error = refusal(prune(sparsity=0.5), quantize(), prune(pattern="2:4"))

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/2"


def test_a_pattern_that_does_not_fill_a_matrix_names_it_its_width_and_what_would():
    error = refusal(prune(pattern="3:10"), inventory=inventory_of(hidden=60, width=64))

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/0/pattern"
    assert "64 inputs of 'model.layers.0.block_sparse_moe.experts.0.w2.weight'" in error.message
    assert error.message.endswith("divide every pruned matrix: 2, 4")


def test_shared_experts_bind_a_pattern_only_when_they_are_pruned():
    # Routed experts take 64 and 128 inputs, the shared one 64 and 192: only the last is no multiple of 128.
    inventory = inventory_of(qwen, width=128, hidden=128)

    assert resolved(prune(pattern="1:64"), inventory=inventory).cut.pruned == {"experts"}
    assert resolved(prune(pattern="1:64", shared_experts=True), inventory=inventory).cut.pruned == {"experts", "shared_experts"}
    narrow = inventory_of(qwen, width=160, hidden=160)
    assert resolved(prune(pattern="1:10"), inventory=narrow).cut.pruned == {"experts"}
    assert "shared_expert.down_proj" in refusal(prune(pattern="1:10", shared_experts=True), inventory=narrow).message


def test_a_pattern_must_fill_the_inputs_of_experts_saved_in_one_tensor_too():
    inventory = inventory_of(gpt_oss, hidden=64, width=96)  # saved [experts, inputs, outputs]

    error = refusal(prune(pattern="2:64"), inventory=inventory)

    assert "96 inputs of 'model.layers.0.mlp.experts.down_proj'" in error.message
    assert resolved(prune(pattern="2:32"), inventory=inventory).cut.pruned == {"experts"}


def test_a_pattern_without_quantization_is_packed_in_the_custom_profile():
    assert resolved(prune(pattern="2:4"), profile="custom").cut == Cut(8, pattern=Pattern(2, 4), pruned=frozenset({"experts"}))


@pytest.mark.parametrize(
    ("steps", "family", "profile"),
    [
        ([prune(pattern="2:4")], mixtral, "portable"),
        ([prune(sparsity=0.5)], mixtral, "custom"),
        ([prune(pattern="2:4"), quantize()], mixtral, "custom"),
        ([prune(pattern="2:4")], gpt_oss, "custom"),
        ([prune(pattern="15:16")], mixtral, "custom"),  # 15/16 of 16 bits and one more for the mask: nothing is saved
        ([drop(experts_kept=4)], mixtral, "custom"),
    ],
)
def test_everything_else_that_is_pruned_is_stored_dense(steps: list[dict[str, Any]], family: Any, profile: Profile):
    assert resolved(*steps, inventory=inventory_of(family), profile=profile).cut.pattern is None


@pytest.mark.parametrize(("setting", "value"), [("routing_weighted", True), ("propagate_error", False)])
def test_steps_that_share_a_calibration_pass_must_agree_on_it(setting: str, value: bool):
    error = refusal(prune(sparsity=0.5), quantize(**{setting: value}))

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == f"/recipe/steps/1/{setting}"
    assert setting in error.message
    assert resolved(prune(sparsity=0.5, **{setting: value}), quantize(**{setting: value})).cut.schemes


@pytest.mark.parametrize(
    "steps",
    [
        [prune(sparsity=0.5, method="magnitude"), quantize(routing_weighted=True, propagate_error=False)],
        [prune(sparsity=0.5, method="wanda", routing_weighted=True), quantize(method="rtn")],
    ],
)
def test_a_step_that_needs_no_calibration_agrees_with_any(steps: list[dict[str, Any]]):
    assert resolved(*steps).cut.schemes == {"experts": "W4A16"}


def dense_between() -> Any:
    """Six blocks of a Qwen, dense in the middle: runs of mixtures are two or three blocks long."""
    return qwen(blocks=6, dense=(2,))


def refused(steps: list[Any], family: Any = mixtral, profile: Profile = "custom", **serving: int) -> RequestError:
    with pytest.raises(RequestError) as refusal:
        resolve(Recipe(steps=tuple(steps)), Serving(**serving), inventory_of(family), profile=profile)
    return refusal.value


def test_layers_that_differ_need_the_custom_profile():
    for step, place in (
        (ExpertDrop(scope="global", experts_kept=4), "/scope"),
        (LayerDrop(layers_dropped=1), ""),
        (ExpertSkip(), ""),
    ):
        error = refused([step], profile="portable")

        assert isinstance(error, NotLoadableInProfile)
        assert error.pointer == f"/recipe/steps/0{place}"
        assert 'profile "custom"' in error.message


def test_stock_classes_that_list_dense_blocks_are_told_of_dropped_layers():
    cut = resolve(Recipe(steps=(LayerDrop(layers_dropped=1),)), Serving(), inventory_of(qwen)).cut

    assert cut.layers_dropped == 1
    assert cut.zero_dense_width == inventory_of(qwen).config["intermediate_size"]  # that of the dense block it has


def test_at_least_one_moe_layer_stays():
    error = refused([BlockDrop(blocks_dropped=1), LayerDrop(layers_dropped=3)])

    assert isinstance(error, ImpossibleStep)
    assert error.pointer == "/recipe/steps/1/layers_dropped"
    assert "at most 2" in error.message


def test_blocks_are_chosen_from_those_that_still_have_their_layer():
    error = refused([LayerDrop(layers_dropped=2), BlockDrop(blocks_dropped=2)])

    assert error.pointer == "/recipe/steps/1/blocks_dropped"
    assert "2 blocks that it chooses from" in error.message


def test_a_span_longer_than_what_is_sure_to_be_left_is_refused():
    resolve(Recipe(steps=(BlockDrop(blocks_dropped=3, selection="consecutive"),)), Serving(), inventory_of())

    error = refused(
        [BlockDrop(blocks_dropped=1), BlockDrop(blocks_dropped=2, selection="consecutive"), BlockDrop(blocks_dropped=1)]
    )
    assert error.pointer == "/recipe/steps/2/blocks_dropped"
    error = refused([LayerDrop(layers_dropped=1), BlockDrop(blocks_dropped=3, selection="consecutive")], family=dense_between)
    assert isinstance(error, ImpossibleStep)
    assert "in a row" in error.message


def test_a_global_budget_is_counted_over_what_is_left_and_spent_last():
    steps = (ExpertDrop(scope="global", experts_kept=3), LayerDrop(layers_dropped=1), BlockDrop(blocks_dropped=1))

    resolved = resolve(Recipe(steps=steps), Serving(), inventory_of(), profile="custom")

    assert [step.step for step in resolved.steps] == ["layer_drop", "block_drop", "expert_drop"]
    assert resolved.cut.experts_dropped == 2 * (inventory_of().experts - 3)


def test_two_budgets_add_up():
    halves = (ExpertDrop(scope="global", fraction_dropped=0.5), ExpertDrop(scope="global", fraction_dropped=0.5))
    whole, layers = inventory_of().experts, len(inventory_of().blocks)

    cut = resolve(Recipe(steps=halves), Serving(), inventory_of(), profile="custom").cut

    assert cut.experts_dropped == layers * whole * 3 // 4


def test_a_budget_that_leaves_nobody_or_more_than_there_are_is_refused():
    more = refused([ExpertDrop(experts_kept=3), ExpertDrop(scope="global", experts_kept=4)])
    nobody = refused([ExpertDrop(scope="global", fraction_dropped=0.999)])

    assert more.pointer == "/recipe/steps/1/experts_kept"
    assert "3.00 are left" in more.message
    assert "at least 1 must stay" in nobody.message


def test_layers_that_differ_cannot_be_spread_over_devices():
    error = refused([ExpertDrop(scope="global", experts_kept=3)], expert_parallel=2)

    assert isinstance(error, NotLoadableInProfile)
    assert error.pointer == "/serving/expert_parallel"


def test_a_merge_is_bound_like_a_drop():
    assert resolve(Recipe(steps=(ExpertMerge(experts_kept=3),)), Serving(), inventory_of()).cut.experts_kept == 3

    error = refused([ExpertMerge(experts_kept=1)])
    assert error.message.startswith("expert_merge would keep 1 experts")
    assert "expert_merge cannot keep 5 experts" in refused([ExpertMerge(experts_kept=5)], family=deepseek).message


def test_a_seed_that_nothing_draws_with_is_a_misunderstanding():
    with pytest.raises(ValueError, match="draws no lots"):
        ExpertDrop(criterion="reap", experts_kept=2, seed=3)


def test_a_layer_that_goes_cuts_a_span_in_two():
    steps = [LayerDrop(layers_dropped=1), BlockDrop(blocks_dropped=5, selection="consecutive")]

    error = refused(steps, family=lambda: mixtral(blocks=8))

    assert "be sure of 5 blocks in a row: 4 alike" in error.message  # the fourth of eight may be the one that lost its layer


def test_a_budget_by_reconstruction_keeps_what_the_router_needs():
    error = refused([ExpertDrop(scope="global", criterion="reconstruction", experts_kept=1)])

    assert "must stay" in error.message


def test_a_router_that_chooses_one_expert_has_none_to_skip():
    error = refused([ExpertSkip()], family=lambda: mixtral(top_k=1))

    assert isinstance(error, ImpossibleStep)
