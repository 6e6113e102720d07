"""What the benches of plans go by: plans evaluated many at a time, recipes tuned to a target, prices added up."""

from __future__ import annotations

import random
from argparse import Namespace

import pytest
import torch

import bench._planned
from bench._planned import Planned
from bench.auto_against_levers import LEVERS, tuned
from bench.predicted_loss import drawn, noised, predicted
from compression.auto import pricing_text
from compression.recipe import BlockDrop, ExpertDrop, Quantize
from compression.tryout import Trial

WORDS = ("one", "small", "model", "forgets", "what", "many", "experts", "knew", "while", "the", "router", "sends", "them")


@pytest.fixture(scope="module")
def model(tiny_model_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for seed, name in enumerate(("calibration.txt", "heldout.txt")):
        draw = random.Random(seed)
        (folder / name).write_text(" ".join(draw.choice(WORDS) for _ in range(4000)), encoding="utf-8")
    # In float32: in bfloat16, what a batch of plans rounds and what one alone does may send a token to other experts.
    given = Namespace(
        model=tiny_model_factory("deepseek_v3", dtype="float32"), text=folder, studies=folder, windows=4, out=folder / "out"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench._planned, "SAMPLES", 8)
        patch.setattr(bench._planned, "LENGTH", 32)
        yield Planned(given)


def everywhere(model: Planned, lever: str, scheme: str) -> Trial:
    blocks = range(len(model.inventory.blocks))
    return Trial(model.whole, {block: {lever: scheme} for block in blocks})


def test_a_plan_that_changes_nothing_costs_nothing(model):
    original, (kept,) = model.costs([Trial(model.whole, {})])

    assert torch.equal(kept.losses, original.losses)
    assert kept.divergence == pytest.approx(0, abs=1e-12)


def test_a_scheme_everywhere_costs_what_the_study_found_on_the_same_text(model):
    priced_NS = pricing_text(model.calibration).priced_NS
    schemes = [scheme for scheme in model.prices.schemes if scheme.scheme in ("W3A16", "W2A16")]

    _, costs = model.costs([everywhere(model, scheme.lever, scheme.scheme) for scheme in schemes], priced_NS)

    assert {scheme.lever for scheme in schemes} >= {"experts", "attention"}
    for scheme, cost in zip(schemes, costs, strict=True):
        assert cost.divergence == pytest.approx(scheme.price.whole, rel=1e-4)


def test_fewer_experts_cost_what_the_study_found_on_the_same_text_and_go_with_their_solved_weights(model):
    priced_NS = pricing_text(model.calibration).priced_NS
    drop = ExpertDrop.model_validate({"criterion": model.levers.criteria[0], "experts_kept": 4})
    gentle = Quantize.model_validate({"scheme": "W8A16", "group_size": model.levers.group_size})
    trials = [model.written_out(steps, "custom").trial for steps in ([drop], [drop, gentle])]

    _, (dropped, both) = model.costs(trials, priced_NS)

    count = next(c for c in model.prices.counts if (c.criterion, c.experts_kept) == (drop.criterion, 4))
    assert dropped.divergence == pytest.approx(count.price.whole, rel=1e-4)
    assert both.divergence == pytest.approx(dropped.divergence, rel=0.05)  # 8 bits change next to nothing


def test_solved_weights_find_their_block_when_one_before_it_is_gone(model):
    gone = BlockDrop.model_validate({"blocks": [min(model.inventory.droppable)]})
    gentle = Quantize.model_validate({"scheme": "W8A16", "attention": "W8A16", "group_size": model.levers.group_size})
    trials = [model.written_out(steps, "custom").trial for steps in ([gone], [gone, gentle])]

    _, (dropped, both) = model.costs(trials)

    assert both.divergence == pytest.approx(dropped.divergence, rel=0.05)


@pytest.mark.parametrize("profile", ["portable", "custom"])
def test_prices_add_up_to_what_the_search_predicts(model, profile):
    search = model.search(profile)

    for share in (0.2, 0.3, 0.5, 0.8):
        selection = search.best(round(share * model.bytes))
        assert selection is not None
        assert predicted(model.prices, selection) == pytest.approx(selection.loss, rel=1e-9)


@pytest.mark.parametrize(("bits", "dropped"), LEVERS)
def test_a_tuned_recipe_drops_as_little_as_fits(model, bits, dropped):
    targets = [round(share * model.bytes) for share in (0.3, 0.6, 0.95)]

    found = [tuned(model, "custom", target, bits, dropped) for target in targets]

    for target, chosen in zip(targets, found, strict=True):
        if chosen is not None:
            assert chosen.bytes <= target
            looser = tuned(model, "custom", chosen.bytes - 1, bits, dropped)
            assert looser is None or looser.bytes < chosen.bytes
            assert tuned(model, "custom", chosen.bytes, bits, dropped) == chosen
    assert any(found)


def test_random_plans_lie_in_their_bands(model, monkeypatch):
    monkeypatch.setattr("bench.predicted_loss.BANDS", (0.3, 0.5))
    monkeypatch.setattr("bench.predicted_loss.IN_BAND", 4)

    plans = list(drawn(model, random.Random(1)))

    assert [plan.target for plan in plans] == [0.3] * 4 + [0.5] * 4
    assert all(abs(plan.chosen.bytes / model.bytes - plan.target) <= 0.02 for plan in plans)
    assert all(plan.predicted > 0 for plan in plans)


def test_noise_changes_prices_and_no_noise_does_not(model):
    assert noised(model.prices, random.Random(0), 0.0) == model.prices
    changed = noised(model.prices, random.Random(0), 0.5)
    assert changed.schemes != model.prices.schemes
    assert changed.drops != model.prices.drops
