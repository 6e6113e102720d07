"""Findings: the tables turned into sentences, each with the blocks it is about and the numbers it rests on.

A threshold is a name with its evidence. Where a study lacks a part, the finding says so instead of guessing. What is said holds
for the calibration text and the untouched model; nothing here has been tried on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compression.analysis import routing, similarity
from compression.study import ExpertStatistics, Study

TAU_ALIGNED = 0.3
"""Kendall's tau from which neurons count as aligned: 0.75 for Mixtral, 0.0003 at most in size for DeepSeekMoE and Grok
(arXiv:2406.18219); unrelated experts of 384 neurons give 0 with a deviation of 0.034."""
MATRICES_ALIKE = 0.1
"""Mean cosine of whole matrices from which experts have a common origin: 0.2 to 0.4 for Mixtral, 0 for the others there."""
OUTPUTS_ALIKE = 0.5
"""Mean cosine of outputs from which one expert can stand for two: the mean of two such unit vectors is still 0.87 long."""
IDLE_COSINE = 0.9
"""Cosine between what enters and what leaves, from which a layer or block hardly turns the residual stream: 26 degrees."""
QUARTER = 4
"""One in so many layers is named: 8 of Mixtral's 32 MoE layers is as far as arXiv:2406.02500 goes."""
RARELY = 0.1
"""Share of an even load below which an expert is rarely used: it sees a tenth of what the average expert is calibrated on."""
OVERUSED = 3.0
"""Multiple of an even load from which an expert is overused: with expert parallelism its device answers three times later."""
LOUD = 0.1
"""Correlation of routing weight and output norm that is more than chance: ten deviations at 10 000 tokens."""
LIFT = 2.0
"""Multiple of the expected meetings from which two experts work together."""
_SURE = 4.0
"""Deviations of a Poisson count: by chance one pair in 30 000 lies above."""
_MEETINGS = 10
"""Fewer meetings prove nothing."""

Layers = Mapping[int, ExpertStatistics]


@dataclass(frozen=True)
class Finding:
    """One sentence, and what it rests on."""

    code: str
    message: str
    blocks: tuple[int, ...] = ()
    """Those of the source that it is about."""
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])


def findings(study: Study) -> list[Finding]:
    """Return what a study says to someone who wants to compress the model; first what it cannot say."""
    layers = dict(sorted(study.experts.items()))
    seen = {block: layer for block, layer in layers.items() if layer.tokens > 0 and layer.total("count").any()}
    sampled = {block: layer for block, layer in layers.items() if layer.sample is not None and len(layer.sample.gram_SEE)}
    weighed = {block: layer for block, layer in layers.items() if layer.likeness is not None}
    found = [_not_looked_at(part) for part, there in (("tokens", seen), ("sample", sampled), ("likeness", weighed)) if not there]
    if any(layer.likeness is not None and len(layer.likeness.pairs_P2) for layer in weighed.values()):
        found += [_origin(weighed), *_merge_or_drop(weighed, sampled)]
    if seen:
        found += [*_idle(study, seen), *_to_spare(seen, sampled), *_load(seen), *_loudness(seen), *_together(seen)]
    return found


def _not_looked_at(part: str) -> Finding:
    missing = {
        "tokens": "routing, usage and how much layers change their input were not looked at: no text was shown to the model",
        "sample": "how alike experts answer was not looked at: no tokens were shown to every expert (part sample)",
        "likeness": "where the experts come from, and whether they can be merged, was not looked at: likeness was not gathered",
    }
    return Finding("not_looked_at", f"Not looked at: {missing[part]}.", numbers={"part": part})


def _origin(weighed: Layers) -> Finding:
    taus = {block: table["tau"] for block, table in _matchings(weighed).items()}
    tau = _mean(taus.values())
    cosine = _mean(mean for mean in map(_matrix_cosine, weighed.values()) if mean is not None)
    numbers = {"tau": tau, "matrix_cosine": cosine, "tau_by_block": taus}
    said = f"Kendall's tau of matched neurons is {tau:.2f}, the mean cosine of whole matrices {cosine:.2f}"
    if tau >= TAU_ALIGNED and cosine >= MATRICES_ALIKE:
        return Finding(
            "upcycled", f"The experts were copied from one dense layer and then trained: {said}.", tuple(taus), numbers
        )
    if abs(tau) < TAU_ALIGNED and cosine < MATRICES_ALIKE:
        return Finding("from_scratch", f"The experts were trained from scratch, each on its own: {said}.", tuple(taus), numbers)
    return Finding("origin_unclear", f"Whether the experts have a common origin is unclear: {said}.", tuple(taus), numbers)


