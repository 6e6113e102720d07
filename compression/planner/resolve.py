"""A recipe resolved against one model: every default filled in, every impossible or unloadable wish refused.

What an engine that opens the portable profile demands is checked here: vLLM's rules for fused experts (group sizes that
divide what each device holds, counts that divide over devices, no fewer than 4 bits), stock routers' rules for groups, one
scheme for all experts. The custom profile is bound by arithmetic alone: what does not divide cannot be stored either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple, NoReturn

from compression.architectures import Component, Refusable
from compression.errors import ImpossibleStep, NotAvailable, NotLoadableInProfile
from compression.planner.inventory import Inventory, config_count
from compression.planner.named import check_first, kept_by_block, named_to_drop, refuse_open_choices, schemes_by_block
from compression.planner.sizes import FLOAT, WHOLE_ROW, Cut, matrices_to_prune, matrices_to_quantize, packed_pattern
from compression.planner.trims import (
    Target,
    blocks_dropped,
    dropped_globally,
    experts_kept,
    layers_dropped,
    listed,
    only_custom,
    refuse_part,
    spelled_by_place,
    workable_counts,
)
from compression.recipe import (
    BITS,
    LONGEST_PATTERN,
    Analyze,
    AnyStep,
    BlockDrop,
    ExpertDrop,
    ExpertMerge,
    ExpertSkip,
    LayerDrop,
    Profile,
    Prune,
    Quantize,
    Recipe,
    parse_pattern,
)
from compression.request import Serving

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
    scheme: str


def resolve(recipe: Recipe, serving: Serving, inventory: Inventory, *, profile: Profile = "portable") -> Resolved:
    """Return the resolved recipe, or refuse the first step that no checkpoint or no promised engine can hold."""
    target = Target(inventory, serving, profile)
    cut = Cut(inventory.experts)
    steps: list[AnyStep] = []
    for position in recipe.normal_order():
        step, cut = _resolve_step(recipe.steps[position], f"/recipe/steps/{position}", cut, target=target)
        steps.append(step)
    refuse_open_choices(recipe.steps, recipe.normal_order(), cut)
    _refuse_two_calibrations(recipe)
    _check_split(cut, serving, inventory)
    return Resolved(tuple(steps), replace(cut, pattern=packed_pattern(steps, profile, inventory.architecture)))


def group_size_for(inventory: Inventory, serving: Serving, components: Iterable[Component]) -> int:
    """Return the most inputs that can share a scale in every matrix of these components; -1: no group size divides them all."""
    cut = Cut(inventory.experts, schemes=dict.fromkeys(components, "W4A16"))
    widths = _widths(inventory, cut, serving)
    return next((size for size in _GROUP_SIZES if all(width.inputs % size == 0 for width in widths)), WHOLE_ROW)


def _resolve_step(step: AnyStep, pointer: str, cut: Cut, *, target: Target) -> tuple[AnyStep, Cut]:
    match step:
        case ExpertDrop(scope="global"):
            return step, replace(cut, experts_dropped=dropped_globally(step, pointer, cut, target=target))
        case ExpertDrop():
            kept = experts_kept(step, pointer, cut, target.inventory)
            cut = kept_by_block(step, pointer, cut, kept, target=target)
            return step.model_copy(update={"experts_kept": kept, "fraction_dropped": None}), cut
        case ExpertMerge():
            return step, replace(cut, experts_kept=experts_kept(step, pointer, cut, target.inventory))
        case BlockDrop():
            refuse_part("block_drop", f"{pointer}/step", target.inventory)
            named = named_to_drop(step, pointer, cut, target=target)
            dropped = blocks_dropped(step, pointer, cut, target.inventory)
            return step, replace(cut, blocks_dropped=dropped, named_blocks=cut.named_blocks | named)
        case LayerDrop():
            named = named_to_drop(step, pointer, cut, target=target)
            fewer = layers_dropped(step, pointer, cut, target=target)
            if spelled_by_place(target):
                check_first(step, pointer, cut, target=target)
            return step, replace(fewer, named_layers=cut.named_layers | named)
        case ExpertSkip():
            only_custom(step, pointer, target.profile, "no stock class skips experts at run time")
            if target.inventory.top_k < 2:
                raise ImpossibleStep("expert_skip: a token uses one expert here, so there is none to skip", pointer=pointer)
            return step, cut
        case Analyze():
            return step, cut
        case Prune():
            return step, _pruned(step, pointer, cut, target.inventory)
        case Quantize():
            return _quantized(step, pointer, cut, target=target)
        case _:
            raise NotAvailable(f"step {step.step} is not available yet", pointer=f"{pointer}/step")


def _pruned(step: Prune, pointer: str, cut: Cut, inventory: Inventory) -> Cut:
    if cut.pruned:
        raise ImpossibleStep("a weight can be pruned once; leave the second prune step out", pointer=pointer)
    refuse_part("prune", f"{pointer}/step", inventory)
    if step.shared_experts:
        refuse_part("shared_experts", f"{pointer}/shared_experts", inventory)
    cut = replace(cut, pruned=frozenset[Component](("experts", "shared_experts") if step.shared_experts else ("experts",)))
    if step.pattern is not None:
        _check_pattern(step.pattern, cut, inventory, pointer=f"{pointer}/pattern")
    return cut


def _check_pattern(pattern: str, cut: Cut, inventory: Inventory, *, pointer: str) -> None:
    """Refuse a pattern whose groups of inputs do not fill every pruned matrix."""
    length = parse_pattern(pattern).m
    matrices = list(matrices_to_prune(inventory, cut))
    for header, inputs in matrices:
        if inputs % length:
            common = gcd(*(inputs for _, inputs in matrices))
            fitting = [other for other in range(2, LONGEST_PATTERN + 1) if common % other == 0]
            raise ImpossibleStep(
                f"pattern {pattern} takes inputs in groups of {length}, which do not divide the {inputs} inputs of "
                f"{header.name!r}; groups that divide every pruned matrix: {listed(fitting)}",
                pointer=pointer,
            )


def _refuse_two_calibrations(recipe: Recipe) -> None:
    """Refuse steps that want to be calibrated differently: there is one pass for all of them."""
    steps = enumerate(recipe.steps)
    calibrated = [(position, step) for position, step in steps if isinstance(step, Prune | Quantize) and step.calibrated]
    for setting in ("routing_weighted", "propagate_error"):
        wishes = [getattr(step, setting) for _, step in calibrated]
        if len(set(wishes)) > 1:
            raise ImpossibleStep(
                f"prune and quantize share one calibration pass, but {setting} is true in one of them and false in the other; "
                "give both the same",
                pointer=f"/recipe/steps/{calibrated[-1][0]}/{setting}",
            )


def _quantized(step: Quantize, pointer: str, cut: Cut, *, target: Target) -> tuple[AnyStep, Cut]:
    if cut.schemes or cut.schemes_in:
        raise ImpossibleStep("a weight can be quantized once; leave the second quantize step out", pointer=pointer)
    _refuse_family(step, pointer, target.inventory)
    wanted: dict[Component, str] = {
        "experts": step.scheme,
        "attention": step.attention,
        "shared_experts": step.shared_experts,
        "dense": step.dense,
    }
    parts: tuple[Refusable, ...] = ("attention", "shared_experts", "dense")
    for component in parts:
        if wanted[component] != "keep":
            refuse_part(component, f"{pointer}/{component}", target.inventory)
    if step.dense != "keep" and cut.zero_dense_width is not None and all(block.is_mixture for block in target.inventory.blocks):
        raise ImpossibleStep(
            f"dense {step.dense}: the only dense layers of this model will be those of zeros that stand for dropped MoE layers; "
            "leave dense out",
            pointer=f"{pointer}/dense",
        )
    cut = replace(cut, schemes={component: scheme for component, scheme in wanted.items() if scheme != "keep"})
    cut = schemes_by_block(step, pointer, cut, target=target)
    if target.profile == "portable":
        _refuse_few_bits(step, pointer)
    group_size = _group_size(step, f"{pointer}/group_size", cut, target=target)
    return step.model_copy(update={"group_size": group_size}), replace(cut, group_size=group_size)


def _refuse_family(step: Quantize, pointer: str, inventory: Inventory) -> None:
    architecture = inventory.architecture
    refuse_part("quantize", pointer, inventory)
    if architecture.fused_on_disk:
        raise NotLoadableInProfile(
            f"{architecture.model_type} saves all experts of a layer in one 3-D tensor, and no stock loader reads "
            "that packed; use expert_drop and block_drop",
            pointer=pointer,
        )
    if step.method == "awq":
        refuse_part("awq", f"{pointer}/method", inventory)
    if step.method == "awq" and architecture.gating != "exact":
        raise ImpossibleStep(
            f"awq scales what enters down_proj by way of up_proj, and {architecture.model_type} clamps the value in between; "
            "use gptq",
            pointer=f"{pointer}/method",
        )


def _refuse_few_bits(step: Quantize, pointer: str) -> None:
    everywhere = {"scheme": step.scheme, "attention": step.attention, "shared_experts": step.shared_experts, "dense": step.dense}
    asked: dict[str, str] = {setting: scheme for setting, scheme in everywhere.items()}
    for block, given in step.by_block.items():
        asked |= {f"by_block/{block}/{component}": scheme for component, scheme in given.by_component().items()}
    for setting, scheme in asked.items():
        if BITS.get(scheme, 16) < 4:
            raise NotLoadableInProfile(
                f'{setting} {scheme}: vLLM reads 4 and 8 bits only, which profile "portable" promises to suit; '
                'use W4A16, or profile "custom" for engines that read fewer',
                pointer=f"{pointer}/{setting}",
            )


def _group_size(step: Quantize, pointer: str, cut: Cut, *, target: Target) -> int:
    """Return how many inputs share one scale; -1 where every scheme is of floats, which have one scale a row anyway."""
    widths = _widths(target.inventory, cut, target.serving)
    if cut.schemes_used == frozenset((FLOAT,)):
        if step.group_size not in (None, WHOLE_ROW):
            raise ImpossibleStep(
                f"{FLOAT} has one scale for a whole row, so group_size {step.group_size} has nothing to divide; leave it out",
                pointer=pointer,
            )
        return WHOLE_ROW
    grouped = [width for width in widths if width.scheme != FLOAT]
    fitting = [size for size in _GROUP_SIZES if all(width.inputs % size == 0 for width in grouped)]
    if step.group_size is None:
        return (*fitting, WHOLE_ROW)[0]
    if step.group_size not in (*fitting, WHOLE_ROW):
        _refuse_group(step.group_size, grouped, fitting, pointer=pointer)
    return step.group_size


def _widths(inventory: Inventory, cut: Cut, serving: Serving) -> list[_Width]:
    """Return the inputs that one device holds of each kind of matrix; those that take a layer's inner values are split."""
    split = {f"{inventory.architecture.gate_up_down[2]}.weight", "down_proj.weight", "o_proj.weight"}
    widths: list[_Width] = []
    for header, scheme in matrices_to_quantize(inventory, cut):
        devices = serving.tensor_parallel if ".".join(header.name.split(".")[-2:]) in split else 1
        if header.shape[1] % devices:
            raise NotLoadableInProfile(
                f"the {header.shape[1]} inputs of {header.name!r} cannot be split over {devices} devices",
                pointer="/serving/tensor_parallel",
            )
        widths.append(_Width(header.name, header.shape[1] // devices, scheme))
    return widths


def _refuse_group(group_size: int, widths: Iterable[_Width], fitting: Sequence[int], *, pointer: str) -> NoReturn:
    name, inputs, _ = next(width for width in widths if width.inputs % group_size)
    raise NotLoadableInProfile(
        f"group_size {group_size} does not divide the {inputs} inputs per device of {name!r}; "
        f"sizes that divide every matrix: {listed([*fitting, WHOLE_ROW])} (-1: the whole row)",
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
    if cut.experts_dropped and serving.expert_parallel > 1:
        raise NotLoadableInProfile(
            f"layers that keep different counts cannot be spread evenly over {serving.expert_parallel} devices; use scope layer",
            pointer="/serving/expert_parallel",
        )
    if cut.experts_kept % serving.expert_parallel:
        counts = workable_counts(inventory, expert_parallel=serving.expert_parallel)
        raise NotLoadableInProfile(
            f"{cut.experts_kept} experts cannot be spread evenly over {serving.expert_parallel} devices; "
            f"counts that work: {listed(counts)}",
            pointer="/serving/expert_parallel",
        )
