"""recipe + config.json + tensor headers -> what will happen and how many bytes it will be, or a refusal by name.

The checks run in the order of the functions that ``make_plan`` calls: what is not built yet, what the checkpoint is,
what the recipe makes of it, what the target allows. No weight is read and nothing is decided that needs one: which
experts and blocks go is the study's choice, and the plan offers it only choices that leave the bytes as they are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compression.checkpoint.headers import Checkpoint
from compression.errors import RecipeExceedsTarget, TargetUnreachable
from compression.planner.availability import check_request
from compression.planner.inventory import Inventory, take_inventory
from compression.planner.resolve import Resolved, resolve, smallest_cut
from compression.planner.sizes import MEMORY_CLASSES, Cut, artifact_sizes, kv_cache_bytes, memory_class
from compression.recipe import BlockDrop, Compression, ExpertDrop, Quantize, Recipe, Serving


class PlanPart(BaseModel):
    """Frozen data; unknown names are our own mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanWarning(PlanPart):
    """Something the caller should know, that does not stop the run."""

    code: str
    message: str


class PlannedBlock(PlanPart):
    """What becomes of one block of the source; None for what a dense block does not have."""

    index: int
    action: Literal["keep", "keep_or_drop"]
    """``keep_or_drop``: the study chooses among these."""
    experts_kept: int | None
    expert_scheme: str | None
    attention_scheme: str
    bytes: int
    """Tensor bytes of the block in the artifact, if it stays."""


class FrontierPoint(PlanPart):
    """Another plan that could have been chosen."""

    bytes: int
    predicted_loss: float
    steps: tuple[dict[str, Any], ...]


class Plan(PlanPart):
    """A recipe resolved against one model."""

    feasible: bool
    profile: str
    bytes_before: int
    bytes_after: int
    """Tensor bytes of the artifact, key-value cache and overhead: what ``target_memory`` bounds."""
    smallest_possible_bytes: int
    target_bytes: int | None
    memory_class: str
    steps: tuple[dict[str, Any], ...]
    components: dict[str, int]
    memory: dict[str, int]
    blocks: tuple[PlannedBlock, ...]
    frontier: tuple[FrontierPoint, ...]
    provisional: bool
    """Whether the study may still change the steps; never for a recipe that was written out."""
    warnings: tuple[PlanWarning, ...]

    @property
    def tensor_bytes(self) -> int:
        """The tensor bytes of the artifact's files, exactly."""
        return self.bytes_after - self.components["kv_cache"] - self.components["overhead"]


def make_plan(request: Compression, checkpoint: Checkpoint) -> Plan:
    """Return what will happen, or raise the RequestError that names what can never succeed."""
    check_request(request)
    assert isinstance(request.recipe, Recipe), "check_request refuses every other recipe"
    inventory = take_inventory(checkpoint)
    resolved = resolve(request.recipe, request.serving, inventory)
    sizes = artifact_sizes(inventory, resolved.cut)
    kv_cache = kv_cache_bytes(inventory, resolved.cut, request.serving)
    bytes_after = sizes.total + kv_cache + request.serving.overhead
    smallest = bytes_with_serving(inventory, smallest_cut(inventory, request.serving), request.serving)
    _check_target(request, bytes_after=bytes_after, smallest=smallest)
    group, needed = memory_class(inventory, method=_method(resolved))
    return Plan(
        feasible=True,
        profile=request.profile,
        bytes_before=inventory.bytes_on_disk,
        bytes_after=bytes_after,
        smallest_possible_bytes=smallest,
        target_bytes=request.target_memory,
        memory_class=group,
        steps=tuple(step.model_dump(mode="json") for step in resolved.steps),
        components={**sizes.components, "kv_cache": kv_cache, "overhead": request.serving.overhead},
        memory={
            "packed_engine": bytes_after,
            "transformers": bytes_with_serving(inventory, resolved.cut.unquantized(), request.serving),
        },
        blocks=_planned_blocks(inventory, resolved.cut, sizes.blocks),
        frontier=(),
        provisional=False,
        warnings=tuple(_warnings(request, resolved, inventory, needed=needed)),
    )


def bytes_with_serving(inventory: Inventory, cut: Cut, serving: Serving) -> int:
    """Return what ``target_memory`` bounds: the artifact's tensors, the key-value cache and the overhead."""
    return artifact_sizes(inventory, cut).total + kv_cache_bytes(inventory, cut, serving) + serving.overhead


