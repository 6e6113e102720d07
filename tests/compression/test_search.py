from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise
from math import inf
from typing import Any

import pytest

from compression.plan import bytes_with_serving
from compression.planner.inventory import Inventory, take_inventory
from compression.planner.levers import levers_of
from compression.planner.options import Selection
from compression.planner.prices import Drop, Prices, Setting
from compression.planner.prior import usual_prices
from compression.planner.program import CLOSE, GAP
from compression.planner.resolve import resolve
from compression.planner.search import NEAR_NATS, NEAR_SHARE, Search
from compression.recipe import BlockDrop, ExpertDrop, LayerDrop, Profile, Quantize, Recipe
from compression.request import Serving
from tests.compression.made_checkpoints import checkpoint, deepseek, gpt_oss, mixtral, qwen
from tests.compression.made_prices import made_prices, pair

MIXTRAL = take_inventory(checkpoint(*mixtral(blocks=8, hidden=256, width=384, kv=128)))
QWEN = take_inventory(checkpoint(*qwen(blocks=6)))
MODELS: dict[str, Inventory] = {
    "mixtral": MIXTRAL,
    "qwen": QWEN,
    "deepseek": take_inventory(checkpoint(*deepseek(blocks=6))),
    "gpt_oss": take_inventory(checkpoint(*gpt_oss(blocks=6))),
}
every_search = pytest.mark.parametrize(
    ("model", "profile"), [(model, profile) for model in MODELS for profile in ("portable", "custom")]
)


def search_of(inventory: Inventory, profile: Profile, prices: Prices | None = None, serving: Serving | None = None) -> Search:
    prices = made_prices(inventory, levers_of(inventory), seed=1) if prices is None else prices
    return Search(inventory, serving or Serving(), profile, prices)


@cache
def search_in(model: str, profile: Profile) -> Search:
    return search_of(MODELS[model], profile)


@cache
def frontier_of(model: str, profile: Profile) -> list[Selection]:
    return search_in(model, profile).frontier()


def targets(inventory: Inventory) -> list[int]:
    return [round(share * inventory.bytes) for share in (0.9, 0.55, 0.35, 0.27, 0.23, 0.2, 0.17, 0.14)]


@every_search
def test_no_plan_is_over_its_target(model: str, profile: Profile):
    search = search_in(model, profile)
    smallest = search.smallest()
    for target in [*targets(MODELS[model]), smallest.bytes]:
        found = search.best(target)
        assert (found is None) == (target < smallest.bytes)
        assert found is None or found.bytes <= target

    assert search.best(smallest.bytes - 1) is None


@every_search
def test_programs_solved_by_their_bounds_find_what_all_of_them_find(model: str, profile: Profile):
    search = search_in(model, profile)
    for target in targets(MODELS[model])[1::2]:
        room = target - search._options.fixed
        solved = [program.solve(room) for program in search._programs.values()]
        found = search._cheapest(target, inf, ())
        least = min((solution.price for solution in solved if solution is not None), default=None)
        assert (found is None) == (least is None)
        assert found is None or least is None or found[1].price <= least * (1 + max(GAP, CLOSE))


def test_few_programs_are_solved(monkeypatch: pytest.MonkeyPatch):
    search = search_of(MIXTRAL, "portable")
    solved = 0
    for program in search._programs.values():
        original = program.solve

        def counted(*arguments: Any, original: Any = original, **settings: Any) -> Any:
            nonlocal solved
            solved += 1
            return original(*arguments, **settings)

        monkeypatch.setattr(program, "solve", counted)
    search.best(round(0.2 * MIXTRAL.bytes))

    assert len(search._programs) > 30
    assert solved <= 4


