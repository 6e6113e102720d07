"""Settings that name blocks: exact to the byte, and refused where a block cannot have them or a choice would change bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compression.errors import ImpossibleStep, NotLoadableInProfile, RequestError
from compression.planner.inventory import Inventory, take_inventory
from compression.planner.sizes import Cut, artifact_sizes, kv_cache_bytes
from compression.recipe import Profile
from compression.request import Serving
from tests.compression.made_checkpoints import checkpoint, deepseek, mixtral, qwen
from tests.compression.test_resolve import drop, inventory_of, quantize, resolved

MIXTRAL = inventory_of(mixtral, blocks=4)
QWEN = inventory_of(qwen, blocks=6)
DEEPSEEK = take_inventory(checkpoint(*deepseek(blocks=6)))


def blocks(*named: int, **settings: Any) -> dict[str, Any]:
    return {"step": "block_drop", "blocks": list(named), **settings}


def layers(*named: int) -> dict[str, Any]:
    return {"step": "layer_drop", "blocks": list(named)}


@pytest.mark.parametrize("inventory", [MIXTRAL, QWEN, DEEPSEEK])
@pytest.mark.parametrize("profile", ["portable", "custom"])
def test_named_blocks_take_as_many_bytes_as_counted_ones(inventory: Inventory, profile: Profile):
    first, second = inventory.droppable[-2:]
    serving = Serving(context_tokens=100)
    named, counted = (
        resolved(step, quantize(attention="W8A16"), inventory=inventory, profile=profile, context_tokens=100)
        for step in (blocks(first, second), {"step": "block_drop", "blocks_dropped": 2})
    )

    assert artifact_sizes(inventory, named.cut).total == artifact_sizes(inventory, counted.cut).total
    assert kv_cache_bytes(inventory, named.cut, serving) == kv_cache_bytes(inventory, counted.cut, serving)


def test_a_named_layer_takes_as_many_bytes_as_a_counted_one():
    named = resolved(layers(2), quantize(), inventory=MIXTRAL, profile="custom")
    counted = resolved({"step": "layer_drop", "layers_dropped": 1}, quantize(), inventory=MIXTRAL, profile="custom")

    assert artifact_sizes(MIXTRAL, named.cut).total == artifact_sizes(MIXTRAL, counted.cut).total


def test_settings_by_block_add_up_block_by_block():
    schemes = {"1": {"experts": "W8A16", "attention": "W3A16"}, "2": {"experts": "keep"}}
    mixed = resolved(
        drop(experts_kept=6, experts_kept_in={"0": 4}), quantize(by_block=schemes), inventory=MIXTRAL, profile="custom"
    ).cut
    alone = [
        replace(mixed, kept_in={}, schemes_in={}, experts_kept=kept, schemes=dict(found))
        for kept, found in [
            (4, {"experts": "W4A16"}),
            (6, {"experts": "W8A16", "attention": "W3A16"}),
            (6, {}),
            (6, {"experts": "W4A16"}),
        ]
    ]

    sizes = artifact_sizes(MIXTRAL, mixed)

    assert list(sizes.blocks) == [artifact_sizes(MIXTRAL, cut).blocks[block] for block, cut in enumerate(alone)]
    assert sizes.total == sum(sizes.blocks) + artifact_sizes(MIXTRAL, Cut(8)).total - sum(artifact_sizes(MIXTRAL, Cut(8)).blocks)


def test_naming_what_is_true_everywhere_changes_nothing():
    plain = resolved(drop(experts_kept=6), quantize(attention="W8A16"), inventory=MIXTRAL)
    same = {str(block): {"experts": "W4A16", "attention": "W8A16"} for block in range(4)}
    named = resolved(
        drop(experts_kept=6, experts_kept_in={"1": 6}), quantize(attention="W8A16", by_block=same), inventory=MIXTRAL
    )

    assert named.cut == plain.cut


Refused = tuple[type[RequestError], str, tuple[dict[str, Any], ...], Inventory, Profile]
REFUSED: dict[str, Refused] = {
    "a block that is not there": (ImpossibleStep, "/recipe/steps/0/blocks/1", (blocks(1, 9),), MIXTRAL, "portable"),
    "a dense block": (ImpossibleStep, "/recipe/steps/0/blocks/0", (layers(0),), DEEPSEEK, "custom"),
    "a block twice": (ImpossibleStep, "/recipe/steps/1/blocks/0", (blocks(1), layers(1)), MIXTRAL, "custom"),
    "every block": (ImpossibleStep, "/recipe/steps/0/blocks_dropped", (blocks(0, 1, 2, 3),), MIXTRAL, "portable"),
    "blocks that are selected too": (
        ImpossibleStep, "/recipe/steps/0", (blocks(1, selection="consecutive"),), MIXTRAL, "portable",
    ),
    "a name after a count": (
        ImpossibleStep, "/recipe/steps/1/blocks", ({"step": "block_drop", "blocks_dropped": 1}, blocks(2)), MIXTRAL, "portable",
    ),
    "a count beside schemes by block": (
        ImpossibleStep, "/recipe/steps/0",
        ({"step": "block_drop", "blocks_dropped": 1}, quantize(by_block={"1": {"attention": "W8A16"}})), MIXTRAL, "portable",
    ),
    "one budget beside counts by block": (
        ImpossibleStep, "/recipe/steps/1/scope",
        (drop(experts_kept=6, experts_kept_in={"0": 4}), drop(scope="global", fraction_dropped=0.1)), MIXTRAL, "custom",
    ),
    "one budget beside schemes of experts by block": (
        ImpossibleStep, "/recipe/steps/0/scope",
        (drop(scope="global", fraction_dropped=0.1), quantize(by_block={"1": {"experts": "W8A16"}})), MIXTRAL, "custom",
    ),
    "counts that stock classes cannot read": (
        NotLoadableInProfile, "/recipe/steps/0/experts_kept_in/0",
        (drop(experts_kept=6, experts_kept_in={"0": 4}),), MIXTRAL, "portable",
    ),
    "a count below what the router uses": (
        ImpossibleStep, "/recipe/steps/0/experts_kept_in/0", (drop(experts_kept=6, experts_kept_in={"0": 1}),), MIXTRAL, "custom",
    ),
    "experts of a dense block": (
        ImpossibleStep, "/recipe/steps/0/experts_kept_in/0",
        (drop(experts_kept=8, experts_kept_in={"0": 4}),), DEEPSEEK, "custom",
    ),
    "counts by block twice": (
        ImpossibleStep, "/recipe/steps/1",
        (drop(experts_kept=6, experts_kept_in={"0": 4}), drop(experts_kept=4)), MIXTRAL, "custom",
    ),
    "schemes of experts that stock classes cannot read": (
        NotLoadableInProfile, "/recipe/steps/0/by_block/1/experts",
        (quantize(by_block={"1": {"experts": "W8A16"}}),), MIXTRAL, "portable",
    ),
    "bits that engines cannot read": (
        NotLoadableInProfile, "/recipe/steps/0/by_block/1/attention",
        (quantize(by_block={"1": {"attention": "W3A16"}}),), MIXTRAL, "portable",
    ),
    "floats beside integers": (
        ImpossibleStep, "/recipe/steps/0/by_block/1/experts",
        (quantize(by_block={"1": {"experts": "FP8_DYNAMIC"}}),), MIXTRAL, "custom",
    ),
    "a scheme for what a block lacks": (
        ImpossibleStep, "/recipe/steps/0/by_block/0/experts",
        (quantize(by_block={"0": {"experts": "W8A16"}}),), DEEPSEEK, "custom",
    ),
    "a scheme for a block that is gone": (
        ImpossibleStep, "/recipe/steps/1/by_block/1",
        (blocks(1), quantize(by_block={"1": {"attention": "W8A16"}})), MIXTRAL, "portable",
    ),
    "experts of a layer that is gone": (
        ImpossibleStep, "/recipe/steps/1/by_block/1/experts",
        (layers(1), quantize(by_block={"1": {"experts": "W8A16"}})), MIXTRAL, "custom",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_no_block_can_have_is_refused_with_its_place(why: str):
    error, pointer, steps, inventory, profile = REFUSED[why]

    with pytest.raises(error) as refusal:
        resolved(*steps, inventory=inventory, profile=profile)

    assert refusal.value.pointer == pointer


def test_stock_classes_that_count_dense_blocks_lose_the_first_layers_alone():
    first, second, *_ = DEEPSEEK.droppable

    assert resolved(layers(first), layers(second), inventory=DEEPSEEK).cut.named_layers == {first, second}
    with pytest.raises(NotLoadableInProfile) as refusal:
        resolved(layers(second), inventory=DEEPSEEK)
    assert refusal.value.pointer == "/recipe/steps/0/blocks"
    assert resolved(layers(second), inventory=DEEPSEEK, profile="custom").cut.named_layers == {second}


def test_a_count_by_block_must_spread_over_the_devices():
    with pytest.raises(NotLoadableInProfile) as refusal:
        resolved(drop(experts_kept=8, experts_kept_in={"0": 6}), inventory=MIXTRAL, profile="custom", expert_parallel=4)

    assert refusal.value.pointer == "/recipe/steps/0/experts_kept_in/0"