def _merge_or_drop(weighed: Layers, sampled: Layers) -> list[Finding]:
    taus = {block: table["tau"] for block, table in _matchings(weighed).items()}
    aligned = {block: tau for block, tau in taus.items() if tau >= TAU_ALIGNED}
    apart = tuple(block for block in taus if block not in aligned)
    alike = {block: mean for block, mean in _output_cosines(sampled).items() if block in aligned and mean >= OUTPUTS_ALIKE}
    found: list[Finding] = []
    if alike:
        text = f"Merging experts is worth a try in {_blocks(alike)}: neurons are aligned and experts answer alike."
        found.append(Finding("merge", text, tuple(alike), {"output_cosine": alike, "tau": {b: aligned[b] for b in alike}}))
    if different := tuple(block for block in aligned if block in sampled and block not in alike):
        cosines = {block: mean for block, mean in _output_cosines(sampled).items() if block in different}
        text = (
            f"Drop experts rather than merge them in {_blocks(different)}: neurons are aligned, but experts answer differently."
        )
        found.append(Finding("drop_not_merge", text, different, {"output_cosine": cosines}))
    if apart:
        text = f"Drop experts rather than merge them in {_blocks(apart)}: their neurons have nothing to do with each other's."
        found.append(Finding("drop_not_merge", text, apart, {"tau": {block: taus[block] for block in apart}}))
    return found


def _idle(study: Study, seen: Layers) -> list[Finding]:
    layers = {block: layer.layer_cosine for block, layer in seen.items()}
    blocks = {block: study.cosine(block) for block in sorted(study.cosine_M)}
    return [_least("layer", "their MoE layers", layers), *([_least("block", "they", blocks)] if blocks else [])]


def _least(what: str, whose: str, cosines: Mapping[int, float]) -> Finding:
    top = max(cosines, key=lambda block: cosines[block])
    idle = tuple(block for block in _highest(cosines) if cosines[block] >= IDLE_COSINE)
    if not idle:
        text = f"No {what} is idle: the least that one changes its input is a cosine of {cosines[top]:.2f}, in block {top}."
        return Finding(f"no_idle_{what}s", text, (), {"cosine": {top: cosines[top]}})
    text = f"Candidates for {what}_drop are {_blocks(idle)}: {whose} hardly turn what enters (cosine up to {cosines[top]:.3f})."
    return Finding(f"idle_{what}s", text, idle, {"cosine": {block: cosines[block] for block in idle}})


def _to_spare(seen: Layers, sampled: Layers) -> list[Finding]:
    cosines = {block: layer.layer_cosine for block, layer in seen.items()}
    busy = _highest({block: -cosine for block, cosine in cosines.items()})
    text = f"Spare {_blocks(busy)}: their MoE layers change their input most."
    found = [Finding("busy_layers", text, busy, {"cosine": {block: cosines[block] for block in busy}})]
    if outputs := _output_cosines(sampled):
        diverse = _highest({block: -mean for block, mean in outputs.items()})
        text = f"Experts differ most in what they answer in {_blocks(diverse)}: fewer of them is felt most there."
        found.append(Finding("diverse_layers", text, diverse, {"output_cosine": {block: outputs[block] for block in diverse}}))
    return found


def _load(seen: Layers) -> list[Finding]:
    tokens = max(layer.tokens for layer in seen.values())
    unused = _experts(seen, lambda load_E: load_E == 0)
    rare = _experts(seen, lambda load_E: (load_E > 0) & (load_E < RARELY))
    over = _experts(seen, lambda load_E: load_E >= OVERUSED)
    said = (
        ("unused_experts", unused, f"were not chosen once in {tokens:.0f} tokens; other text may need them"),
        ("rarely_used_experts", rare, f"get less than {RARELY:.0%} of an even load: calibration tells little about them"),
        ("overused_experts", over, f"get more than {OVERUSED:.0f} times an even load"),
    )
    return [
        Finding(code, f"{sum(map(len, who.values()))} experts of {_blocks(who)} {what}.", tuple(who), {"experts": who})
        for code, who, what in said
        if who
    ]


