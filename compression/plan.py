"""recipe + config.json + tensor headers -> what will happen and how many bytes it will be, or a refusal by name.

The checks run in the order of the functions that ``make_plan`` calls: what is not built yet, what the checkpoint is,
what the recipe makes of it, what the target allows. No weight is read and nothing is decided that needs one: which
experts and blocks go is the study's choice, and the plan offers it only choices that leave the bytes as they are here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compression.checkpoint.headers import Checkpoint
from compression.errors import RecipeExceedsTarget, TargetUnreachable
from compression.planner.availability import check_request
from compression.planner.inventory import Block, Inventory, take_inventory
from compression.planner.resolve import resolve
from compression.planner.sizes import Cut, artifact_sizes, kv_cache_bytes, memory_class
from compression.planner.smallest import smallest_cut
from compression.planner.warnings import solvers, warnings_of
from compression.recipe import Compression, Recipe, Serving


class PlanPart(BaseModel):
    """Frozen data; unknown names are our own mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanWarning(PlanPart):
    """Something the caller should know, that does not stop the run."""

    code: str
    message: str


class PlannedBlock(PlanPart):
    """What becomes of one block of the source; None for what a dense block does not have, and for counts left to the study."""

    index: int
    action: Literal["keep", "keep_or_drop", "drop", "drop_layer"]
    """``keep_or_drop``: the study chooses among these which blocks go, or lose their MoE layer; the others are named."""
    experts_kept: int | None
    expert_scheme: str | None
    attention_scheme: str | None
    bytes: int
    """Tensor bytes of the block in the artifact, if it stays; 0 where it is sure to go."""


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
    resolved = resolve(request.recipe, request.serving, inventory, profile=request.profile)
    sizes = artifact_sizes(inventory, resolved.cut)
    kv_cache = kv_cache_bytes(inventory, resolved.cut, request.serving)
    bytes_after = sizes.total + kv_cache + request.serving.overhead
    smallest = bytes_with_serving(inventory, smallest_cut(inventory, request.serving, request.profile), request.serving)
    _check_target(request, bytes_after=bytes_after, smallest=smallest)
    group, needed = memory_class(inventory, method=next(iter(solvers(resolved)), None))
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
            "transformers": bytes_with_serving(inventory, resolved.cut.dense(), request.serving),
        },
        blocks=_planned_blocks(inventory, resolved.cut, sizes.blocks),
        frontier=(),
        provisional=False,
        warnings=tuple(
            PlanWarning(code=code, message=message) for code, message in warnings_of(request, resolved, inventory, needed=needed)
        ),
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


def _planned_blocks(inventory: Inventory, cut: Cut, sizes: tuple[int, ...]) -> tuple[PlannedBlock, ...]:
    counted = cut.blocks_dropped + cut.layers_dropped > len(cut.named_blocks) + len(cut.named_layers)
    open_to_drop = frozenset(inventory.droppable if counted else ()) - cut.named_blocks - cut.named_layers
    return tuple(
        _planned_block(block, cut, size, is_open=block.index in open_to_drop)
        for block, size in zip(inventory.blocks, sizes, strict=True)
    )


def _planned_block(block: Block, cut: Cut, size: int, *, is_open: bool) -> PlannedBlock:
    at, gone = cut.at(block.index), block.index in cut.named_blocks
    has_experts = block.is_mixture and not gone and block.index not in cut.named_layers
    action = "drop" if gone else "drop_layer" if block.index in cut.named_layers else "keep_or_drop" if is_open else "keep"
    return PlannedBlock(
        index=block.index,
        action=action,
        experts_kept=at.experts_kept if has_experts and not cut.experts_dropped else None,
        expert_scheme=at.schemes.get("experts", "keep") if has_experts else None,
        attention_scheme=None if gone else at.schemes.get("attention", "keep"),
        bytes=size,
    )
