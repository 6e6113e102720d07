from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from compression.planner.inventory import Inventory, take_inventory
from compression.planner.levers import COMPONENTS_OF, levers_of
from compression.planner.options import Common, Option, Options, Selection
from compression.planner.prices import LEVERS, Prices
from compression.planner.prior import usual_prices
from compression.planner.resolve import resolve
from compression.planner.sizes import Cut, artifact_sizes, block_cache, kv_cache_bytes, moe_layer_bytes, planned_tensors
from compression.planner.steps import steps_of
from compression.recipe import Profile, Recipe
from compression.request import Serving
from compression.trimming.dense_layers import zero_dense_width
from tests.compression.made_checkpoints import checkpoint, deepseek, gpt_oss, mixtral, qwen
from tests.compression.made_prices import made_prices

FAMILIES: dict[str, Any] = {
    "mixtral": (mixtral, {}),
    "qwen": (qwen, {}),
    "qwen without dense blocks": (qwen, {"dense": ()}),
    "deepseek": (deepseek, {}),
    "gpt_oss": (gpt_oss, {}),
}
SERVED = Serving(context_tokens=100, batch_size=3, overhead=1234)
PROFILES: tuple[Profile, ...] = ("portable", "custom")
every_model = pytest.mark.parametrize(("family", "profile"), list(product(FAMILIES, PROFILES)))


def inventory_of(family: str) -> Inventory:
    make, shape = FAMILIES[family]
    return take_inventory(checkpoint(*make(**shape)))


def options_of(family: str, profile: Profile, serving: Serving = SERVED, *, uneven: bool = False) -> Options:
    inventory = inventory_of(family)
    levers = levers_of(inventory)
    prices = made_prices(inventory, levers, seed=3) if uneven else usual_prices(inventory, levers)
    return Options(inventory, serving, profile, prices)


def selected(options: Options, common: Common, chosen: list[Option]) -> Selection:
    total = options.fixed + sum(option.bytes for option in chosen)
    return Selection(tuple(chosen), common.criterion, total, 0.0, 0.0)


def uniform(options: Options, common: Common) -> list[list[Option]]:
    """Every choice of options that does the same to each block, and some of them with drops."""
    menus = options.of(common)
    found: list[list[Option]] = []
    kinds = {(o.experts_kept, o.experts, o.attention, o.others) for menu in menus for o in menu if o.action == "keep"}
    for kept, experts, attention, others in kinds:
        wanted = {
            "experts_kept": (kept, None),
            "experts": (experts, None),
            "attention": (attention, None),
            "others": (others, None),
        }
        chosen = [
            [o for o in menu if o.action == "keep" and all(getattr(o, name) in values for name, values in wanted.items())]
            for menu in menus
        ]
        if not all(chosen) or kept is None or (experts == "keep" and {attention, others} - {None, "keep"}):
            continue
        whole = [menu[0] for menu in chosen]
        found.append(whole)
        for drop in ("drop_block", "drop_layer"):
            goes = [
                (block, option)
                for block, menu in enumerate(menus)
                for option in menu
                if option.action == drop and option.attention in (None, attention)
                if option.others in (None, whole[0].others)
            ][:1]
            found += [[*whole[:block], option, *whole[block + 1 :]] for block, option in goes]
    return found


@every_model
def test_bytes_are_those_of_the_plan_that_the_steps_resolve_to(family: str, profile: Profile):
    options = options_of(family, profile)
    compared = 0
    for common in options.commons():
        for chosen in uniform(options, common):
            selection = selected(options, common, chosen)
            steps = steps_of(selection, options.inventory, options.levers)
            if not steps:
                assert selection.bytes == options.untouched.bytes
                continue
            cut = resolve(Recipe(steps=steps), SERVED, options.inventory, profile=profile).cut
            lost = [block for block, option in enumerate(chosen) if option.action == "drop_block"]
            served = kv_cache_bytes(options.inventory, Cut(cut.experts_kept), SERVED)
            served -= sum(3 * block_cache(options.inventory, options.inventory.blocks[block], 100) for block in lost)
            assert selection.bytes == artifact_sizes(options.inventory, cut).total + served + 1234
            compared += 1

    assert compared > 5


@every_model
def test_bytes_of_plans_that_differ_by_block_are_the_sum_over_the_tensors(family: str, profile: Profile):
    options = options_of(family, profile, uneven=True)
    inventory = options.inventory
    for common in options.commons():
        for menu, block in zip(options.of(common), inventory.blocks, strict=True):
            for option in menu:
                cache = 3 * block_cache(inventory, block, 100)
                cut = cut_of(option, options, profile)
                tensors = sum(tensor.bytes for tensor in planned_tensors(inventory, cut, block))
                if option.action == "drop_layer":
                    tensors -= sum(moe_layer_bytes(inventory, cut).values())
                assert option.bytes == (0 if option.action == "drop_block" else tensors + cache)


