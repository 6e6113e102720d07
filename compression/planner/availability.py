"""What is built today. Everything else that the contract knows is refused by name, before anything is read.

Each step, and each value of a step's settings, is legal by ``recipe.py``; this table says which of them can be worked
now, with the paper a step follows and what is known about it. ``GET /v1/steps`` shows the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from compression.errors import NotAvailable
from compression.recipe import STEPS, AnyStep, Compression, InlineText, Recipe, step_schema


@dataclass(frozen=True)
class StepFacts:
    """What there is to know about a step besides its settings."""

    paper: str
    evidence: str
    """One sentence of measured results, with where they come from."""
    instead: str | None = None
    """What to use as long as the step is not built; None for a step that is."""
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Values of its settings that are not built yet."""


_UNIFIED = "He et al., arXiv:2406.02500"
STEP_FACTS: dict[str, StepFacts] = {
    "prune": StepFacts(
        "SparseGPT, arXiv:2301.00774; Wanda, arXiv:2306.11695",
        "Without half of its experts' weights Mixtral-8x7B keeps 69.8 of 71.5 points by sparsegpt and 69.7 by wanda, in patterns "
        "2:4 66.3 and 66.6 (arXiv:2406.02500, table 5); dense zeros save no memory, and 2:4 ran at 0.91 times the speed "
        "(arXiv:2402.14800).",
    ),
    "quantize": StepFacts(
        "GPTQ, arXiv:2210.17323; AWQ, arXiv:2306.00978",
        "At 4 bits Mixtral-8x7B keeps 70.9 of 71.5 points by gptq, 70.8 by awq, in 24.4 of 87.7 GiB (arXiv:2406.02500, table 6); "
        "at 3 bits and one scale a row, 36.1 of 56.8 by awq and 18.6 by rounding (arXiv:2505.03804, other tasks).",
    ),
    "expert_drop": StepFacts(
        "REAP, arXiv:2510.13999; NAEE, arXiv:2402.14800; MAN and MSAN, arXiv:2606.15716; HOPE, arXiv:2609.18916; AIMER, "
        f"arXiv:2603.18492; routing_score as in {_UNIFIED}",
        "With half the experts Qwen3-30B-A3B scores .541 on code by reap and .452 by frequency, against .558 (arXiv:2510.13999); "
        "with 6 of 8 Mixtral-8x7B keeps 64.2 of 67.6 points by reconstruction, 63.0 at random and 60.8 by frequency "
        "(arXiv:2402.14800).",
    ),
    "expert_merge": StepFacts(
        "REAM, arXiv:2604.04356",
        "With 96 of 128 experts Qwen3-30B keeps 65.8 of 69.7 points on multiple choice and 67.7 of 70.9 on generation.",
    ),
    "layer_drop": StepFacts(
        _UNIFIED,
        "Mixtral-8x7B at 4 bits without 8 of its 32 MoE layers keeps 92.4 % of its average in 20.0 GiB.",
    ),
    "block_drop": StepFacts(
        f"{_UNIFIED}; ShortGPT, arXiv:2403.03853; consecutive as in arXiv:2403.17887",
        "Mixtral-8x7B at 4 bits without 5 of its 32 blocks keeps 95.1 % of its average in 21.9 GiB; without 8 it collapses.",
    ),
    "expert_skip": StepFacts(
        "NAEE, arXiv:2402.14800",
        "Skipping alone runs Mixtral-8x7B 1.08 times as fast at 66.37 of 67.58 points, and saves no memory.",
    ),
    "analyze": StepFacts(
        "A Closer Look into Mixture-of-Experts, arXiv:2406.18219",
        "Routers prefer experts whose outputs are large, which is what reap scores.",
    ),
    "recover": StepFacts(
        "Router distillation, arXiv:2603.02217",
        "Training the router alone took about two hours for Qwen3-30B and improved most trimmed models, given enough text.",
        instead="leave the step out and compare the report's retention",
    ),
}


class Missing(NamedTuple):
    """One thing in a request that is not built yet."""

    pointer: str
    message: str


def check_request(request: Compression) -> None:
    """Raise NotAvailable for the first thing in the request that is not built yet; nothing is ever ignored."""
    for missing in missing_in(request):
        raise NotAvailable(missing.message, pointer=missing.pointer)


def missing_in(request: Compression) -> Iterator[Missing]:
    """Yield everything in the request that is not built yet, with what to use instead."""
    if request.model.startswith("s3://"):
        yield Missing("/model", "models in s3:// are not available yet; use a hub id or file:///...")
    if isinstance(request.recipe, Recipe):
        for position, step in enumerate(request.recipe.steps):
            yield from _missing_in_step(step, f"/recipe/steps/{position}")
    yield from _missing_in_text(request)
    if request.evaluation.benchmarks:
        yield Missing("/evaluation/benchmarks", "benchmarks are not available yet; perplexity and divergence are measured always")
    if request.evaluation.speed:
        yield Missing("/evaluation/speed", "speed measurements are not available yet; leave speed out")


def available_steps() -> list[dict[str, Any]]:
    """Return every step of the contract: what it does, whether it is built, its settings, its paper and evidence."""
    return [
        {
            "name": name,
            "summary": (STEPS[name].__doc__ or "").strip(),
            "available": facts.instead is None,
            "not_available": {setting: list(values) for setting, values in facts.missing.items()},
            "schema": step_schema(STEPS[name]),
            "paper": facts.paper,
            "evidence": facts.evidence,
        }
        for name, facts in STEP_FACTS.items()
    ]


def _missing_in_step(step: AnyStep, pointer: str) -> Iterator[Missing]:
    facts = STEP_FACTS[step.step]
    if facts.instead is not None:
        yield Missing(f"{pointer}/step", f"step {step.step} is not available yet; {facts.instead}")
        return
    for setting, values in facts.missing.items():
        chosen = getattr(step, setting)
        if chosen in values:
            available = ", ".join(str(value) for value in _choices(step, setting) if value not in values)
            message = f"{step.step} with {setting} {chosen} is not available yet; available: {available}"
            yield Missing(f"{pointer}/{setting}", message)


def _choices(step: AnyStep, setting: str) -> list[str]:
    """Return the values that a setting's schema lists."""
    return step_schema(type(step))["properties"][setting]["enum"]


def _missing_in_text(request: Compression) -> Iterator[Missing]:
    source = request.calibration.source
    sources: dict[str, str | InlineText] = {"/evaluation/perplexity/source": request.evaluation.perplexity.source}
    if isinstance(source, tuple):
        sources |= {f"/calibration/source/{position}/source": domain.source for position, domain in enumerate(source)}
    else:
        sources["/calibration/source"] = source
    for pointer, text in sources.items():
        if isinstance(text, str) and text.startswith("s3://"):
            yield Missing(pointer, "text in s3:// is not available yet; use hub:..., file://... or inline text")
