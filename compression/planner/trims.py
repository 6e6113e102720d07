"""How many experts, MoE layers and blocks a trimming step leaves; what no checkpoint or router can hold is refused.

Bytes are exact before the study because it chooses only among what is alike: which of them go is open here, how many is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from compression.architectures import Refusable
from compression.errors import ImpossibleStep, NotLoadableInProfile
from compression.planner.inventory import Inventory
from compression.planner.sizes import Cut, expert_bytes
from compression.recipe import AnyStep, BlockDrop, ExpertDrop, ExpertMerge, LayerDrop, Profile
from compression.request import Serving
from compression.trimming.dense_layers import stock_layer_drop, zero_dense_width


class Target(NamedTuple):
    """What a recipe is resolved against."""

    inventory: Inventory
    serving: Serving
    profile: Profile


def workable_counts(inventory: Inventory, *, expert_parallel: int = 1) -> list[int]:
    """Return how many experts a layer can be left with: enough for the router, in equal groups, evenly over devices."""
    return [
        kept
        for kept in range(inventory.groups, inventory.experts + 1, inventory.groups)
        if _enough_for_router(inventory, kept) and kept % expert_parallel == 0
    ]


def only_custom(step: AnyStep, pointer: str, profile: Profile, why: str) -> None:
    """Refuse a step in any profile but custom, saying why."""
    if profile != "custom":
        raise NotLoadableInProfile(f'{step.step}: {why}; profile "custom" opens with its own loader', pointer=pointer)


def dropped_globally(step: ExpertDrop, pointer: str, cut: Cut, *, target: Target) -> int:
    """Return how many experts are gone from all layers together after a drop of scope global."""
    inventory = target.inventory
    only_custom(
        step, f"{pointer}/scope", target.profile, "with scope global layers keep different counts, and stock classes read one"
    )
    if cut.kept_in:
        raise ImpossibleStep(
            "expert_drop with scope global would choose among layers that experts_kept_in told apart; say there what each keeps",
            pointer=f"{pointer}/scope",
        )
    layers = _layers_left(inventory, cut)
    left = layers * cut.experts_kept - cut.experts_dropped
    if step.experts_kept is not None and step.experts_kept * layers > left:
        raise ImpossibleStep(
            f"expert_drop cannot keep {step.experts_kept} experts a layer: {left / layers:.2f} are left",
            pointer=f"{pointer}/experts_kept",
        )
    dropped = step.dropped_of(_spread(left, layers), groups=inventory.groups)
    least = least_experts(inventory)
    if step.criterion == "reconstruction":  # which asks the router, and that needs as many as a token uses
        least = max(least, -(-inventory.top_k // inventory.groups) * inventory.groups)
    floor = layers * least if least else 1
    if left - dropped < floor:
        raise ImpossibleStep(
            f"expert_drop would leave {left - dropped} experts in all {layers} layers; at least {floor} must stay",
            pointer=pointer,
        )
    kinds = {tuple(expert_bytes(inventory, cut, block).values()) for block in inventory.blocks if block.is_mixture}
    if len(kinds) > 1:
        raise ImpossibleStep(
            "expert_drop with scope global needs experts of one size in every layer; use scope layer", pointer=pointer
        )
    return cut.experts_dropped + dropped


def least_experts(inventory: Inventory) -> int:
    """Return how many experts a layer must keep so that its router works as it does: none at all where it has no groups."""
    return min(workable_counts(inventory)) if inventory.groups > 1 else 0


def _spread(experts: int, layers: int) -> list[int]:
    """Return counts that add up: which layer holds how many does not matter to a budget."""
    return [experts, *[0] * (layers - 1)]


def _layers_left(inventory: Inventory, cut: Cut) -> int:
    return sum(block.is_mixture for block in inventory.blocks) - cut.blocks_dropped - cut.layers_dropped


def layers_dropped(step: LayerDrop, pointer: str, cut: Cut, *, target: Target) -> Cut:
    """Return the cut without so many more MoE layers, spelt as a stock class reads it where the profile asks for that."""
    inventory = target.inventory
    refuse_part("layer_drop", pointer, inventory)
    candidates = len(inventory.droppable)
    taken = cut.blocks_dropped + cut.layers_dropped + step.layers_dropped
    if taken >= candidates:
        raise ImpossibleStep(
            f"layer_drop would leave {max(candidates - taken, 0)} of the {candidates} MoE layers that it chooses from; "
            f"at least 1 must stay, so drop at most {max(candidates - 1 - taken + step.layers_dropped, 0)}",
            pointer=f"{pointer}/layers_dropped",
        )
    layers = cut.layers_dropped + step.layers_dropped
    if target.profile == "custom":
        return replace(cut, layers_dropped=layers)
    if stock_layer_drop(inventory.architecture, inventory.config) is None:
        raise NotLoadableInProfile(
            f"layer_drop: no stock class of {inventory.architecture.model_type} opens a block without its MoE layer; "
            'use block_drop, or profile "custom", which opens with its own loader',
            pointer=pointer,
        )
    everyone = range(len(inventory.blocks))  # dense blocks stay, whatever block_drop takes
    parallel = target.serving.tensor_parallel
    width = zero_dense_width(inventory.architecture, inventory.config, everyone, tensor_parallel=parallel)
    return replace(cut, layers_dropped=layers, zero_dense_width=width)


def spelled_by_place(target: Target) -> bool:
    """Say whether the profile's stock class can only be told that the first MoE layers are gone."""
    architecture, config = target.inventory.architecture, target.inventory.config
    return target.profile == "portable" and stock_layer_drop(architecture, config) == "prefix"