def cut_of(option: Option, options: Options, profile: Profile) -> Cut:
    inventory, levers = options.inventory, options.levers
    schemes: dict[Any, str] = {}
    for lever in LEVERS:
        scheme = getattr(option, lever)
        if scheme not in (None, "keep"):
            schemes |= dict.fromkeys(set(COMPONENTS_OF[lever]) & set(levers.components[lever]), scheme)
    width = None
    if profile == "portable" and option.action == "drop_layer":
        width = zero_dense_width(inventory.architecture, inventory.config, range(len(inventory.blocks)))
    return Cut(option.experts_kept or 1, schemes=schemes, group_size=levers.group_size, zero_dense_width=width)


def test_the_untouched_model_is_the_original_with_its_cache():
    options = options_of("mixtral", "portable")

    assert options.untouched.bytes == options.inventory.bytes + kv_cache_bytes(options.inventory, Cut(8), SERVED) + 1234
    assert steps_of(options.untouched, options.inventory, options.levers) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_portable_profile_all_experts_have_one_count_and_one_scheme(family: str):
    options = options_of(family, "portable", uneven=True)
    for common in options.commons():
        kept = [o for menu in options.of(common) for o in menu if o.experts_kept is not None]
        assert {(o.experts_kept, o.experts or "keep") for o in kept} == {(common.experts_kept, common.scheme)}


@pytest.mark.parametrize("family", FAMILIES)
def test_where_experts_keep_all_their_bits_so_does_all_else(family: str):
    for profile in PROFILES:
        options = options_of(family, profile, uneven=True)
        for common in options.commons():
            if common.scheme == "keep":
                found = {s for menu in options.of(common) for o in menu for s in (o.experts, o.attention, o.others)}
                assert found <= {None, "keep"}


def test_in_the_custom_profile_blocks_choose_for_themselves():
    options = options_of("mixtral", "custom", uneven=True)
    menus = options.of(Common(options.prices.criteria[0], None, None))

    for menu in menus:
        assert len({o.experts_kept for o in menu}) > 3
        assert len({o.experts for o in menu}) > 2
        assert {o.action for o in menu} == {"keep", "drop_block", "drop_layer"}


@every_model
def test_no_option_is_beaten_by_another_that_drops_the_same(family: str, profile: Profile):
    options = options_of(family, profile, uneven=True)
    for common in options.commons():
        for menu in options.of(common):
            for one, other in product(menu, menu):
                if one != other and other.drop in (None, one.drop):
                    assert not (other.bytes <= one.bytes and other.cost <= one.cost)


def test_a_drop_that_costs_nothing_pushes_nothing_else_out():
    options = options_of("mixtral", "portable")
    free = free_drops(options.prices)
    common = Common(None, 8, "W4A16")

    menus = Options(options.inventory, SERVED, "portable", free).of(common)

    kept = [[o for o in menu if o.drop is None] for menu in menus]
    assert kept == [[o for o in menu if o.drop is None] for menu in options.of(common)]


def free_drops(prices: Prices) -> Prices:
    return prices.model_copy(update={"drops": tuple(p.model_copy(update={"loss": 0.0}) for p in prices.drops)})


def test_what_was_not_priced_is_no_option():
    options = options_of("mixtral", "custom")
    prices = options.prices
    fewer = prices.model_copy(
        update={
            "drops": tuple(p for p in prices.drops if p.drop.kind == "block" and p.drop.block != 2),
            "schemes": tuple(s for s in prices.schemes if s.scheme != "W2A16"),
            "counts": tuple(c for c in prices.counts if c.experts_kept != 3),
        }
    )
    few = Options(options.inventory, SERVED, "custom", fewer)
    menu = few.of(Common(few.prices.criteria[0], None, None))[2]

    assert {o.action for o in menu} == {"keep"}
    assert 3 not in {o.experts_kept for o in menu}
    assert "W2A16" not in {scheme for o in menu for scheme in (o.experts, o.attention)}


def test_a_price_is_the_sum_of_its_settings():
    options = options_of("qwen", "custom", uneven=True)
    prices, criterion = options.prices, options.prices.criteria[0]
    for block, menu in enumerate(options.of(Common(criterion, None, None))):
        for option in menu:
            if option.action != "keep":
                continue
            schemes = [(lever, getattr(option, lever)) for lever in LEVERS if getattr(option, lever) not in (None, "keep")]
            lost = 0.0
            if option.experts_kept not in (None, 8):
                lost = prices.of_count(block, criterion, option.experts_kept)
            assert option.cost == pytest.approx(lost + sum(prices.of_scheme(block, *scheme) for scheme in schemes))
            rounded = sum(prices.of_scheme(block, *scheme, rounded=True) for scheme in schemes)
            assert option.rounded_cost == pytest.approx(lost + rounded)
