"""recipe + config.json + tensor headers -> what will happen and how many bytes it will be, or a refusal by name.

The checks run in the order of the functions that ``make_plan`` calls: what is not built yet, what the checkpoint is,
what the recipe makes of it, what the target allows. Recipe "auto" is searched for, and then planned like any other. No weight
is read and nothing is decided that needs one: which experts and blocks go is the study's choice, and the plan offers it only
choices that leave the bytes as they are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compression.checkpoint.headers import Checkpoint
from compression.errors import RecipeExceedsTarget, TargetUnreachable
from compression.planner.availability import check_request
from compression.planner.choice import as_predicted
from compression.planner.inventory import Block, Inventory, take_inventory
from compression.planner.levers import levers_of
from compression.planner.options import Selection
from compression.planner.prices import Prices
from compression.planner.prior import usual_prices
from compression.planner.resolve import Resolved, resolve
from compression.planner.search import Search
from compression.planner.sizes import Cut, artifact_sizes, kv_cache_bytes, memory_class
from compression.planner.smallest import smallest_cut
from compression.planner.warnings import solvers, warnings_of
from compression.recipe import AnyStep, Recipe
from compression.request import Compression, Serving


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


class PlanTrial(PlanPart):
    """A plan that was tried for real before one was followed."""

    bytes: int
    steps: tuple[dict[str, Any], ...]
    predicted_loss: float
    measured_loss: float
    """As it will be written: tried with weights rounded to nearest, less what is known of the difference."""
    standard_error: float
    chosen: bool


class Plan(PlanPart):
    """A recipe resolved against one model. Losses are divergences from the original in nats per token, on calibration text."""

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
    predicted_loss: float | None
    """None for a recipe that was written out."""
    frontier: tuple[FrontierPoint, ...]
    """From the smallest plan to the untouched model, each larger and better than the one before; for recipe "auto" alone."""
    trials: tuple[PlanTrial, ...] = ()
    provisional: bool
    """Whether the study may still change the steps; never for a recipe that was written out."""
    warnings: tuple[PlanWarning, ...]

    @property
    def tensor_bytes(self) -> int:
        """The tensor bytes of the artifact's files, exactly."""
        return self.bytes_after - self.components["kv_cache"] - self.components["overhead"]


def make_plan(request: Compression, checkpoint: Checkpoint, prices: Prices | None = None) -> Plan:
    """Return what will happen, or raise the RequestError that names what can never succeed.

    ``prices``: what a study of this model found, for recipe "auto"; without them it goes by usual ones and is provisional.
    """
    check_request(request)
    inventory = take_inventory(checkpoint)
    if not isinstance(request.recipe, Recipe):
        search = search_for(request, inventory, prices)
        return plan_selection(request, inventory, search, best_of(search, request))
    resolved = resolve(request.recipe, request.serving, inventory, profile=request.profile)
    smallest = bytes_with_serving(inventory, smallest_cut(inventory, request.serving, request.profile), request.serving)
    plan = _plan_of(request, inventory, resolved, smallest=smallest)
    _check_target(request, bytes_after=plan.bytes_after, smallest=smallest)
    return plan


def search_for(request: Compression, inventory: Inventory, prices: Prices | None) -> Search:
    """Return the search over all plans that a request leaves open, by usual prices where none were measured."""
    usual = usual_prices(inventory, levers_of(inventory, request.serving, request.profile))
    return Search(inventory, request.serving, request.profile, prices or usual)


def best_of(search: Search, request: Compression) -> Selection:
    """Return the best plan within the target; TargetUnreachable with the fewest bytes that any has."""
    assert request.target_memory is not None, "the request's class demands it with recipe auto"
    best = search.best(request.target_memory)
    if best is None:
        smallest = search.smallest().bytes
        raise TargetUnreachable(
            f'recipe "auto" cannot bring this model to {request.target_memory} bytes; the smallest possible is {smallest}',
            pointer="/target_memory",
            smallest_possible_bytes=smallest,
        )
    return best


def plan_selection(
    request: Compression, inventory: Inventory, search: Search, selection: Selection, trials: Sequence[PlanTrial] = ()
) -> Plan:
    """Return the plan that recipe "auto" comes to."""
    steps = search.steps_of(selection)
    resolved = Resolved((), Cut(inventory.experts))
    if steps:
        resolved = resolve(Recipe(steps=steps), request.serving, inventory, profile=request.profile)
    frontier = search.frontier()
    plan = _plan_of(request, inventory, resolved, smallest=frontier[0].bytes)
    if plan.bytes_after != selection.bytes:
        raise AssertionError(f"the search counted {selection.bytes} bytes and the plan counts {plan.bytes_after}")
    points = (FrontierPoint(bytes=p.bytes, predicted_loss=p.loss, steps=_dumped(search.steps_of(p))) for p in frontier)
    warned = (PlanWarning(code=code, message=message) for code, message in _of_search(selection, search, plan, trials))
    return plan.model_copy(
        update={
            "predicted_loss": selection.loss,
            "frontier": tuple(points),
            "trials": tuple(trials),
            "provisional": bool(steps) and not search.prices.measured,
            "warnings": (*plan.warnings, *warned),
        }
    )


def _of_search(selection: Selection, search: Search, plan: Plan, trials: Sequence[PlanTrial]) -> Iterator[tuple[str, str]]:
    if not plan.steps:
        yield (
            "untouched",
            f"target_memory {plan.target_bytes} holds the model as it is ({selection.bytes} bytes): nothing changes",
        )
        return
    if not search.prices.measured:
        yield (
            "usual_prices",
            "nothing was measured on this model yet: steps, losses and frontier go by usual prices, and the job measures its "
            "own before it chooses",
        )
    for trial in trials:
        if trial.chosen and not as_predicted(trial.predicted_loss, trial.measured_loss):
            yield (
                "prediction_missed",
                f"tried for real, the plan loses {trial.measured_loss:.4f} nats per token where {trial.predicted_loss:.4f} were "
                "predicted; trust the report, and the frontier less",
            )


def _plan_of(request: Compression, inventory: Inventory, resolved: Resolved, *, smallest: int) -> Plan:
    sizes = artifact_sizes(inventory, resolved.cut)
    kv_cache = kv_cache_bytes(inventory, resolved.cut, request.serving)
    bytes_after = sizes.total + kv_cache + request.serving.overhead
    group, needed = memory_class(inventory, method=next(iter(solvers(resolved)), None))
    return Plan(
        feasible=True,
        profile=request.profile,
        bytes_before=inventory.bytes_on_disk,
        bytes_after=bytes_after,
        smallest_possible_bytes=smallest,
        target_bytes=request.target_memory,
        memory_class=group,
        steps=_dumped(resolved.steps),
        components={**sizes.components, "kv_cache": kv_cache, "overhead": request.serving.overhead},
        memory={
            "packed_engine": bytes_after,
            "transformers": bytes_with_serving(inventory, resolved.cut.dense(), request.serving),
        },
        blocks=_planned_blocks(inventory, resolved.cut, sizes.blocks),
        predicted_loss=None,
        frontier=(),
        provisional=False,
        warnings=tuple(
            PlanWarning(code=code, message=message) for code, message in warnings_of(request, resolved, inventory, needed=needed)
        ),
    )


def _dumped(steps: Iterable[AnyStep]) -> tuple[dict[str, Any], ...]:
    return tuple(step.model_dump(mode="json") for step in steps)


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