def experts_kept(step: ExpertDrop | ExpertMerge, pointer: str, cut: Cut, inventory: Inventory) -> int:
    """Return how many experts a drop leaves of those that are left by now."""
    left, name = cut.experts_kept, step.step
    if step.experts_kept is not None:
        kept, pointer = step.experts_kept, f"{pointer}/experts_kept"
    else:
        assert isinstance(step, ExpertDrop), "a merge counts what it keeps"
        assert step.fraction_dropped is not None, "the step's class demands one of the two"
        kept, pointer = left - round(step.fraction_dropped * left), f"{pointer}/fraction_dropped"
    check_count(name, kept, left, pointer, inventory)
    return kept


def check_count(name: str, kept: int, left: int, pointer: str, inventory: Inventory) -> None:
    """Refuse to keep more experts than are left of a layer, or fewer than its router works with."""
    if kept > left:
        raise ImpossibleStep(f"{name} cannot keep {kept} experts: {left} are left", pointer=pointer)
    if kept < inventory.top_k:
        raise ImpossibleStep(
            f"{name} would keep {kept} experts, but the router chooses {inventory.top_k} for every token; "
            f"keep at least {inventory.top_k}",
            pointer=pointer,
        )
    if kept % inventory.groups or not _enough_for_router(inventory, kept):
        counts = listed([count for count in workable_counts(inventory) if count <= left])
        raise ImpossibleStep(
            f"{name} cannot keep {kept} experts: the router chooses {inventory.top_k} experts "
            f"within {inventory.groups_used} of {inventory.groups} equal groups; counts that work: {counts}",
            pointer=pointer,
        )


def _enough_for_router(inventory: Inventory, kept: int) -> bool:
    per_group = kept // inventory.groups
    return per_group >= inventory.architecture.group_members and per_group * inventory.groups_used >= inventory.top_k


def blocks_dropped(step: BlockDrop, pointer: str, cut: Cut, inventory: Inventory) -> int:
    """Return how many blocks are gone with this step, or refuse it: one must stay, and spans must be sure to be there."""
    candidates, dropped = len(inventory.droppable) - cut.layers_dropped, cut.blocks_dropped + step.blocks_dropped
    if dropped >= candidates:
        raise ImpossibleStep(
            f"block_drop would leave {max(candidates - dropped, 0)} of the {candidates} blocks that it chooses from; "
            f"at least 1 must stay, so drop at most {candidates - 1} in all",
            pointer=f"{pointer}/blocks_dropped",
        )
    # A block that went shortens a run by one, since its neighbours close up; a layer that went cuts it in two.
    left, layers = _longest_run(inventory.droppable) - cut.blocks_dropped, cut.layers_dropped
    run = -(-max(left - layers, 0) // (layers + 1))
    if step.selection == "consecutive" and step.blocks_dropped > run:
        raise ImpossibleStep(
            f"block_drop cannot be sure of {step.blocks_dropped} blocks in a row: {max(run, 0)} alike ones are left for certain; "
            "drop fewer, drop them first, or discrete ones",
            pointer=f"{pointer}/blocks_dropped",
        )
    return dropped


def _longest_run(blocks: Sequence[int]) -> int:
    longest = run = 0
    for place, block in enumerate(blocks):
        run = run + 1 if place and blocks[place - 1] == block - 1 else 1
        longest = max(longest, run)
    return longest


def refuse_part(part: Refusable, pointer: str, inventory: Inventory) -> None:
    """Refuse what a family's row does not allow, with its reason."""
    if reason := inventory.architecture.refuses.get(part):
        raise ImpossibleStep(f"{inventory.architecture.model_type} does not allow {part}: {reason}", pointer=pointer)


def listed(numbers: Sequence[int]) -> str:
    """Return numbers as a message shows them: some of them, where there are many."""
    if not numbers:
        return "none"
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:11], "...", shown[-1]])
