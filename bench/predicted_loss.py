"""How well predicted losses rank plans, and what following them costs beside the best of many plans, on a trained model.

    python -m bench.predicted_loss MODEL TEXT [--studies FOLDER] [--out NAME] [--profiles custom]

Sixty random plans, ten in each of six bands of bytes, half of them alike in all blocks, half drawn block by block, with up to
four blocks or MoE layers dropped: rank correlation of predicted and measured divergence, in all, within bands, and among plans
with two or more drops; beside it bytes alone as the predictor. Then, in each profile and for each of six targets, what recipe
"auto" settles on beside all other plans that fit: its rivals, and plans that are best by prices multiplied with noise, so that
they lie where the choice is hard; 200 plans for a profile, the random ones not counted. Regret is exp(d) - 1 with d how much more
divergence it has than the best. What is measured is measured on held-out text (``bench/_planned.py`` says how).
NAME.json receives every plan, NAME.svg the plot (``pip install -r bench/requirements.txt``).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from scipy.stats import spearmanr

from bench._planned import Chosen, Cost, Planned, add_settings
from bench._trained import arguments
from compression.planner.options import Option, Selection
from compression.planner.pairs import beyond_single, pair_charges
from compression.planner.prices import Prices, Setting
from compression.planner.search import Search
from compression.planner.steps import steps_of
from compression.planner.weights import KEEP
from compression.recipe import Profile

BANDS = (0.2, 0.28, 0.36, 0.45, 0.57, 0.7)
WIDTH, IN_BAND = 0.02, 10
SHARES = (0.9, 0.55, 0.35, 0.27, 0.23, 0.2)
PROFILES: tuple[Profile, ...] = get_args(Profile)
PLANS = 200
SPREADS = (0.3, 0.6, 1.0)
_MOST_DROPS = 4


@dataclass(frozen=True)
class Candidate:
    """A plan to be evaluated."""

    group: str
    """``random``, or the profile whose search found it."""
    target: float
    """The share of bytes that it was drawn or searched for."""
    is_auto: bool
    predicted: float
    chosen: Chosen


def main() -> None:
    """Measure, print the tables, write the results."""
    given = arguments(__doc__, _settings)
    if given is None:
        return
    model, draw = Planned(given), random.Random(0)
    candidates = [*found_by_search(model, given.profiles, draw), *drawn(model, draw)]
    print(f"study: {model.seconds:.0f} s; {len(candidates)} plans", flush=True)
    original, costs = model.costs([candidate.chosen.trial for candidate in candidates])
    plans = [_row(candidate, cost, model) for candidate, cost in zip(candidates, costs, strict=True)]
    result = {"model": model.name, "bytes": model.bytes, "perplexity": original.perplexity, "plans": plans}
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    report(plans, costs)
    plot(result, given)


def _settings(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=PROFILES)


def _row(candidate: Candidate, cost: Cost, model: Planned) -> dict[str, Any]:
    cuts = candidate.chosen.trial.cuts
    return {
        "group": candidate.group,
        "target": candidate.target,
        "auto": candidate.is_auto,
        "bytes": candidate.chosen.bytes / model.bytes,
        "drops": model.drops_of(cuts),
        "predicted": candidate.predicted,
        "divergence": cost.divergence,
        "perplexity": cost.perplexity,
    }


# ---- random plans


def drawn(model: Planned, draw: random.Random) -> Iterator[Candidate]:
    """Yield random plans, equally many in each band."""
    for band in BANDS:
        found = 0
        while found < IN_BAND:
            selection = _alike(model, draw) if found % 2 else _block_by_block(model, draw)
            steps = steps_of(selection, model.inventory, model.levers)
            if not steps or abs(model.bytes_of(steps, "custom") / model.bytes - band) > WIDTH:
                continue
            found += 1
            yield Candidate("random", band, False, predicted(model.prices, selection), model.written_out(steps, "custom"))


def _alike(model: Planned, draw: random.Random) -> Selection:
    levers = model.levers
    kept = draw.choice((model.inventory.experts, *levers.counts))
    schemes = {lever: draw.choice((KEEP, *named)) for lever, named in levers.schemes.items()}
    return _selection(model, draw, [(kept, schemes)] * len(model.inventory.blocks))


def _block_by_block(model: Planned, draw: random.Random) -> Selection:
    levers, settings = model.levers, []
    gentle = draw.random()
    for _ in model.inventory.blocks:
        counts = (model.inventory.experts, *levers.counts)
        kept = counts[min(int(draw.expovariate(1.0) * len(counts) * gentle), len(counts) - 1)]
        settings.append((kept, {lever: draw.choice((KEEP, *named)) for lever, named in levers.schemes.items()}))
    return _selection(model, draw, settings)


def _selection(model: Planned, draw: random.Random, settings: Sequence[tuple[int, dict[Any, str]]]) -> Selection:
    criterion, droppable = draw.choice(model.levers.criteria), sorted(model.inventory.droppable)
    gone = {
        block: draw.choice([drop.kind for drop in model.levers.drops if drop.block == block])
        for block in draw.sample(droppable, min(draw.randint(0, _MOST_DROPS), len(droppable) - 1))
    }
    options: list[Option] = []
    for block, (kept, schemes) in enumerate(settings):
        is_mixture, has_layer = model.inventory.blocks[block].is_mixture, gone.get(block) != "layer"
        if gone.get(block) == "block":
            options.append(Option(block, "drop_block", None, None, None, None, 0, 0.0, 0.0))
            continue
        experts = (kept, schemes.get("experts")) if is_mixture and has_layer else (None, None)
        others = schemes.get("others") if has_layer else None
        action = "keep" if has_layer else "drop_layer"
        options.append(Option(block, action, *experts, schemes.get("attention"), others, 0, 0.0, 0.0))
    return Selection(tuple(options), criterion, 0, 0.0, 0.0)


def predicted(prices: Prices, selection: Selection) -> float:
    """Return what a plan costs by the prices."""
    total = beyond_single(prices, pair_charges(prices, [price.drop for price in prices.drops]), selection.drops)
    for option in selection.options:
        if option.drop is not None:
            total += prices.of_drop(option.drop)
        if option.experts_kept is not None and selection.criterion is not None:
            total += prices.of_count(option.block, selection.criterion, option.experts_kept)
        for lever, scheme in (("experts", option.experts), ("attention", option.attention), ("others", option.others)):
            if scheme not in (None, KEEP):
                total += prices.of_scheme(option.block, lever, scheme)
    return total


# ---- plans where the choice is hard


def found_by_search(model: Planned, profiles: Sequence[Profile], draw: random.Random) -> Iterator[Candidate]:
    """Yield what auto settles on for each target, its rivals, and what is best by prices that noise has changed."""
    for profile in profiles:
        autos = [Candidate(profile, share, True, 0.0, model.auto(round(share * model.bytes), profile)) for share in SHARES]
        search, seen = model.search(profile), {_key(auto.chosen) for auto in autos}
        for auto in autos:
            assert auto.chosen.plan is not None
            assert auto.chosen.plan.predicted_loss is not None
            yield Candidate(profile, auto.target, True, auto.chosen.plan.predicted_loss, auto.chosen)
        found, place = len(autos), 0
        while found < PLANS:
            share = SHARES[place % len(SHARES)]
            for selection in _near(model, search, profile, round(share * model.bytes), place, draw):
                chosen = model.written_out(search.steps_of(selection), profile) if search.steps_of(selection) else None
                if chosen is not None and _key(chosen) not in seen and found < PLANS:
                    seen.add(_key(chosen))
                    found += 1
                    yield Candidate(profile, share, False, predicted(model.prices, selection), chosen)
            place += 1


def _near(model: Planned, search: Search, profile: Profile, target: int, place: int, draw: random.Random) -> Iterator[Selection]:
    if place < len(SHARES):
        yield from search.rivals(target)[1:]
        return
    noisy = noised(model.prices, draw, SPREADS[place // len(SHARES) % len(SPREADS)])
    target = round(target * (1 - 0.05 * draw.random()))
    if (best := model.search(profile, noisy).best(target)) is not None:
        yield best


def noised(prices: Prices, draw: random.Random, spread: float) -> Prices:
    """Return prices multiplied with noise: whole settings, blocks' shares, drops."""

    def setting(price: Setting) -> Setting:
        errors = {block: error * draw.lognormvariate(0, spread) for block, error in price.errors.items()}
        return Setting(whole=price.whole * draw.lognormvariate(0, spread), errors=errors)

    return prices.model_copy(
        update={
            "counts": tuple(count.model_copy(update={"price": setting(count.price)}) for count in prices.counts),
            "schemes": tuple(scheme.model_copy(update={"price": setting(scheme.price)}) for scheme in prices.schemes),
            "drops": tuple(drop.model_copy(update={"loss": drop.loss * draw.lognormvariate(0, spread)}) for drop in prices.drops),
        }
    )


