"""A plan as steps: blocks go, MoE layers go, experts go, the rest is quantized; what most blocks do, then the exceptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from compression.architectures import Component
from compression.planner.inventory import Inventory
from compression.planner.levers import Levers
from compression.planner.options import Option, Selection
from compression.planner.weights import KEEP
from compression.recipe import AnyStep, BlockDrop, ExpertDrop, LayerDrop, Quantize

_Value = TypeVar("_Value", int, str)


def steps_of(selection: Selection, inventory: Inventory, levers: Levers) -> tuple[AnyStep, ...]:
    """Return the steps of a plan in normal form; none for the one that changes nothing."""
    found = (
        _block_drop(selection),
        _layer_drop(selection),
        _expert_drop(selection, inventory),
        _quantize(selection, inventory, levers),
    )
    return tuple(step for step in found if step is not None)


def _block_drop(selection: Selection) -> BlockDrop | None:
    blocks = tuple(option.block for option in selection.options if option.action == "drop_block")
    return BlockDrop.model_validate({"blocks": blocks}) if blocks else None


def _layer_drop(selection: Selection) -> LayerDrop | None:
    blocks = tuple(option.block for option in selection.options if option.action == "drop_layer")
    return LayerDrop.model_validate({"blocks": blocks}) if blocks else None


def _expert_drop(selection: Selection, inventory: Inventory) -> ExpertDrop | None:
    kept = {option.block: option.experts_kept for option in selection.options if option.experts_kept is not None}
    if all(count == inventory.experts for count in kept.values()):
        return None
    usual = _most_frequent(kept)
    others = {block: count for block, count in kept.items() if count != usual}
    return ExpertDrop.model_validate({"criterion": selection.criterion, "experts_kept": usual, "experts_kept_in": others})


def _quantize(selection: Selection, inventory: Inventory, levers: Levers) -> Quantize | None:
    if not any(option.quantizes_experts for option in selection.options):
        return None
    schemes: dict[Component, dict[int, str]] = {}
    for option in selection.options:
        for component, scheme in _schemes_of(option, inventory, levers):
            schemes.setdefault(component, {})[option.block] = scheme
    slim = {block: scheme for block, scheme in schemes["experts"].items() if scheme != KEEP}
    usual = {component: _most_frequent(slim if component == "experts" else found) for component, found in schemes.items()}
    by_block: dict[int, dict[str, str]] = {}
    for component, found in schemes.items():
        for block, scheme in found.items():
            if scheme != usual[component]:
                by_block.setdefault(block, {})[component] = scheme
    step: dict[str, Any] = {
        "scheme": usual.pop("experts"),
        "group_size": levers.group_size,
        "by_block": dict(sorted(by_block.items())),
        **usual,
    }
    return Quantize.model_validate(step)


def _schemes_of(option: Option, inventory: Inventory, levers: Levers) -> Iterator[tuple[Component, str]]:
    """Yield the scheme of each component that a block still has and that could take one."""
    whole = option.action == "keep" and inventory.blocks[option.block].is_mixture
    if option.experts is not None:
        yield "experts", option.experts
    if option.attention is not None:
        yield "attention", option.attention
    if option.others is not None:
        yield ("shared_experts" if whole else "dense"), option.others


def _most_frequent(by_block: Mapping[int, _Value]) -> _Value:
    """Return the value of most blocks; of equally many, the one that comes first."""
    return Counter(by_block[block] for block in sorted(by_block)).most_common(1)[0][0]
