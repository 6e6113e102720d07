from __future__ import annotations

from typing import Any

import pytest

from compression.errors import ImpossibleStep, NotAvailable, NotLoadableInProfile, RequestError
from compression.planner.inventory import Inventory, take_inventory
from compression.planner.resolve import Resolved, resolve, smallest_cut, workable_counts
from compression.planner.sizes import Cut, artifact_sizes
from compression.recipe import BlockDrop, ExpertDrop, Prune, Quantize, Recipe, Serving
from tests.compression.made_checkpoints import checkpoint, deepseek, gpt_oss, mixtral, qwen


def inventory_of(family: Any = mixtral, **shape: Any) -> Inventory:
    return take_inventory(checkpoint(*family(**shape)))


def resolved(*steps: dict[str, Any], inventory: Inventory | None = None, **serving: Any) -> Resolved:
    recipe = Recipe.model_validate({"steps": list(steps)})
    return resolve(recipe, Serving(**serving), inventory or inventory_of())


def drop(**settings: Any) -> dict[str, Any]:
    return {"step": "expert_drop", **settings}


def quantize(**settings: Any) -> dict[str, Any]:
    return {"step": "quantize", **settings}


def refusal(*steps: dict[str, Any], inventory: Inventory | None = None, **serving: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolved(*steps, inventory=inventory, **serving)
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
        resolve(Recipe(steps=(Prune(sparsity=0.5),)), Serving(), inventory_of())


@pytest.mark.parametrize("family", [mixtral, qwen, deepseek, gpt_oss])
def test_no_recipe_goes_below_the_smallest_cut(family: Any):
    inventory = inventory_of(family)
    smallest = artifact_sizes(inventory, smallest_cut(inventory, Serving())).total
    schemes = ("keep",) if family is gpt_oss else ("keep", "W4A16", "W8A16")

    for kept in workable_counts(inventory):
        for dropped in range(len(inventory.droppable)):
            for scheme in schemes:
                steps: list[Any] = [ExpertDrop(experts_kept=kept)]
                steps += [BlockDrop(blocks_dropped=dropped)] if dropped else []
                if scheme != "keep":
                    steps.append(Quantize(scheme=scheme, attention=scheme, shared_experts=scheme, dense=scheme, group_size=-1))
                cut = resolve(Recipe(steps=tuple(steps)), Serving(), inventory).cut
                assert artifact_sizes(inventory, cut).total >= smallest


def test_the_smallest_cut_is_one_that_a_recipe_can_ask_for():
    inventory = inventory_of(deepseek)

    assert smallest_cut(inventory, Serving()) == Cut(
        8, 2, {"experts": "W4A16", "attention": "W4A16", "shared_experts": "W4A16", "dense": "W4A16"}, -1
    )
    assert smallest_cut(inventory, Serving(expert_parallel=3)).experts_kept == 12
    assert smallest_cut(inventory_of(gpt_oss), Serving()) == Cut(2, 3)


def test_matrices_too_tiny_to_shrink_stay_whole_in_the_smallest_cut():
    # A row of 4 inputs takes 8 bytes in bf16, and 4 + 2 packed; 16 more bytes for the shape outweigh a few rows.
    tiny = inventory_of(hidden=4, width=4, kv=4)

    assert smallest_cut(tiny, Serving()).schemes == {}


def test_four_bits_where_they_shrink_and_nothing_where_they_do_not():
    inventory = inventory_of(hidden=4, width=512, kv=4)

    assert smallest_cut(inventory, Serving()).schemes == {"experts": "W4A16"}