def _key(chosen: Chosen) -> str:
    return repr((chosen.trial.cuts, sorted(chosen.trial.schemes.items())))


# ---- what came out


def report(plans: Sequence[dict[str, Any]], costs: Sequence[Cost]) -> None:
    """Print rank correlations and regrets."""
    random_ones = [plan for plan in plans if plan["group"] == "random"]
    print("\n| random plans | number | predicted | bytes alone |\n|---|---|---|---|")
    print(_correlation("all", random_ones))
    for band in BANDS:
        print(_correlation(f"{band:.0%} +- {WIDTH:.0%} of the bytes", [plan for plan in random_ones if plan["target"] == band]))
    print(_correlation("two drops or more", [plan for plan in random_ones if plan["drops"] >= 2]))
    print(_correlation("below 1 nat", [plan for plan in random_ones if plan["divergence"] < 1]))
    for profile in dict.fromkeys(plan["group"] for plan in plans if plan["auto"]):
        searched = [plan for plan in plans if plan["group"] == profile]
        print(_correlation(f"{profile}: found by search, all", searched))
        print(f"\n| {profile} | bytes | predicted | measured | best of those that fit | regret | in next-token loss |")
        print("|---|---|---|---|---|---|---|")
        for share in SHARES:
            _regret(profile, share, plans, costs)