@pytest.mark.parametrize("profile", ["portable", "custom"])
def test_a_target_that_the_original_meets_leaves_it_untouched(profile: Profile):
    priced = made_prices(MIXTRAL, levers_of(MIXTRAL))
    nothing = {"price": Setting(whole=0.0, errors={})}
    free = priced.model_copy(
        update={
            "schemes": tuple(scheme.model_copy(update=nothing) for scheme in priced.schemes),
            "counts": tuple(count.model_copy(update=nothing) for count in priced.counts),
        }
    )
    search = search_of(MIXTRAL, profile, free)

    for plan in (search.best(MIXTRAL.bytes), *search.rivals(MIXTRAL.bytes)):
        assert plan is not None
        assert search.steps_of(plan) == ()
        assert (plan.bytes, plan.loss, plan.drops) == (MIXTRAL.bytes, 0.0, ())


@every_search
def test_the_frontier_falls_from_the_smallest_to_the_untouched(model: str, profile: Profile):
    search = search_in(model, profile)
    frontier = frontier_of(model, profile)

    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in pairwise(frontier))
    assert frontier[0] == search.smallest()
    assert frontier[-1].bytes == MODELS[model].bytes
    assert 12 <= len(frontier) <= 16


def test_a_frontier_with_fewer_points_has_all_plans_that_there_are():
    inventory = take_inventory(checkpoint(*gpt_oss(blocks=2)))
    only = usual_prices(inventory, levers_of(inventory)).model_copy(update={"drops": ()})
    frontier = search_of(inventory, "portable", only).frontier()

    assert [plan.options[0].experts_kept for plan in frontier] == [2, 3, 4, 5, 6, 7, 8]


def test_the_steps_of_a_portable_plan_say_what_most_blocks_do_and_the_exceptions():
    search = search_in("qwen", "portable")
    for plan in frontier_of("qwen", "portable"):
        steps = {type(step): step for step in search.steps_of(plan)}
        drops = {kind: tuple(d.block for d in plan.drops if d.kind == kind) for kind in ("block", "layer")}
        blocks, layers = steps.get(BlockDrop), steps.get(LayerDrop)
        assert (blocks.blocks if isinstance(blocks, BlockDrop) else ()) == drops["block"]
        assert (layers.blocks if isinstance(layers, LayerDrop) else ()) == drops["layer"]
        quantize = steps.get(Quantize)
        for option in plan.options:
            if isinstance(quantize, Quantize):
                own = quantize.by_block.get(option.block)
                assert option.attention in (None, (own and own.attention) or quantize.attention)
                assert option.experts in (None, quantize.scheme)
                shared = (own and own.shared_experts) or quantize.shared_experts
                dense = (own and own.dense) or quantize.dense
                is_shared = option.action == "keep" and QWEN.blocks[option.block].is_mixture
                assert option.others in (None, shared if is_shared else dense)
            else:
                assert {option.experts, option.attention, option.others} <= {None, "keep"}


def test_the_steps_of_a_custom_plan_name_what_each_block_keeps():
    search = search_in("mixtral", "custom")
    seen = False
    for plan in frontier_of("mixtral", "custom"):
        steps = {type(step): step for step in search.steps_of(plan)}
        drop, quantize = steps.get(ExpertDrop), steps.get(Quantize)
        for option in plan.options:
            if option.action != "keep":
                continue
            count = drop.experts_kept_in.get(option.block, drop.experts_kept) if isinstance(drop, ExpertDrop) else 8
            assert option.experts_kept == count
            if isinstance(quantize, Quantize):
                own = quantize.by_block.get(option.block)
                assert option.experts == ((own and own.experts) or quantize.scheme)
        seen = seen or (isinstance(drop, ExpertDrop) and bool(drop.experts_kept_in))

    assert seen


@every_search
def test_every_plan_is_a_recipe(model: str, profile: Profile):
    search = search_in(model, profile)
    for plan in frontier_of(model, profile):
        if steps := search.steps_of(plan):
            assert Recipe(steps=steps).in_normal_form().steps == steps
        criteria = [step.criterion for step in steps if isinstance(step, ExpertDrop)]
        assert criteria == ([plan.criterion] if plan.criterion is not None else [])


