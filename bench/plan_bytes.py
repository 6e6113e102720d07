"""Whether artifacts are as big as their plans say, to the byte, and never bigger than the target.

    python -m bench.plan_bytes [--every 8] [--targets 200] [--only FAMILY ...]

Tiny models of all families, both profiles. For every family ``--every`` targets, drawn between the smallest plan and the
untouched model on a logarithmic scale, each with other made-up prices, every second time with trims for a hundredth, so that all
levers get used. For one family ``--targets`` targets, drawn evenly, with one set of prices. Every distinct plan is compressed,
and the tensors of the files are counted.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.checkpoint.source import open_source
from compression.pipeline import Run
from compression.planner.inventory import Inventory, take_inventory
from compression.planner.levers import levers_of
from compression.planner.prices import Prices
from compression.planner.search import Search
from compression.progress import Silent
from compression.recipe import Profile, Quantize, Recipe
from compression.request import Compression, Serving
from tests.compression.made_prices import made_prices
from tests.tiny_models import MODEL_TYPES, MORE_MODEL_TYPES, build

PROFILES: tuple[Profile, ...] = ("portable", "custom")
MANY = "deepseek_v3"
"""The family for which many targets are asked for: it has dense blocks, shared experts and latent attention."""
_WORDS = (
    "one",
    "small",
    "model",
    "forgets",
    "what",
    "many",
    "experts",
    "knew",
    "while",
    "the",
    "router",
    "sends",
    "tokens",
    "on",
)


@dataclass
class Counted:
    """What was found."""

    targets: int = 0
    artifacts: int = 0
    """One for each distinct plan."""
    differences: list[str] = field(default_factory=list)
    levers: Counter[str] = field(default_factory=Counter)


def main() -> None:
    """Compress, count, and say what differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--targets", type=int, default=200)
    parser.add_argument("--only", nargs="*", help="families; all when it is not given")
    given = parser.parse_args()
    whole = Counted()
    families = given.only or (*MODEL_TYPES, *MORE_MODEL_TYPES)
    asked = [(family, given.every, False) for family in families]
    asked += [(family, given.targets, True) for family in families if family == MANY]
    for family, targets, one_price in asked:
        for profile in PROFILES:
            counted = count(family, profile, targets, one_price=one_price)
            print(f"{family}, {profile}: {counted.targets} targets, {counted.artifacts} plans, {_said(counted)}", flush=True)
            _add(whole, counted)
    print(f"in all: {whole.targets} targets, {whole.artifacts} plans, {_said(whole)}")
    print("levers: " + ", ".join(f"{lever} in {times}" for lever, times in whole.levers.most_common()))


def _said(counted: Counted) -> str:
    return "no difference" if not counted.differences else f"DIFFERENT: {counted.differences}"


def _add(whole: Counted, more: Counted) -> None:
    whole.targets += more.targets
    whole.artifacts += more.artifacts
    whole.differences += more.differences
    whole.levers += more.levers


def count(family: str, profile: Profile, targets: int, *, one_price: bool) -> Counted:
    """Ask for so many targets of one family, and write what each plan says."""
    counted, written = Counted(), dict[str, int]()
    with tempfile.TemporaryDirectory(prefix="slimtrim-bench-") as place:
        model = build(family, Path(place) / "model", dtype="bfloat16")
        inventory = take_inventory(read_checkpoint(FolderFiles(model)))
        for target, search in _asked(inventory, profile, targets, one_price=one_price):
            counted.targets += 1
            plan = search.best(target)
            assert plan is not None, "the smallest plan fits"
            steps = search.steps_of(plan)
            if steps and (key := repr(steps)) not in written:
                written[key] = artifact_bytes(model, profile, steps, target, Path(place))
                counted.artifacts += 1
                counted.levers.update(_levers(steps, inventory))
            found = written[repr(steps)] if steps else inventory.bytes
            if found != plan.bytes or found > target:
                counted.differences.append(f"{family}, {profile}, {target}: planned {plan.bytes}, written {found}")
    return counted


def _asked(inventory: Inventory, profile: Profile, targets: int, *, one_price: bool) -> Iterator[tuple[int, Search]]:
    draw, levers = random.Random(0), levers_of(inventory)
    search = Search(inventory, Serving(), profile, made_prices(inventory, levers))
    smallest = search.smallest().bytes
    for place in range(targets):
        target = draw.uniform(smallest, inventory.bytes)
        if not one_price:
            target = smallest * (inventory.bytes / smallest) ** ((place + draw.random()) / targets)
            prices = made_prices(inventory, levers, seed=place)
            search = Search(inventory, Serving(), profile, _trims_for_little(prices) if place % 2 else prices)
        yield max(smallest, round(target)), search


def _trims_for_little(prices: Prices) -> Prices:
    counts = (c.model_copy(update={"price": c.price.model_copy(update={"whole": c.price.whole / 100})}) for c in prices.counts)
    drops = (drop.model_copy(update={"loss": drop.loss / 100}) for drop in prices.drops)
    return prices.model_copy(update={"counts": tuple(counts), "drops": tuple(drops), "pairs": ()})


def artifact_bytes(model: Path, profile: Profile, steps: Any, target: int, place: Path) -> int:
    """Return the bytes of all tensors in the files that a recipe leaves."""
    draw = random.Random(1)
    text = " ".join(draw.choice(_WORDS) for _ in range(1500))
    request = Compression.model_validate(
        {
            "model": model.as_uri(),
            "profile": profile,
            "target_memory": target,
            "recipe": Recipe(steps=steps).model_dump(mode="json"),
            "calibration": {"source": {"inline": [text]}, "samples": 4, "sequence_length": 64},
            "evaluation": {"perplexity": {"source": {"inline": [text[::-1]]}, "samples": 1, "sequence_length": 16}},
        }
    )
    out = place / "out"
    run = Run(request, open_source(model), out, Silent(), 2**33, studies=place / "studies")
    run.plan_and_load_text()
    run.study_model()
    run.choose()
    run.compress_blocks()
    return sum(header.bytes for header in read_checkpoint(FolderFiles(out)).tensors.values())


def _levers(steps: Any, inventory: Inventory) -> Iterator[str]:
    for step in steps:
        if not isinstance(step, Quantize):
            yield step.step + (" by block" if getattr(step, "experts_kept_in", None) else "")
            continue
        for component in ("experts", "attention", "shared_experts", "dense"):
            schemes = {step.scheme_in(block, component) for block in range(len(inventory.blocks))} - {"keep"}
            yield from (f"{component} {scheme}" for scheme in sorted(schemes))


if __name__ == "__main__":
    main()
