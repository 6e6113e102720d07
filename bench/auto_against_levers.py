"""Recipe "auto" beside every recipe of one lever that is tuned to the same bytes, on a trained model.

    python -m bench.auto_against_levers MODEL TEXT [--studies FOLDER] [--out NAME] [--artifacts]

At six targets between 20 and 90 % of the original, in both profiles: "auto" as a job settles it, its trials on calibration text,
and recipes that everyone knows, each with as little dropped as the target allows. "4 bits, MoE layers" and "4 bits, blocks" are
the founding paper's. Attention takes as many bits as experts, but never fewer than four. What fits is evaluated on held-out text
(``bench/_planned.py`` says how); ``--artifacts`` also writes the artifacts of "auto" and measures those. NAME.json receives
everything, NAME.svg the plot (``pip install -r bench/requirements.txt``), and the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench._planned import Chosen, Cost, Planned, add_settings
from bench._trained import arguments
from compression.errors import RequestError
from compression.pipeline import compress
from compression.recipe import AnyStep, BlockDrop, ExpertDrop, LayerDrop, Profile, Quantize

SHARES = (0.9, 0.7, 0.55, 0.4, 0.3, 0.2)
PROFILES: tuple[Profile, ...] = ("portable", "custom")
LEVERS = (
    (16, "experts"), (16, "blocks"), (8, "experts"), (8, "MoE layers"), (8, "blocks"), (4, "experts"), (4, "MoE layers"),
    (4, "blocks"), (3, "experts"), (3, "blocks"), (2, "experts"),
)  # fmt: skip
"""Bits, and what is dropped."""
AUTO = "auto"


def main() -> None:
    """Measure, print the tables, write the results."""
    given = arguments(__doc__, _settings)
    if given is None:
        return
    model = Planned(given)
    print(f"study: {model.seconds:.0f} s; {model.bytes} bytes", flush=True)
    rows = [row for profile in PROFILES for share in SHARES for row in candidates(model, profile, share)]
    print(f"{len(rows)} plans", flush=True)
    original, costs = model.costs([chosen.trial for *_, chosen in rows])
    found = [_result(*row, cost) for row, cost in zip(rows, costs, strict=True)]
    result = {
        "model": model.name,
        "bytes": model.bytes,
        "tokens": int(original.losses.numel() * 255),
        "perplexity": original.perplexity,
        "plans": found,
    }
    if given.artifacts:
        result["artifacts"] = [artifact(model, *row) for row in rows if row[2] == AUTO]
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    report(result)
    plot(result, given.out.with_suffix(".svg"))


def _settings(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--artifacts", action="store_true", help="write what auto comes to, and measure that too")


def candidates(model: Planned, profile: Profile, share: float) -> Iterator[tuple[Profile, float, str, Chosen]]:
    """Yield what fits into a share of the original bytes: auto, and each recipe of one lever that the profile allows."""
    target = round(share * model.bytes)
    yield profile, share, AUTO, model.auto(target, profile)
    for bits, dropped in LEVERS:
        if (chosen := tuned(model, profile, target, bits, dropped)) is not None:
            yield profile, share, f"{bits} bits, {dropped}", chosen


def tuned(model: Planned, profile: Profile, target: int, bits: int, dropped: str) -> Chosen | None:
    """Return the recipe with as little dropped as fits; None where none does or the profile has no such thing."""
    inventory = model.inventory
    quantized = [] if bits == 16 else [_quantize(model, bits)]
    most = inventory.experts if dropped == "experts" else len(inventory.droppable)
    for count in range(most):
        steps = [*_drop(model, dropped, count), *quantized]
        if not steps:
            continue
        try:
            chosen = model.written_out(steps, profile)
        except RequestError:  # not in this profile, or not so many: experts stay equally many in each group
            continue
        if chosen.bytes <= target:
            return chosen
    return None


def _quantize(model: Planned, bits: int) -> Quantize:
    schemes = {"scheme": f"W{bits}A16", "attention": f"W{max(4, bits)}A16"}
    others = {
        part: schemes["scheme"] for part in ("shared_experts", "dense") if part in model.levers.components.get("others", ())
    }
    return Quantize.model_validate({**schemes, **others, "group_size": model.levers.group_size})


def _drop(model: Planned, dropped: str, count: int) -> list[AnyStep]:
    if count == 0:
        return []
    make: dict[str, Callable[[], AnyStep]] = {
        "experts": lambda: ExpertDrop.model_validate(
            {"criterion": model.levers.criteria[0], "experts_kept": model.inventory.experts - count}
        ),
        "MoE layers": lambda: LayerDrop(layers_dropped=count),
        "blocks": lambda: BlockDrop(blocks_dropped=count),
    }
    return [make[dropped]()]


def _result(profile: Profile, share: float, name: str, chosen: Chosen, cost: Cost) -> dict[str, Any]:
    return {
        "profile": profile,
        "share": share,
        "name": name,
        "bytes": chosen.bytes,
        "perplexity": cost.perplexity,
        "divergence": cost.divergence,
        "predicted_loss": None if chosen.plan is None else chosen.plan.predicted_loss,
        "steps": [step.model_dump(mode="json", exclude_defaults=True) | {"step": step.step} for step in chosen.steps],
    }


def artifact(model: Planned, profile: Profile, share: float, _: str, chosen: Chosen) -> dict[str, Any]:
    """Write the artifact of a plan as a job does, and return what its report says."""
    with tempfile.TemporaryDirectory(prefix="slimtrim-bench-") as folder:
        request = model.request(target=None, profile=profile, steps=chosen.steps)
        report = compress(request, model.folder, Path(folder) / "out")
    print(f"artifact {profile} {share}: {report.quality.perplexity_after:.4f}", flush=True)
    return {
        "profile": profile,
        "share": share,
        "bytes_planned": chosen.bytes,
        "bytes": report.bytes_after,
        "perplexity_before": report.quality.perplexity_before,
        "perplexity": report.quality.perplexity_after,
        "divergence": report.quality.divergence,
    }


def report(result: dict[str, Any]) -> None:
    """Print a table for each profile, and how far auto is from the best at every target."""
    print(f"\noriginal: {result['perplexity']:.3f} on {result['tokens']} held-out tokens")
    for profile in PROFILES:
        plans = [plan for plan in result["plans"] if plan["profile"] == profile]
        table = {(plan["name"], plan["share"]): plan["perplexity"] for plan in plans}
        print(f"\n| {profile} | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |\n" + "|---" * (len(SHARES) + 1) + "|")
        for name in dict.fromkeys(plan["name"] for plan in plans):
            cells = [table.get((name, share)) for share in SHARES]
            print(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
        ratios = [table[AUTO, share] / min(table[name, s] for name, s in table if s == share) - 1 for share in SHARES]
        print("| auto above the best | " + " | ".join(f"{ratio:.2%}" for ratio in ratios) + " |")
    for row in result.get("artifacts", ()):
        print(
            f"artifact of auto, {row['profile']}, {row['share']:.0%}: {row['bytes']} bytes, planned {row['bytes_planned']}, "
            f"perplexity {row['perplexity']:.3f}, divergence {row['divergence']:.5f}"
        )


def plot(result: dict[str, Any], out: Path) -> None:
    """Draw perplexity over bytes, a line for every recipe."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PROFILES), figsize=(12, 5), sharey=True, layout="constrained")
    for axis, profile in zip(axes, PROFILES, strict=True):
        plans = [plan for plan in result["plans"] if plan["profile"] == profile]
        for name in dict.fromkeys(plan["name"] for plan in plans):
            _line(axis, [plan for plan in plans if plan["name"] == name], name, result)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=profile, xlabel="target, % of the original bytes", yscale="log")
        axis.set_yticks([1, 1.1, 1.25, 1.5, 2, 3, 5, 10], labels=["1", "1.1", "1.25", "1.5", "2", "3", "5", "10"], minor=False)
        axis.set_ylim(0.97, 12)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out perplexity, times the original's")
    axes[-1].legend(fontsize=8)
    figure.suptitle(f"{result['model']}: {result['bytes'] / 1e6:.1f} MB, perplexity {result['perplexity']:.1f}")
    figure.savefig(out, metadata={"Date": None})


def _line(axis: Any, plans: Sequence[dict[str, Any]], name: str, result: dict[str, Any]) -> None:
    shares, ratios = zip(*[(100 * plan["share"], plan["perplexity"] / result["perplexity"]) for plan in plans], strict=True)
    dashes = {"experts": "-", "MoE layers": "--", "blocks": ":"}
    if name == AUTO:
        axis.plot(shares, ratios, "o-", color="black", linewidth=2.2, label=name, zorder=9)
        return
    bits, dropped = name.split(" bits, ")
    colours = {"16": "tab:gray", "8": "tab:blue", "4": "tab:green", "3": "tab:orange", "2": "tab:red"}
    axis.plot(shares, ratios, dashes[dropped], marker=".", color=colours[bits], label=name)


if __name__ == "__main__":
    main()