def _check_target(request: Compression, *, bytes_after: int, smallest: int) -> None:
    target = request.target_memory
    if target is None or bytes_after <= target:
        return
    if smallest > target:
        raise TargetUnreachable(
            f"no recipe brings this model to {target} bytes; the smallest possible is {smallest}",
            pointer="/target_memory",
            smallest_possible_bytes=smallest,
        )
    raise RecipeExceedsTarget(
        f"the recipe leaves {bytes_after} bytes, {bytes_after - target} more than target_memory; "
        f"a stronger recipe reaches down to {smallest}",
        pointer="/target_memory",
        bytes_after=bytes_after,
    )


def _method(resolved: Resolved) -> str | None:
    return next((step.method for step in resolved.steps if isinstance(step, Quantize)), None)


def _planned_blocks(inventory: Inventory, cut: Cut, sizes: tuple[int, ...]) -> tuple[PlannedBlock, ...]:
    open_to_drop = frozenset(inventory.droppable) if cut.blocks_dropped else frozenset[int]()
    return tuple(
        PlannedBlock(
            index=block.index,
            action="keep_or_drop" if block.index in open_to_drop else "keep",
            experts_kept=cut.experts_kept if block.is_mixture else None,
            expert_scheme=cut.schemes.get("experts", "keep") if block.is_mixture else None,
            attention_scheme=cut.schemes.get("attention", "keep"),
            bytes=size,
        )
        for block, size in zip(inventory.blocks, sizes, strict=True)
    )


def _warnings(request: Compression, resolved: Resolved, inventory: Inventory, *, needed: int) -> Iterator[PlanWarning]:
    yield from _warn_of_steps(request, resolved, inventory)
    yield from _warn_of_text(request, resolved, inventory)
    if inventory.stored_as is not None:
        yield PlanWarning(
            code="source_unpacked",
            message=f"the source is quantized already ({inventory.stored_as}): its {inventory.bytes_on_disk} bytes on disk "
            f"unpack to {inventory.bytes}, and what the recipe keeps is written unpacked",
        )
    if inventory.left_behind:
        names = sorted(header.name for header in inventory.left_behind)
        size = sum(header.bytes for header in inventory.left_behind)
        yield PlanWarning(
            code="mtp_dropped",
            message=f"{len(names)} tensors of {size} bytes are no part of the model that stock loaders build (prediction of "
            f"further tokens, rotary buffers) and are neither counted nor copied; the first is {names[0]}",
        )
    if needed > max(MEMORY_CLASSES.values()):
        yield PlanWarning(
            code="block_exceeds_memory_classes",
            message=f"working on one block takes about {needed} bytes, more than the largest memory class",
        )


def _warn_of_steps(request: Compression, resolved: Resolved, inventory: Inventory) -> Iterator[PlanWarning]:
    assert isinstance(request.recipe, Recipe)
    if request.recipe.normal_order() != tuple(range(len(request.recipe.steps))):
        order = ", ".join(step.step for step in resolved.steps)
        yield PlanWarning(code="steps_reordered", message=f"the steps are worked in normal form: {order}")
    before, after = inventory.experts, resolved.cut.experts_kept
    if before <= 16 and 2 * after < before:
        yield PlanWarning(
            code="deep_expert_drop",
            message=f"{before - after} of {before} experts go; models with few experts collapse when more than half of them do",
        )
    present = {part.component for block in inventory.blocks for part in block.parts}
    for component, scheme in resolved.cut.schemes.items():
        if component not in present:
            yield PlanWarning(code="nothing_to_quantize", message=f"{component} {scheme}: this model has none")
    for step in resolved.steps:
        if isinstance(step, ExpertDrop) and step.criterion == "frequency" and before >= 64:
            yield PlanWarning(
                code="weak_criterion",
                message=f"frequency ruins generation on models of many experts (here {before}); reap keeps far more",
            )


def _warn_of_text(request: Compression, resolved: Resolved, inventory: Inventory) -> Iterator[PlanWarning]:
    text = request.calibration
    calibrated = _method(resolved) == "gptq"
    trimmed = any(isinstance(step, ExpertDrop | BlockDrop) for step in resolved.steps)
    if text.source == "default" and (calibrated or trimmed):
        yield PlanWarning(
            code="default_calibration_text",
            message="the calibration text that ships with slimtrim is only for trying it out; name text like the model's own use",
        )
    tokens = text.samples * text.sequence_length * inventory.top_k // resolved.cut.experts_kept
    wanted = 2 * max(shape[1] for shape in inventory.expert_matrices)
    if calibrated and tokens < wanted:
        yield PlanWarning(
            code="few_tokens_per_expert",
            message=f"an expert sees about {tokens} calibration tokens; gptq beats rounding reliably from {wanted} "
            "(twice the input width), so ask for more samples or longer ones",
        )