def _loudness(seen: Layers) -> list[Finding]:
    tables = {block: routing.loudness(layer.total("rank")) for block, layer in seen.items()}
    correlations = {block: float(table["correlation"]) for block, table in tables.items() if table is not None}
    if not correlations:
        return []
    mean = _mean(correlations.values())
    numbers = {"correlation": mean, "by_block": correlations}
    low, high = min(correlations.values()), max(correlations.values())
    said = f"rank correlation of routing weight and output norm {mean:+.2f} on average, {low:+.2f} to {high:+.2f} by block"
    if mean >= LOUD:
        text = f"The router prefers experts with large outputs ({said}): scores that multiply both, as reap, are well founded."
        return [Finding("router_prefers_loud", text, tuple(correlations), numbers)]
    if mean <= -LOUD:
        text = f"The router prefers experts with small outputs ({said}): norm and weight disagree, so compare criteria."
        return [Finding("router_prefers_quiet", text, tuple(correlations), numbers)]
    text = f"The router does not look at how large outputs are ({said}): norm and weight say different things about an expert."
    return [Finding("router_ignores_loudness", text, tuple(correlations), numbers)]


def _together(seen: Layers) -> list[Finding]:
    groups = {block: coactivated(layer.total("together")) for block, layer in seen.items()}
    groups = {block: found for block, found in groups.items() if found}
    if not groups:
        return []
    text = (
        f"In {_blocks(groups)} some experts are chosen together at least {LIFT:.0f} times as often as their usage explains: "
        "what one of them is worth depends on the others, which only a criterion for sets, such as hope, sees."
    )
    return [Finding("coactivated_experts", text, tuple(groups), {"groups": groups})]


def coactivated(together_EE: Tensor) -> list[list[int]]:
    """Return the groups of experts that pairs chosen together beyond chance link up, ascending; the first expert's first."""
    seen_EE = together_EE.clone().fill_diagonal_(0.0)
    expected_EE = routing.expected(seen_EE)
    sure_EE = (seen_EE - expected_EE) >= _SURE * expected_EE.sqrt()
    linked_EE = (seen_EE >= LIFT * expected_EE) & sure_EE & (seen_EE >= _MEETINGS)
    left, groups = set(range(len(seen_EE))), list[list[int]]()
    while left:
        group, edge = set[int](), {min(left)}
        while edge:
            group |= edge
            edge = set(linked_EE[sorted(edge)].any(0).nonzero().flatten().tolist()) - group
        left -= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


def _experts(seen: Layers, chosen: Callable[[Tensor], Tensor]) -> dict[int, list[int]]:
    """Return the experts whose load, in multiples of an even one, is as asked, by block."""
    who: dict[int, list[int]] = {}
    for block, layer in seen.items():
        count_E = layer.total("count")
        experts = chosen(count_E / count_E.mean()).nonzero().flatten().tolist()
        if experts:
            who[block] = experts
    return who


def _matchings(weighed: Layers) -> dict[int, dict[str, Any]]:
    tables = {block: similarity.matching(layer.likeness) for block, layer in weighed.items() if layer.likeness is not None}
    return {block: table for block, table in tables.items() if table is not None}


def _matrix_cosine(layer: ExpertStatistics) -> float | None:
    assert layer.likeness is not None
    return similarity.mean_of_pairs(layer.likeness.matrix_3EE.mean(0))


def _output_cosines(sampled: Layers) -> dict[int, float]:
    means = {
        block: similarity.mean_of_pairs(similarity.output_similarity(layer.sample))
        for block, layer in sampled.items()
        if layer.sample is not None
    }
    return {block: mean for block, mean in means.items() if mean is not None}


def _highest(values: Mapping[int, float]) -> tuple[int, ...]:
    ranked = sorted(values, key=lambda block: (-values[block], block))
    return tuple(sorted(ranked[: max(1, len(ranked) // QUARTER)]))


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).mean())


def _blocks(blocks: Iterable[int]) -> str:
    listed = sorted(blocks)
    shown = ", ".join(map(str, listed[:8]))
    return f"block{'s' if len(listed) > 1 else ''} {shown}" + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
