"""Settings that name blocks: refused where the block cannot have them, or where a choice left to the study would change bytes.

Bytes are exact before the study because it chooses among blocks that are all alike. Once blocks are told apart by name, what is
left to choose must not meet them: a step that counts comes after the steps that name, and not at all beside settings by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compression.architectures import Component, Refusable
from compression.errors import ImpossibleStep, NotLoadableInProfile
from compression.planner.inventory import Block
from compression.planner.sizes import FLOAT, Cut, scheme_of
from compression.planner.trims import Target, check_count, listed, only_custom, refuse_part
from compression.recipe import AnyStep, BlockDrop, ExpertDrop, LayerDrop, Quantize

_REFUSABLE: Mapping[Component, Refusable] = {"attention": "attention", "shared_experts": "shared_experts", "dense": "dense"}


def named_to_drop(step: BlockDrop | LayerDrop, pointer: str, cut: Cut, *, target: Target) -> frozenset[int]:
    """Return the blocks that a step names; none where it only counts them."""
    if step.blocks is None:
        return frozenset()
    if isinstance(step, BlockDrop) and step.selection == "consecutive":
        raise ImpossibleStep("block_drop names its blocks, so there is nothing to select; leave selection out", pointer=pointer)
    if len(cut.named_blocks) + len(cut.named_layers) < cut.blocks_dropped + cut.layers_dropped:
        raise ImpossibleStep(
            f"{step.step} names blocks after a step has left others to be chosen, which might be the same; name them first",
            pointer=f"{pointer}/blocks",
        )
    droppable = target.inventory.droppable
    for place, block in enumerate(step.blocks):
        if block in cut.named_blocks or block in cut.named_layers:
            raise ImpossibleStep(
                f"{step.step} names block {block}, which an earlier step has dropped", pointer=f"{pointer}/blocks/{place}"
            )
        if block not in droppable:
            raise ImpossibleStep(
                f"{step.step} cannot drop anything of block {block}; blocks it can: {listed(droppable)}",
                pointer=f"{pointer}/blocks/{place}",
            )
    return frozenset(step.blocks)


def check_first(step: LayerDrop, pointer: str, cut: Cut, *, target: Target) -> None:
    """Refuse layers that are not the first ones, for stock classes that count dense blocks from the start."""
    gone = cut.named_layers | set(step.blocks or ())
    first = [block for block in target.inventory.droppable if block not in cut.named_blocks][: len(gone)]
    if step.blocks is not None and gone != frozenset(first):
        raise NotLoadableInProfile(
            f"layer_drop: stock classes of {target.inventory.architecture.model_type} open a model without its first MoE layers "
            f'alone ({listed(first)}); profile "custom" opens any with its own loader',
            pointer=f"{pointer}/blocks",
        )


def kept_by_block(step: ExpertDrop, pointer: str, cut: Cut, kept: int, *, target: Target) -> Cut:
    """Return the cut with ``kept`` experts in every MoE layer but those that the step names."""
    if cut.kept_in:
        raise ImpossibleStep(
            "expert_drop follows one that names blocks in experts_kept_in; say what every block keeps in one step",
            pointer=pointer,
        )
    by_block: dict[int, int] = {}
    for block, count in step.experts_kept_in.items():
        own = f"{pointer}/experts_kept_in/{block}"
        _check_mixture(block, own, cut, target=target)
        check_count(step.step, count, cut.experts_kept, own, target.inventory)
        if count % target.serving.expert_parallel:
            raise NotLoadableInProfile(
                f"{count} experts cannot be spread evenly over {target.serving.expert_parallel} devices", pointer=own
            )
        if count != kept:
            only_custom(step, own, target.profile, "stock classes read one expert count for all blocks")
            by_block[block] = count
    return replace(cut, experts_kept=kept, kept_in=by_block)


def _check_mixture(block: int, pointer: str, cut: Cut, *, target: Target) -> None:
    mixtures = [b.index for b in target.inventory.blocks if b.is_mixture and b.index not in cut.named_blocks | cut.named_layers]
    if block not in mixtures:
        raise ImpossibleStep(f"block {block} has no experts; blocks that have: {listed(mixtures)}", pointer=pointer)


def schemes_by_block(step: Quantize, pointer: str, cut: Cut, *, target: Target) -> Cut:
    """Return the cut with the schemes of the blocks that the step names."""
    by_block: dict[int, dict[Component, str]] = {}
    for index, given in step.by_block.items():
        own = f"{pointer}/by_block/{index}"
        kept = [block.index for block in target.inventory.blocks if block.index not in cut.named_blocks]
        if index not in kept:
            raise ImpossibleStep(f"there is no block {index} to quantize; blocks there are: {listed(kept)}", pointer=own)
        block = target.inventory.blocks[index]
        for component, scheme in given.by_component().items():
            _check_part(component, scheme, block, f"{own}/{component}", cut, target=target)
            if scheme != cut.schemes.get(component, "keep"):
                if component == "experts":
                    only_custom(step, f"{own}/experts", target.profile, "stock classes read one scheme for all routed experts")
                    _refuse_floats((scheme, step.scheme), f"{own}/experts")
                by_block.setdefault(index, {})[component] = scheme
    return replace(cut, schemes_in=by_block)


def _check_part(component: Component, scheme: str, block: Block, pointer: str, cut: Cut, *, target: Target) -> None:
    if component in _REFUSABLE and scheme != "keep":
        refuse_part(_REFUSABLE[component], pointer, target.inventory)
    has_dense = any(not other.is_mixture for other in target.inventory.blocks)
    if component == "dense" and block.index in cut.named_layers and cut.zero_dense_width is not None and has_dense:
        return  # the zeros that stand for its MoE layer are stored as real dense layers are
    gone = block.index in cut.named_layers and component in ("experts", "shared_experts")
    trial = replace(cut, schemes={component: "W8A16"}, schemes_in={})
    if gone or not any(scheme_of(part, trial, block) for part in block.parts if part.component == component):
        raise ImpossibleStep(f"block {block.index} has no matrices of {component}; leave {component} out there", pointer=pointer)


def _refuse_floats(schemes: tuple[str, ...], pointer: str) -> None:
    if FLOAT in schemes:
        raise ImpossibleStep(
            f"experts stored as {FLOAT} in some blocks and otherwise in others have no loader; use W8A16 for {FLOAT}",
            pointer=pointer,
        )


def refuse_open_choices(steps: Sequence[AnyStep], order: Sequence[int], cut: Cut) -> None:
    """Refuse a step that leaves blocks to be chosen where the recipe makes blocks differ."""
    if not cut.kept_in and not cut.schemes_in:
        return
    for position in order:
        step = steps[position]
        pointer = f"/recipe/steps/{position}"
        if isinstance(step, BlockDrop | LayerDrop) and step.blocks is None:
            raise ImpossibleStep(
                f"{step.step} leaves it open which blocks go, but the recipe stores blocks differently, so bytes would hang on "
                "the choice; name them in blocks",
                pointer=pointer,
            )
        differ = any("experts" in schemes for schemes in cut.schemes_in.values())
        if isinstance(step, ExpertDrop) and step.scope == "global" and differ:
            raise ImpossibleStep(
                "expert_drop with scope global leaves it open which experts go, but the recipe stores blocks differently; use "
                "experts_kept_in",
                pointer=f"{pointer}/scope",
            )
