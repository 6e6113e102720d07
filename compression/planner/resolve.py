"""A recipe resolved against one model: every default filled in, every impossible or unloadable wish refused.

What an engine that opens the portable profile demands is checked here: vLLM's rules for fused experts (group sizes that
divide what each device holds, counts that divide over devices), stock routers' rules for groups, one scheme for all experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

from compression.architectures import Component
from compression.errors import ImpossibleStep, NotAvailable, NotLoadableInProfile
from compression.planner.inventory import Inventory, config_count
from compression.planner.sizes import QUANTIZABLE, WHOLE_ROW, Cut, artifact_sizes, matrices_to_quantize
from compression.recipe import AnyStep, BlockDrop, ExpertDrop, Quantize, Recipe, Serving

_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Resolved:
    """The steps in normal form with nothing left open, and what they do to bytes."""

    steps: tuple[AnyStep, ...]
    cut: Cut


class _Width(NamedTuple):
    """How many inputs of a matrix one device holds."""

    name: str
    inputs: int


def resolve(recipe: Recipe, serving: Serving, inventory: Inventory) -> Resolved:
    """Return the resolved recipe, or refuse the first step that no checkpoint or no promised engine can hold."""
    cut = Cut(inventory.experts)
    steps: list[AnyStep] = []
    for position in recipe.normal_order():
        step, cut = _resolve_step(recipe.steps[position], f"/recipe/steps/{position}", cut, inventory=inventory, serving=serving)
        steps.append(step)
    _check_split(cut, serving, inventory)
    return Resolved(tuple(steps), cut)


def workable_counts(inventory: Inventory, *, expert_parallel: int = 1) -> list[int]:
    """Return how many experts a layer can be left with: enough for the router, in equal groups, evenly over devices."""
    return [
        kept
        for kept in range(inventory.groups, inventory.experts + 1, inventory.groups)
        if _enough_for_router(inventory, kept) and kept % expert_parallel == 0
    ]


def smallest_cut(inventory: Inventory, serving: Serving) -> Cut:
    """Return the cut that leaves the fewest bytes that any recipe can: fewest experts and blocks, 4 bits where they shrink."""
    counts = workable_counts(inventory, expert_parallel=serving.expert_parallel) or [inventory.experts]
    kept = Cut(counts[0], len(inventory.droppable) - 1)
    if inventory.architecture.fused_on_disk:
        return kept
    packed = replace(kept, schemes=dict.fromkeys(QUANTIZABLE, "W4A16"))
    before, after = artifact_sizes(inventory, kept).components, artifact_sizes(inventory, packed).components
    # Experts are always quantized by the step, even where tiny ones grow by it.
    quantized: list[Component] = [part for part in QUANTIZABLE if part == "experts" or after[part] < before[part]]
    gained = sum(before[part] - after[part] for part in quantized)
    return replace(packed, schemes=dict.fromkeys(quantized, "W4A16")) if gained > 0 else kept


def _resolve_step(step: AnyStep, pointer: str, cut: Cut, *, inventory: Inventory, serving: Serving) -> tuple[AnyStep, Cut]:
    match step:
        case ExpertDrop():
            kept = _experts_kept(step, pointer, cut, inventory)
            return step.model_copy(update={"experts_kept": kept, "fraction_dropped": None}), replace(cut, experts_kept=kept)
        case BlockDrop():
            return step, replace(cut, blocks_dropped=_blocks_dropped(step, pointer, cut, inventory))
        case Quantize():
            return _quantized(step, pointer, cut, inventory=inventory, serving=serving)
        case _:
            raise NotAvailable(f"step {step.step} is not available yet", pointer=f"{pointer}/step")


def _experts_kept(step: ExpertDrop, pointer: str, cut: Cut, inventory: Inventory) -> int:
    """Return how many experts a drop leaves of those that are left by now."""
    left = cut.experts_kept
    if step.experts_kept is not None:
        kept, pointer = step.experts_kept, f"{pointer}/experts_kept"
    else:
        assert step.fraction_dropped is not None, "the step's class demands one of the two"
        kept, pointer = left - round(step.fraction_dropped * left), f"{pointer}/fraction_dropped"
    if kept > left:
        raise ImpossibleStep(f"expert_drop cannot keep {kept} experts: {left} are left", pointer=pointer)
    if kept < inventory.top_k:
        raise ImpossibleStep(
            f"expert_drop would keep {kept} experts, but the router chooses {inventory.top_k} for every token; "
            f"keep at least {inventory.top_k}",
            pointer=pointer,
        )
    if kept % inventory.groups or not _enough_for_router(inventory, kept):
        counts = _listed([count for count in workable_counts(inventory) if count <= left])
        raise ImpossibleStep(
            f"expert_drop cannot keep {kept} experts: the router chooses {inventory.top_k} experts "
            f"within {inventory.groups_used} of {inventory.groups} equal groups; counts that work: {counts}",
            pointer=pointer,
        )
    return kept


def _enough_for_router(inventory: Inventory, kept: int) -> bool:
    per_group = kept // inventory.groups
    return per_group >= inventory.architecture.group_members and per_group * inventory.groups_used >= inventory.top_k


def _blocks_dropped(step: BlockDrop, pointer: str, cut: Cut, inventory: Inventory) -> int:
    candidates, dropped = len(inventory.droppable), cut.blocks_dropped + step.blocks_dropped
    if dropped >= candidates:
        raise ImpossibleStep(
            f"block_drop would leave {max(candidates - dropped, 0)} of the {candidates} blocks that it chooses from; "
            f"at least 1 must stay, so drop at most {candidates - 1} in all",
            pointer=f"{pointer}/blocks_dropped",
        )
    return dropped


def _quantized(step: Quantize, pointer: str, cut: Cut, *, inventory: Inventory, serving: Serving) -> tuple[AnyStep, Cut]:
    if cut.schemes:
        raise ImpossibleStep("a weight can be quantized once; leave the second quantize step out", pointer=pointer)
    if inventory.architecture.fused_on_disk:
        raise NotLoadableInProfile(
            f"{inventory.architecture.model_type} saves all experts of a layer in one 3-D tensor, and no stock loader reads "
            "that packed; use expert_drop and block_drop",
            pointer=pointer,
        )
    wanted: dict[Component, str] = {"attention": step.attention, "shared_experts": step.shared_experts, "dense": step.dense}
    chosen: dict[Component, str] = {component: scheme for component, scheme in wanted.items() if scheme != "keep"}
    cut = replace(cut, schemes={"experts": step.scheme, **chosen})
    widths = _widths(inventory, cut, serving)
    fitting = [size for size in _GROUP_SIZES if all(width.inputs % size == 0 for width in widths)]
    if step.group_size is None:
        group_size = (*fitting, WHOLE_ROW)[0]
    else:
        group_size = step.group_size
        if group_size not in (*fitting, WHOLE_ROW):
            _refuse_group(group_size, widths, fitting, pointer=f"{pointer}/group_size")
    return step.model_copy(update={"group_size": group_size}), replace(cut, group_size=group_size)


def _widths(inventory: Inventory, cut: Cut, serving: Serving) -> list[_Width]:
    """Return the inputs that one device holds of each kind of matrix; those that take a layer's inner values are split."""
    split = {f"{inventory.architecture.gate_up_down[2]}.weight", "down_proj.weight", "o_proj.weight"}
    widths: list[_Width] = []
    for header in matrices_to_quantize(inventory, cut):
        devices = serving.tensor_parallel if ".".join(header.name.split(".")[-2:]) in split else 1
        if header.shape[1] % devices:
            raise NotLoadableInProfile(
                f"the {header.shape[1]} inputs of {header.name!r} cannot be split over {devices} devices",
                pointer="/serving/tensor_parallel",
            )
        widths.append(_Width(header.name, header.shape[1] // devices))
    return widths


def _refuse_group(group_size: int, widths: Iterable[_Width], fitting: Sequence[int], *, pointer: str) -> NoReturn:
    name, inputs = next(width for width in widths if width.inputs % group_size)
    raise NotLoadableInProfile(
        f"group_size {group_size} does not divide the {inputs} inputs per device of {name!r}; "
        f"sizes that divide every matrix: {_listed([*fitting, WHOLE_ROW])} (-1: the whole row)",
        pointer=pointer,
    )


def _check_split(cut: Cut, serving: Serving, inventory: Inventory) -> None:
    """Refuse what cannot be spread evenly over the devices that ``serving`` names."""
    key = inventory.architecture.expert_width_key
    width = config_count(inventory.config, key)
    if width % serving.tensor_parallel:
        raise NotLoadableInProfile(
            f"an expert's {width} inner values ({key}) cannot be split over {serving.tensor_parallel} devices",
            pointer="/serving/tensor_parallel",
        )
    if cut.experts_kept % serving.expert_parallel:
        counts = workable_counts(inventory, expert_parallel=serving.expert_parallel)
        raise NotLoadableInProfile(
            f"{cut.experts_kept} experts cannot be spread evenly over {serving.expert_parallel} devices; "
            f"counts that work: {_listed(counts)}",
            pointer="/serving/expert_parallel",
        )


def _listed(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:11], "...", shown[-1]])