@every_search
def test_bytes_are_those_of_the_plan_that_the_steps_resolve_to(model: str, profile: Profile):
    inventory, serving = MODELS[model], Serving(context_tokens=1000, batch_size=2, overhead=77)
    search = search_of(inventory, profile, serving=serving)
    differing = 0
    for plan in search.frontier():
        if steps := search.steps_of(plan):
            cut = resolve(Recipe(steps=steps), serving, inventory, profile=profile).cut
            assert plan.bytes == bytes_with_serving(inventory, cut, serving)
            differing += bool(cut.kept_in or cut.schemes_in)

    assert differing or model == "gpt_oss"


@every_search
def test_rivals_are_near_the_best_and_differ_in_kind(model: str, profile: Profile):
    inventory = MODELS[model]
    search = search_in(model, profile)
    for target in targets(inventory)[3::2]:
        best = search.best(target)
        if best is None:
            continue
        rivals = search.rivals(target)
        assert rivals[0].loss == pytest.approx(best.loss, rel=CLOSE)
        assert all(plan.bytes <= target for plan in rivals)
        assert len(rivals) <= 6
        for one, other in combinations(rivals, 2):
            kept = sum(option.experts_kept is not None for option in one.options)
            assert one.drops != other.drops or _apart(one, other) >= max(1, kept // 4)
        if not best.drops:
            limit = max(NEAR_SHARE * best.loss, best.loss + NEAR_NATS)
            assert all(plan.loss <= limit * (1 + CLOSE) for plan in rivals)


def _apart(one: Selection, other: Selection) -> int:
    return sum(a.kind != b.kind for a, b in zip(one.options, other.options, strict=True))


def test_rivals_of_a_portable_plan_are_every_count_and_scheme_near_it():
    search = search_of(MIXTRAL, "portable")
    target = round(0.27 * MIXTRAL.bytes)
    rivals = search.rivals(target, most=50)
    limit = max(NEAR_SHARE * rivals[0].loss, rivals[0].loss + NEAR_NATS)
    near = set[tuple[int | None, str | None]]()
    for common, program in search._programs.items():
        solution = program.solve(target - search._options.fixed)
        if solution is not None and solution.price < limit:
            near.add((common.experts_kept, common.scheme))

    assert {(plan.options[0].experts_kept, plan.options[0].experts) for plan in rivals} == near


def test_two_blocks_that_replace_each_other_are_not_both_dropped():
    levers = levers_of(MIXTRAL)
    usual = usual_prices(MIXTRAL, levers)
    twins = (Drop("layer", 3), Drop("layer", 4))
    drops = [p.model_copy(update={"loss": 0.001 if p.drop in twins else p.loss}) for p in usual.drops]
    blind = usual.model_copy(update={"drops": tuple(drops), "pairs": (pair(*twins, 0.002),)})
    seen = usual.model_copy(update={"drops": tuple(drops), "pairs": (pair(*twins, 2.0),)})
    target = round(0.2 * MIXTRAL.bytes)

    naive = search_of(MIXTRAL, "custom", blind).best(target)
    wise = search_of(MIXTRAL, "custom", seen).best(target)

    assert naive is not None
    assert wise is not None
    assert set(twins) <= set(naive.drops)
    assert len(set(twins) & set(wise.drops)) == 1


def test_a_block_goes_for_the_sake_of_its_cache():
    long = Serving(context_tokens=2**20, batch_size=64)
    usual = usual_prices(MIXTRAL, levers_of(MIXTRAL))
    search = search_of(MIXTRAL, "custom", usual, long)
    untouched = search.frontier(2)[-1]

    found = search.best(round(untouched.bytes * 0.7))

    assert found is not None
    assert {drop.kind for drop in found.drops} == {"block"}


def test_a_loss_is_of_prices_and_pairs_and_rounding_is_dearer():
    for plan in frontier_of("mixtral", "portable"):
        assert plan.loss >= sum(option.cost for option in plan.options) - 1e-12
        quantized = any(option.experts == "W4A16" for option in plan.options)
        assert plan.rounded_loss >= plan.loss
        assert not quantized or plan.rounded_loss > plan.loss


def test_the_same_question_has_the_same_answer():
    target = round(0.2 * MIXTRAL.bytes)

    assert search_of(MIXTRAL, "custom").best(target) == search_of(MIXTRAL, "custom").best(target)