def _correlation(name: str, plans: Sequence[dict[str, Any]]) -> str:
    measured = [plan["divergence"] for plan in plans]
    by = [spearmanr([plan[key] for plan in plans], measured).statistic for key in ("predicted", "bytes")]
    return f"| {name} | {len(plans)} | {by[0]:.3f} | {-by[1]:.3f} |"


def _regret(profile: Profile, share: float, plans: Sequence[dict[str, Any]], costs: Sequence[Cost]) -> None:
    allowed = PROFILES if profile == "custom" else (profile,)
    fit = [i for i, p in enumerate(plans) if p["group"] in allowed and p["bytes"] <= share + 1e-9]
    auto = next(i for i in fit if plans[i]["auto"] and plans[i]["group"] == profile and plans[i]["target"] == share)
    best, luckiest = (min(fit, key=lambda i: plans[i][key]) for key in ("divergence", "perplexity"))
    regret = math.expm1(plans[auto]["divergence"] - plans[best]["divergence"])
    apart_N = costs[auto].losses - costs[luckiest].losses
    error = float(apart_N.std() / len(apart_N) ** 0.5)
    row, least = plans[auto], plans[best]["divergence"]
    by_text = f"{math.expm1(float(apart_N.mean())):.2%} +- {error:.2%}"
    cells = (
        f"{share:.0%}",
        f"{row['bytes']:.4f}",
        f"{row['predicted']:.5f}",
        f"{row['divergence']:.5f}",
        f"{least:.5f} ({len(fit)})",
    )
    print(f"| {' | '.join(cells)} | {regret:.2%} | {by_text} |")


def plot(result: dict[str, Any], given: argparse.Namespace) -> None:
    """Draw measured over predicted loss."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 6), layout="constrained")
    for group, colour in (("portable", "tab:blue"), ("custom", "tab:orange"), ("random", "tab:green")):
        some = [plan for plan in result["plans"] if plan["group"] == group]
        label = "random" if group == "random" else f"{group}: near the best by noisy prices"
        axis.scatter([p["predicted"] for p in some], [p["divergence"] for p in some], s=9, color=colour, label=label, alpha=0.7)
    some = [plan for plan in result["plans"] if plan["auto"]]
    axis.scatter([p["predicted"] for p in some], [p["divergence"] for p in some], s=40, color="black", marker="x", label="auto")
    axis.plot([1e-5, 10], [1e-5, 10], color="grey", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="predicted loss, nats per token", ylabel="measured on held-out text")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    axis.set_title(result["model"])
    figure.savefig(given.out.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
