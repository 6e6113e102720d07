"""What the caller should know about a plan that stops no run.

A warning says what is going to happen, by how much, and what to do about it; its code is what programs switch on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from compression.planner.collapses import FEW_EXPERTS, collapse_of
from compression.planner.inventory import Inventory
from compression.planner.resolve import Resolved
from compression.planner.sizes import MEMORY_CLASSES, SOLVED
from compression.recipe import (
    BITS,
    Analyze,
    AnyStep,
    BlockDrop,
    ExpertDrop,
    ExpertMerge,
    ExpertSkip,
    LayerDrop,
    Prune,
    Quantize,
    Recipe,
)
from compression.request import Compression

_THREE_BITS = 3.25
"""Bits of a weight at W3A16 with its share of a scale for 64 inputs."""


class Warned(NamedTuple):
    """One warning of a plan."""

    code: str
    message: str


def warnings_of(request: Compression, resolved: Resolved, inventory: Inventory, *, needed: int) -> Iterator[Warned]:
    """Yield every warning about a resolved request; ``needed``: bytes that working on one block takes."""
    yield from _of_order(request, resolved)
    yield from _of_trims(resolved, inventory)
    yield from _of_hybrids(resolved, inventory)
    yield from _of_merges(resolved)
    yield from _of_absent_parts(resolved, inventory)
    yield from _of_engines(request, resolved, inventory)
    yield from _of_dear_levers(resolved, inventory)
    yield from _of_text(request, resolved, inventory)
    if inventory.stored_as is not None:
        yield Warned(
            "source_unpacked",
            f"the source is quantized already ({inventory.stored_as}): its {inventory.bytes_on_disk} bytes on disk "
            f"unpack to {inventory.bytes}, and what the recipe keeps is written unpacked",
        )
    if inventory.left_behind:
        names = sorted(header.name for header in inventory.left_behind)
        size = sum(header.bytes for header in inventory.left_behind)
        yield Warned(
            "mtp_dropped",
            f"{len(names)} tensors of {size} bytes are no part of the model that stock loaders build (prediction of "
            f"further tokens, rotary buffers) and are neither counted nor copied; the first is {names[0]}",
        )
    if needed > max(MEMORY_CLASSES.values()):
        yield Warned(
            "block_exceeds_memory_classes",
            f"working on one block takes about {needed} bytes, more than the largest memory class",
        )


def solvers(resolved: Resolved) -> list[str]:
    """Return the methods of the steps that solve for weights with Gram matrices."""
    return [step.method for step in resolved.steps if isinstance(step, Prune | Quantize) and step.method in SOLVED]


def _of_order(request: Compression, resolved: Resolved) -> Iterator[Warned]:
    if isinstance(request.recipe, Recipe) and request.recipe.normal_order() != tuple(range(len(request.recipe.steps))):
        order = ", ".join(step.step for step in resolved.steps)
        yield Warned("steps_reordered", f"the steps are worked in normal form: {order}")


def _of_trims(resolved: Resolved, inventory: Inventory) -> Iterator[Warned]:
    before, after = inventory.experts, min(resolved.cut.experts_kept, *resolved.cut.kept_in.values(), inventory.experts)
    if resolved.cut.experts_dropped:
        layers = sum(block.is_mixture for block in inventory.blocks) - resolved.cut.blocks_dropped - resolved.cut.layers_dropped
        after -= round(resolved.cut.experts_dropped / layers)
    if before <= FEW_EXPERTS and 2 * after < before:
        yield Warned(
            "deep_expert_drop",
            f"{before - after} of {before} experts go; models with few experts collapse when more than half of them do",
        )
    share, model_type = 1 - after / before, inventory.architecture.model_type
    for step in resolved.steps:
        if isinstance(step, ExpertDrop) and (
            known := collapse_of(step.criterion, experts=before, share=share, model_type=model_type)
        ):
            yield Warned("weak_criterion", f"{step.criterion}: {known.fact}; {known.instead}")


def _of_hybrids(resolved: Resolved, inventory: Inventory) -> Iterator[Warned]:
    if _is_hybrid(inventory) and any(isinstance(step, ExpertDrop | ExpertMerge) for step in resolved.steps):
        yield Warned(
            "hybrid_attention",
            "blocks of this model have linear attention, and such models lose more when experts go: Qwen3.5-35B without a fifth "
            "of its experts was reported with 39 % more perplexity; compare with fewer bits before you drop",
        )


def _is_hybrid(inventory: Inventory) -> bool:
    """Say whether linear attention stands in for attention in some blocks: by config.json, or by what they are made of."""
    listed = inventory.config.get("layer_types")
    if "linear_attn_config" in inventory.config or (isinstance(listed, list) and "linear_attention" in listed):
        return True
    return any(part.place.startswith("linear_attn.") for block in inventory.blocks for part in block.parts)


def _of_merges(resolved: Resolved) -> Iterator[Warned]:
    if any(isinstance(step, ExpertMerge) for step in resolved.steps):
        yield Warned(
            "merge_needs_likeness",
            "expert_merge is for experts that were copied from one dense model; on experts trained from scratch expert_drop by "
            "reap kept more every time it was tried, and analyze says which kind a model is",
        )


def _of_absent_parts(resolved: Resolved, inventory: Inventory) -> Iterator[Warned]:
    present = {part.component for block in inventory.blocks for part in block.parts}
    for component, scheme in resolved.cut.schemes.items():
        if component not in present:
            yield Warned("nothing_to_quantize", f"{component} {scheme}: this model has none")
    for component in sorted(resolved.cut.pruned - present):
        yield Warned("nothing_to_prune", f"{component}: this model has none")


def _of_engines(request: Compression, resolved: Resolved, inventory: Inventory) -> Iterator[Warned]:
    """Warn of what needs a loader of its own, of zeros that save nothing, and of bits that few engines read."""
    if why := _own_loader(resolved):
        yield Warned(
            "needs_loader",
            f"{why}, which no stock class knows: open the artifact with open_model of the slimtrim_runtime.py that ships in it, "
            "or with trust_remote_code=True",
        )
    if pattern := resolved.cut.pattern:
        yield Warned(
            "needs_loader",
            f"pruned weights are stored packed, {pattern.n} of every {pattern.m}, which no stock engine reads: open the artifact "
            "with open_model of the slimtrim_runtime.py that ships in it, which unpacks them while it loads",
        )
    elif resolved.cut.pruned:
        yield Warned("zeros_save_nothing", f"zeros in dense tensors save no memory; {_why_dense(request, resolved, inventory)}")
    if narrow := sorted({scheme for scheme in resolved.cut.schemes_used if BITS[scheme] < 4}):
        yield Warned(
            "not_for_vllm",
            f"{', '.join(narrow)}: stock transformers opens the artifact, and unpacks it; vLLM reads 4 and 8 bits only",
        )


def _of_dear_levers(resolved: Resolved, inventory: Inventory) -> Iterator[Warned]:
    """Warn of levers that were measured to cost more than another one that saves more bytes."""
    schemes = {other.attention for step in _quantizations(resolved) for other in (step, *step.by_block.values())}
    if "W2A16" in schemes:
        parts = [part for block in inventory.blocks for part in block.parts]
        held = sum(part.header.bytes for part in parts if part.component == "attention") / inventory.bytes
        yield Warned(
            "dear_attention_bits",
            f"attention at 2 bits, which is {held:.1%} of this model's bytes: in a small Mixtral that alone raised the loss by "
            ".080 nats, and all its experts at 2 bits by .040, which hold twelve times the bytes; W4A16 takes little memory more",
        )
    pattern = resolved.cut.pattern
    if pattern and 16 * pattern.n + pattern.m > _THREE_BITS * pattern.m and "quantize" not in inventory.architecture.refuses:
        yield Warned(
            "pattern_outdone",
            f"packed, {pattern.n}:{pattern.m} takes {pattern.n / pattern.m + 1 / 16:.0%} of 16-bit weights; 3 bits by gptq take "
            "20 % and cost less: a small Mixtral went from perplexity 40.1 to 40.2 at 3 bits, and to 41.2 by sparsegpt and 46.9 "
            "by wanda in 2:4; quantize to W3A16 or W4A16 instead to save memory",
        )


def _quantizations(resolved: Resolved) -> list[Quantize]:
    return [step for step in resolved.steps if isinstance(step, Quantize)]


def _own_loader(resolved: Resolved) -> str | None:
    """Say what makes a trimmed model one that stock classes do not open; None if they do."""
    cut = resolved.cut
    if cut.experts_dropped or cut.kept_in:
        return "layers keep different numbers of experts"
    if any("experts" in schemes for schemes in cut.schemes_in.values()):
        return "the experts of different blocks are stored by different schemes"
    if cut.layers_dropped and cut.zero_dense_width is None:
        return f"{cut.layers_dropped} blocks have no MoE layer"
    if any(isinstance(step, ExpertSkip) for step in resolved.steps):
        return "experts are skipped at run time"
    return None


def _reads_text(step: AnyStep) -> bool:
    """Say whether a step goes by what calibration text shows of the untouched model."""
    match step:
        case ExpertDrop():
            return step.criterion not in ("aimer", "random")
        case ExpertSkip():
            return step.beta == "median"
        case ExpertMerge() | LayerDrop() | BlockDrop() | Analyze():
            return True
        case _:
            return False


def _why_dense(request: Compression, resolved: Resolved, inventory: Inventory) -> str:
    """Say what keeps pruned weights from being stored packed."""
    step = next(step for step in resolved.steps if isinstance(step, Prune))
    model_type = inventory.architecture.model_type
    if resolved.cut.schemes:
        return "they live inside the integers here, which are as many as before"
    if inventory.architecture.fused_on_disk:
        return f"{model_type} saves all experts of a layer in one 3-D tensor, which is never stored packed"
    if step.pattern is None:
        return 'only those of a pattern such as "2:4" can be stored packed, by profile "custom"'
    if request.profile == "portable":
        return 'profile "custom" stores them packed, for its own loader'
    return f"packed, {step.pattern} would take more bytes than it saves"


def _of_text(request: Compression, resolved: Resolved, inventory: Inventory) -> Iterator[Warned]:
    text = request.calibration
    calibrated = any(isinstance(step, Prune | Quantize) and step.calibrated for step in resolved.steps)
    trimmed = any(_reads_text(step) for step in resolved.steps)
    if text.source == "default" and (calibrated or trimmed):
        yield Warned(
            "default_calibration_text",
            "the calibration text that ships with slimtrim is only for trying it out; name text like the model's own use",
        )
    tokens = text.samples * text.sequence_length * inventory.top_k // resolved.cut.experts_kept
    wanted = 2 * max(shape[1] for shape in inventory.expert_matrices)
    if tokens < wanted and (methods := solvers(resolved)):
        yield Warned(
            "few_tokens_per_expert",
            f"an expert sees about {tokens} calibration tokens; {' and '.join(methods)} can be relied on from {wanted} "
            "(twice the input width), so ask for more samples or longer ones",
        )
