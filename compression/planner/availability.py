"""What is built today. Everything else that the contract knows is refused by name, before anything is read.

Each step, and each value of a step's settings, is legal by ``recipe.py``; this table says which of them can be worked
now, with the paper a step follows and what is known about it. ``GET /v1/steps`` shows the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from compression.errors import NotAvailable
from compression.recipe import STEPS, AnyStep, Recipe, step_schema
from compression.request import Compression


@dataclass(frozen=True)
class StepFacts:
    """What there is to know about a step besides its settings."""

    paper: str
    evidence: str
    """One sentence of measured results, with where they come from."""
    explanation: str
    """A paragraph for people: what it does, saves and costs, when to use it and when not, which engines it needs."""
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
        "Sets the least important weights inside every expert to zero; every expert stays. On its own it saves nothing: a "
        "zero in a dense tensor takes the bytes of any other weight, and no engine computes less for it. Only an n:m "
        "pattern, alone and in profile custom, is stored without its zeros (2:4 in 9/16 of bf16), and memory while running "
        "is still that of the dense model. Without half of its experts' weights Mixtral-8x7B loses under two of 71.5 points, "
        "in 2:4 about five; 3 bits by gptq hurt less in a fifth of the bytes. Use it to study sparsity, or for an engine of "
        "your own; to fit a model into memory, quantize. Dense zeros open everywhere, packed ones with the loader that ships "
        "in the artifact.",
    ),
    "quantize": StepFacts(
        "GPTQ, arXiv:2210.17323; AWQ, arXiv:2306.00978",
        "At 4 bits Mixtral-8x7B keeps 70.9 of 71.5 points by gptq, 70.8 by awq, in 24.4 of 87.7 GiB (arXiv:2406.02500, table 6); "
        "at 3 bits and one scale a row, 36.1 of 56.8 by awq and 18.6 by rounding (arXiv:2505.03804, other tasks).",
        "Stores weights as integers of 8, 4, 3 or 2 bits with one scale for a group of inputs, or as 8-bit floats; gptq and "
        "awq look at calibration text to make rounding hurt less, rtn needs none. What is quantized shrinks to about 51, 26, "
        "20 or 14 % of its bf16 bytes. Arithmetic stays the same; engines that compute on packed weights read less and so "
        "decode faster. 8 bits are all but free, 4 bits cost Mixtral-8x7B less than one of 71.5 points, 3 and 2 bits cost "
        "more and unlike amounts from model to model. It is the first lever to pull, for nothing else saves as much for as "
        "little. Go below 4 bits when 4 do not fit and every expert sees enough tokens, and leave attention, which is small "
        "and dear, at 4 or more. 8 and 4 bits open in vLLM and stock transformers, 3 and 2 bits need profile custom and open "
        "in stock transformers alone, which unpacks experts when it loads them.",
    ),
    "expert_drop": StepFacts(
        "REAP, arXiv:2510.13999; NAEE, arXiv:2402.14800; MAN and MSAN, arXiv:2606.15716; HOPE, arXiv:2609.18916; AIMER, "
        f"arXiv:2603.18492; routing_score as in {_UNIFIED}",
        "With half the experts Qwen3-30B-A3B scores .541 on code by reap and .452 by frequency, against .558 (arXiv:2510.13999); "
        "with 6 of 8 Mixtral-8x7B keeps 64.2 of 67.6 points by reconstruction, 63.0 at random and 60.8 by frequency "
        "(arXiv:2402.14800).",
        "Removes whole experts with their rows in the router; one of ten criteria says which, nearly all by calibration "
        "text. Saves bytes in exact proportion, and no arithmetic: a token uses as many experts as before. The price hangs "
        "on how alike the calibration text and the model's use are: half of Qwen3-30B-A3B's 128 experts can go for .541 "
        "instead of .558 on code when the text was code, and for .217 when it was general text; models of eight experts "
        "collapse when more than half go. Use it first where analyze finds experts that are hardly used, which are nearly "
        "free to drop, and otherwise after 4 bits: 2 of 8 experts cost Mixtral-8x7B six points and left 66.7 GiB, 4 bits "
        "cost less than one and left 24.4. Equal counts open in every stock engine; scope global leaves unequal ones, for "
        "profile custom and its loader.",
    ),
    "expert_merge": StepFacts(
        "REAM, arXiv:2604.04356",
        "With 96 of 128 experts Qwen3-30B keeps 65.8 of 69.7 points on multiple choice and 67.7 of 70.9 on generation.",
        "Keeps the experts with the highest reap scores and folds every other one into the expert that answers most like it, "
        "neurons matched one to one first. Saves what expert_drop saves at the same count, no arithmetic, and takes minutes "
        "a layer where experts are wide. Whether it beats dropping is disputed: with 96 of 128 experts Qwen3-30B kept 67.7 "
        "points on generation by ream and 64.1 by reap, and in our own trials on experts trained from scratch it lost every "
        "time. Use it where experts were copied from one dense model, which analyze tells, and compare with expert_drop; not "
        "on other models, nor to go below half. Counts stay equal, so every stock engine opens the result.",
    ),
    "layer_drop": StepFacts(
        _UNIFIED,
        "Mixtral-8x7B at 4 bits without 8 of its 32 MoE layers keeps 92.4 % of its average in 20.0 GiB.",
        "Takes out the MoE layers that change the residual stream least, each with its norm; the block's attention and its "
        "cache stay. Saves all bytes and all arithmetic of those layers. Mixtral-8x7B at 4 bits without 8 of 32 shrinks from "
        "24.4 to 20.0 GiB, runs 1.19 times as fast and loses 4.7 of 70.8 points, twelve on ARC-C alone; DeepSeek-MoE-16B "
        "lost more this way than by dropping experts. On our quantized small model a MoE layer was always cheaper to drop "
        "than a whole block, since the attention that is spared is small. Use it below 4 bits' size when experts are few and "
        "large; not on models of many small experts. Losses of several layers grow faster than their sum. Families whose "
        "config lists dense blocks open in stock engines, others need profile custom and its loader.",
    ),
    "block_drop": StepFacts(
        f"{_UNIFIED}; ShortGPT, arXiv:2403.03853; consecutive as in arXiv:2403.17887",
        "Mixtral-8x7B at 4 bits without 5 of its 32 blocks keeps 95.1 % of its average in 21.9 GiB; without 8 it collapses.",
        "Takes out the blocks that change their input least, attention and MoE layer together. Saves all their bytes, "
        "arithmetic and key-value cache: it is the one lever that also shortens the way of every token and makes long "
        "contexts smaller. The price is steep: 5 of 32 blocks cost Mixtral-8x7B at 4 bits 2.8 of 70.8 points, 8 ruin it; on "
        "a small model one block in eight was untouchable, and losses of several blocks grew faster than their sum. Use it "
        "when speed or cache counts, or when a stock engine must open the result and 4 bits with half of the experts are "
        "still too large; not before that, and not by more than a sixth of the blocks. Opens in every stock engine.",
    ),
    "expert_skip": StepFacts(
        "NAEE, arXiv:2402.14800",
        "Skipping alone runs Mixtral-8x7B 1.08 times as fast at 66.37 of 67.58 points, and saves no memory.",
        "Leaves out, token by token while the model runs, experts whose routing weights are small beside the others'. Saves "
        "arithmetic alone: no bytes on disk, none in memory. Mixtral-8x7B ran 1.08 times as fast for 1.2 of 67.6 points; in "
        "batches the gain vanishes, since some token wants nearly every expert, and on a small model sorting weights cost "
        "more than it saved. Use it where single sequences are decoded on hardware short of arithmetic; not to fit a "
        "model into memory. Needs profile custom and the loader that ships in the artifact; vLLM runs no such model.",
    ),
    "analyze": StepFacts(
        "A Closer Look into Mixture-of-Experts, arXiv:2406.18219",
        "Routers prefer experts whose outputs are large, which is what reap scores.",
        "Changes nothing and adds tables to the report: how often each expert is used and by which domain, how alike experts "
        "are, which layers and blocks change their input least. Saves no byte and costs no quality, only one pass over the "
        "calibration text, which later steps and jobs read again. Use it before choosing levers: experts that are hardly "
        "used can go for almost nothing, experts copied from one dense model can be merged, idle layers point to layer_drop. "
        "It says nothing about text unlike the calibration text. The artifact is untouched, so every engine that opens it "
        "without the step opens it with it.",
    ),
    "recover": StepFacts(
        "Router distillation, arXiv:2603.02217",
        "Training the router alone took about two hours for Qwen3-30B and improved most trimmed models, given enough text.",
        "Would train what compression hurt: the router alone, block by block, or adapters. It would save no bytes and take "
        "no quality; its price is hours on an accelerator and far more text than calibration needs. In the paper, training "
        "the router alone improved most trimmed models. Worth its time after deep trims, not after 8 or 4 bits, which leave "
        "little to mend; the artifact would open in the same engines as before. It is not built: choose a gentler recipe "
        "instead.",
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
    if isinstance(request.recipe, Recipe):
        for position, step in enumerate(request.recipe.steps):
            yield from _missing_in_step(step, f"/recipe/steps/{position}")


def available_steps() -> list[dict[str, Any]]:
    """Return every step of the contract: what it does, whether it is built, its settings, paper, evidence and explanation."""
    return [
        {
            "name": name,
            "summary": (STEPS[name].__doc__ or "").strip(),
            "available": facts.instead is None,
            "not_available": {setting: list(values) for setting, values in facts.missing.items()},
            "schema": step_schema(STEPS[name]),
            "paper": facts.paper,
            "evidence": facts.evidence,
            "explanation": facts.explanation,
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
