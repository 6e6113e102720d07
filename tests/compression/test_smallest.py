from __future__ import annotations

from typing import Any

import pytest

from compression.planner.inventory import Inventory, take_inventory
from compression.planner.resolve import resolve
from compression.planner.sizes import Cut, artifact_sizes
from compression.planner.smallest import smallest_cut
from compression.planner.trims import workable_counts
from compression.recipe import BlockDrop, ExpertDrop, Pattern, Profile, Prune, Quantize, Recipe
from compression.request import Serving
from tests.compression.made_checkpoints import checkpoint, deepseek, gpt_oss, mixtral, qwen

SCHEMES: dict[Profile, tuple[Any, ...]] = {
    "portable": ("W8A16", "W4A16", "FP8_DYNAMIC"),
    "custom": ("W8A16", "W4A16", "W3A16", "W2A16", "FP8_DYNAMIC"),
}


def inventory_of(family: Any = mixtral, **shape: Any) -> Inventory:
    return take_inventory(checkpoint(*family(**shape)))


def slimming_steps(family: Any, profile: Profile) -> list[list[Any]]:
    prunes = [[Prune(pattern=text, shared_experts=shared)] for text in ("1:2", "2:4", "1:32", "1:64") for shared in (True, False)]
    quantizes = [
        [Quantize(scheme=experts, attention=others, shared_experts=others, dense=others, group_size=-1)]
        for experts in SCHEMES[profile]
        for others in (*SCHEMES[profile], "keep")
    ]
    return [[], *prunes, *([] if family is gpt_oss else quantizes)]


@pytest.mark.parametrize("profile", ["portable", "custom"])
@pytest.mark.parametrize("family", [mixtral, qwen, deepseek, gpt_oss])
def test_no_recipe_goes_below_the_smallest_cut(family: Any, profile: Profile):
    inventory = inventory_of(family)
    smallest = artifact_sizes(inventory, smallest_cut(inventory, Serving(), profile)).total

    for kept in workable_counts(inventory):
        for dropped in {0, len(inventory.droppable) - 1}:
            for slimming in slimming_steps(family, profile):
                steps = [ExpertDrop(experts_kept=kept), *([BlockDrop(blocks_dropped=dropped)] if dropped else []), *slimming]
                cut = resolve(Recipe(steps=tuple(steps)), Serving(), inventory, profile=profile).cut
                assert artifact_sizes(inventory, cut).total >= smallest


@pytest.mark.parametrize("family", [mixtral, qwen, gpt_oss])
def test_one_budget_reaches_down_to_the_smallest_cut_and_not_below(family: Any):
    inventory = inventory_of(family)
    smallest = smallest_cut(inventory, Serving(), "custom")
    mixtures = sum(block.is_mixture for block in inventory.blocks) - smallest.blocks_dropped

    steps = (
        BlockDrop(blocks_dropped=smallest.blocks_dropped),
        ExpertDrop(scope="global", fraction_dropped=1 - 1 / (mixtures * inventory.experts)),
    )
    cut = resolve(Recipe(steps=steps), Serving(), inventory, profile="custom").cut

    left = {cut.experts_kept * mixtures - cut.experts_dropped, smallest.experts_kept * mixtures - smallest.experts_dropped}
    assert left == {1}
    assert artifact_sizes(inventory, cut).components == artifact_sizes(inventory, smallest.dense()).components


def test_the_smallest_cut_is_one_that_a_recipe_can_ask_for():
    inventory = inventory_of(deepseek)

    assert smallest_cut(inventory, Serving()) == Cut(
        8, 2, {"experts": "W4A16", "attention": "W4A16", "shared_experts": "W4A16", "dense": "W4A16"}, -1
    )
    assert smallest_cut(inventory, Serving(expert_parallel=3)).experts_kept == 12
    assert smallest_cut(inventory_of(gpt_oss), Serving(), "custom") == Cut(2, 3, experts_dropped=1)


def test_the_custom_profile_reaches_two_bits():
    whole = inventory_of(hidden=256, width=256, kv=256)

    assert smallest_cut(whole, Serving(), "custom").schemes == {"experts": "W2A16", "attention": "W2A16"}


def test_where_experts_are_nearly_all_of_a_model_one_weight_in_64_undercuts_two_bits():
    # Per weight: 16/64 bits and one for the mask against two; the attention stays whole for it.
    inventory = inventory_of(experts=64, hidden=64, width=1024, kv=8, top_k=8)

    assert smallest_cut(inventory, Serving(), "custom") == Cut(
        8, 3, pattern=Pattern(1, 64), pruned=frozenset({"experts"}), experts_dropped=7
    )


def test_matrices_too_tiny_to_shrink_stay_whole_in_the_smallest_cut():
    # A row of 2 inputs takes 4 bytes in bf16 and as many as floats with their scale; packed it takes 4 + 2.
    tiny = inventory_of(hidden=2, width=2, kv=2)

    assert smallest_cut(tiny, Serving()).schemes == {}


def test_every_component_takes_the_scheme_that_makes_it_smallest():
    # Rows of 4 inputs take 4 + 2 bytes either way, but only the packed ones 16 more for the shape; rows of 512 gain from bits.
    inventory = inventory_of(hidden=4, width=512, kv=4)

    assert smallest_cut(inventory, Serving()).schemes == {"experts": "W4A16", "attention": "FP8_DYNAMIC"}
