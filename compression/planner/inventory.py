"""What a checkpoint is made of: blocks, experts, routers, each tensor with its component; a broken one is refused.

config.json says what should be there and the headers say what is. Whatever they disagree on would otherwise be found
on the GPU, hours later, so it is refused here and by name. Tensors that no stock class reads (blocks past
``num_hidden_layers``, which predict further tokens, and rotary buffers) are left behind and counted nowhere.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, cast

from compression.architectures import (
    EXPERT_COUNT_SPELLINGS,
    Architecture,
    Component,
    expert_count,
    find_architecture,
)
from compression.checkpoint.headers import Checkpoint, TensorHeader
from compression.errors import BrokenCheckpoint, NotAMoE, QuantizedSource, UnsupportedArchitecture
from compression.planner.unpacked import QUANTIZATION_KEYS, Unpacked, is_quantized, unpack_headers

WEIGHT_DTYPES = ("BF16", "F16", "F32")
_MAX_EXPERTS = 2**16
_ROTARY_BUFFER = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


class Part(NamedTuple):
    """One tensor of the model; ``place`` is its name below its block, ``expert`` None for all that experts share."""

    header: TensorHeader
    place: str
    component: Component
    expert: int | None


@dataclass(frozen=True)
class Block:
    """One decoder block as it is saved."""

    index: int
    parts: tuple[Part, ...]
    is_mixture: bool

    @property
    def likeness(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """What two blocks share exactly when every cut makes them equally big: names, dtypes and shapes."""
        return tuple(sorted((part.place, part.header.dtype, part.header.shape) for part in self.parts))

    def header(self, place: str) -> TensorHeader:
        """Return the tensor saved under this name below the block."""
        for part in self.parts:
            if part.place == place:
                return part.header
        raise BrokenCheckpoint(f"block {self.index} has no tensor {place!r}")


@dataclass(frozen=True)
class Inventory:
    """A whole mixture of a known family; where the source is quantized, the dense model that it stands for."""

    architecture: Architecture
    config: Mapping[str, Any]
    """config.json, but of several towers only the language model's settings."""
    blocks: tuple[Block, ...]
    outside: tuple[Part, ...]
    left_behind: tuple[TensorHeader, ...]
    experts: int
    top_k: int
    groups: int
    groups_used: int
    bytes_on_disk: int
    """The bytes that the model's tensors take in the source, without what is left behind."""
    stored_as: str | None = None
    """How the source is quantized; None for one that is not."""

    @cached_property
    def bytes(self) -> int:
        """The bytes of the model's dense tensors, without what is left behind."""
        inside = sum(part.header.bytes for block in self.blocks for part in block.parts)
        return inside + sum(part.header.bytes for part in self.outside)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For every block, the first block that is exactly alike; equal kinds stay equally big under every cut."""
        first: dict[object, int] = {}
        return tuple(first.setdefault(block.likeness, block.index) for block in self.blocks)

    @cached_property
    def droppable(self) -> tuple[int, ...]:
        """The blocks that block_drop chooses from: the most frequent kind of mixture, so that bytes do not hang on the choice."""
        mixtures = [self.kinds[block.index] for block in self.blocks if block.is_mixture]
        ((kind, _),) = Counter(mixtures).most_common(1)
        return tuple(index for index, other in enumerate(self.kinds) if other == kind)

    @cached_property
    def expert_matrices(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one routed expert's matrices, as saved."""
        block = self.blocks[self.droppable[0]]
        routed = [part for part in block.parts if part.component == "experts" and part.expert in (0, None)]
        return tuple(part.header.shape[-2:] for part in routed if len(part.header.shape) == (2 if part.expert == 0 else 3))


def take_inventory(checkpoint: Checkpoint) -> Inventory:
    """Return what the checkpoint holds, or refuse it: unknown family, no experts, quantized in ways unknown, broken."""
    _refuse_our_own(checkpoint.config)
    source, (checkpoint, unpacked) = checkpoint, dense_checkpoint(checkpoint)
    architecture = find_architecture(checkpoint.config)
    config = architecture.settings(checkpoint.config)
    experts = _agreed_expert_count(architecture, checkpoint.config)
    top_k = _top_k(architecture, config)
    if top_k > experts:
        raise BrokenCheckpoint(f"config.json uses {top_k} experts per token and declares {experts}")
    groups, used = (config_count(config, key, default=1) for key in architecture.group_keys or ("", ""))
    if experts % groups or used > groups:
        raise BrokenCheckpoint(f"config.json routes {experts} experts in {groups} groups of which {used} are used")
    inside, outside, left_behind = _sort_tensors(architecture, checkpoint)
    _refuse_quantized_tensors([*outside, *(part for parts in inside for part in parts)])
    mixtures = expected_mixtures(architecture, config, len(inside))
    blocks = tuple(Block(index, tuple(inside[index]), expected) for index, expected in enumerate(mixtures))
    for block in blocks:
        _check_block(architecture, config, block, experts=experts)
    if not any(block.is_mixture for block in blocks):
        raise NotAMoE("no block of this model has a router, so there are no experts to compress")
    _check_same_names(architecture, blocks)
    _check_outside(architecture, checkpoint.config, outside)
    on_disk = sum(header.bytes for header in source.tensors.values()) - sum(header.bytes for header in left_behind)
    stored_as = None if unpacked is None else unpacked.stored_as
    return Inventory(
        architecture, config, blocks, tuple(outside), tuple(left_behind), experts, top_k, groups, used, on_disk, stored_as
    )


def dense_checkpoint(checkpoint: Checkpoint) -> tuple[Checkpoint, Unpacked | None]:
    """Return the unquantized checkpoint that this one stands for, and how it is unpacked; None where it need not be.

    What is left behind is passed on as it is: no stock class reads it, so it may be stored in any way.
    """
    architecture = find_architecture(checkpoint.config)
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
    if not is_quantized(checkpoint.config):
        return Checkpoint(config, checkpoint.tensors), None
    blocks = config_count(architecture.settings(config), "num_hidden_layers")
    left_behind = {name: header for name, header in checkpoint.tensors.items() if is_left_behind(architecture, name, blocks)}
    model = {name: header for name, header in checkpoint.tensors.items() if name not in left_behind}
    unpacked = unpack_headers(architecture, checkpoint.config, model)
    return Checkpoint({**config, "dtype": unpacked.dtype}, unpacked.tensors | left_behind), unpacked


def is_left_behind(architecture: Architecture, name: str, blocks: int) -> bool:
    """Say whether a saved tensor is no part of a model of that many blocks, and is therefore not copied."""
    block = architecture.block_of(name)
    return (block is not None and block >= blocks) or name.startswith("mtp.") or bool(_ROTARY_BUFFER.search(name))


def config_count(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    """Return a positive count from config.json; absent or null means the default, if there is one."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise BrokenCheckpoint(f"config.json has no proper {key}: {str(value)[:40]!r}")
    return value


def _top_k(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """Return the experts used per token; a list of them must say the same for every block."""
    key = architecture.top_k_key
    value: object = config.get(key)
    listed = cast("list[object]", value) if isinstance(value, list) else []
    return config_count({key: listed[0]} if listed and listed == listed[:1] * len(listed) else config, key)


def _refuse_our_own(config: Mapping[str, Any]) -> None:
    """Refuse an artifact of the custom profile: its blocks differ, or its zeros are packed, and steps would count wrongly."""
    if "slimtrim" in config:
        raise UnsupportedArchitecture(
            "this checkpoint was made by slimtrim in its custom profile, which is not compressed again; start from its original"
        )


def _agreed_expert_count(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """Return the expert count, once every spelling of it says the same: engines differ in which one they read."""
    experts = expert_count(architecture, config)
    if experts > _MAX_EXPERTS:
        raise BrokenCheckpoint(f"config.json declares {str(experts)[:40]} experts; more than {_MAX_EXPERTS} are not believed")
    for key in EXPERT_COUNT_SPELLINGS:
        value = architecture.settings(config).get(key)
        if value not in (None, experts):
            raise BrokenCheckpoint(f"config.json declares {experts} experts, but {key} is {str(value)[:40]!r}")
    return experts


def _refuse_quantized_tensors(parts: Iterable[Part]) -> None:
    for part in parts:
        if part.header.dtype not in WEIGHT_DTYPES:
            raise QuantizedSource(
                f"tensor {part.header.name!r} is stored as {part.header.dtype}; "
                f"{', '.join(WEIGHT_DTYPES)} can be compressed, so start from the original model"
            )


def _sort_tensors(architecture: Architecture, checkpoint: Checkpoint) -> tuple[list[list[Part]], list[Part], list[TensorHeader]]:
    """Return the parts of each block, the parts outside, and what is left behind."""
    blocks = config_count(architecture.settings(checkpoint.config), "num_hidden_layers")
    inside: defaultdict[int, list[Part]] = defaultdict(list)
    outside: list[Part] = []
    left_behind: list[TensorHeader] = []
    for name, header in checkpoint.tensors.items():
        index = architecture.block_of(name)
        if is_left_behind(architecture, name, blocks):
            left_behind.append(header)
        elif index is None:
            outside.append(Part(header, name, architecture.component_of(name), None))
        else:
            inside[index].append(_part(architecture, index, header))
    # Counted from the tensors, never by walking to num_hidden_layers: a hostile config may say a billion.
    missing = next(index for index in count() if index not in inside)
    if missing < blocks:
        raise BrokenCheckpoint(f"config.json promises {blocks} blocks (num_hidden_layers), but block {missing} has no tensors")
    return [inside[index] for index in range(blocks)], outside, left_behind


def _part(architecture: Architecture, index: int, header: TensorHeader) -> Part:
    prefix = architecture.prefix(index)
    if not header.name.startswith(prefix):
        raise BrokenCheckpoint(f"tensor {header.name!r} does not write its block's number as stock classes do")
    expert = architecture.expert_of(header.name)
    if expert is not None and not header.name.startswith(f"{architecture.experts_prefix(index)}.{expert}."):
        raise BrokenCheckpoint(f"tensor {header.name!r} does not write its expert's number as stock classes do")
    return Part(header, header.name[len(prefix) :], architecture.component_of(header.name), expert)


def expected_mixtures(architecture: Architecture, config: Mapping[str, Any], blocks: int) -> list[bool]:
    """Say for every block whether config.json means a mixture; the keys of other families are absent and say nothing."""
    types: object = config.get(architecture.dense_types_key or "")
    if types is not None:
        named = cast("list[object]", types) if isinstance(types, list) else []
        if len(named) != blocks or not {"dense", "sparse"}.issuperset(map(str, named)):
            raise BrokenCheckpoint(f"{architecture.dense_types_key} in config.json does not name each of the {blocks} blocks")
        return [name == "sparse" for name in named]
    if architecture.mixture_period is not None:
        period, first = (config_count(config, key, default=usual) for key, usual in architecture.mixture_period)
        return [index % period == first % period for index in range(blocks)]
    stated = config.get(architecture.dense_prefix_key or "")
    prefix = architecture.dense_prefix if stated is None else stated
    step = config.get(architecture.sparse_step_key or "") or 1
    listed: object = config.get(architecture.dense_list_key or "") or []
    if not isinstance(prefix, int) or not isinstance(step, int) or not isinstance(listed, list):
        raise BrokenCheckpoint("config.json does not say properly which blocks are dense")
    dense = {index for index in cast("list[object]", listed) if isinstance(index, int)}
    return [index >= prefix and index not in dense and (index + 1) % step == 0 for index in range(blocks)]


def _check_block(architecture: Architecture, config: Mapping[str, Any], block: Block, *, experts: int) -> None:
    """Refuse a block without attention, or whose feed-forward half is not what config.json says, or not whole."""
    by_component: defaultdict[Component, list[Part]] = defaultdict(list)
    for part in block.parts:
        by_component[part.component].append(part)
    routers, routed = by_component["router"], by_component["experts"]
    if not by_component["attention"]:
        raise BrokenCheckpoint(f"block {block.index} has no attention tensors")
    if any(part.header.name == architecture.router_name(block.index) for part in routers) != block.is_mixture:
        fault = "lacks" if block.is_mixture else "has"
        raise BrokenCheckpoint(f"block {block.index} {fault} {architecture.router_name(block.index)!r}, against config.json")
    for part in routers:
        if not part.header.shape or part.header.shape[architecture.expert_axis(part.header.name)] != experts:
            raise BrokenCheckpoint(
                f"router tensor {part.header.name!r} is of shape {list(part.header.shape)}, "
                f"but config.json declares {experts} experts"
            )
    if not block.is_mixture and (routed or not by_component["dense"]):
        raise BrokenCheckpoint(f"block {block.index} is dense by config.json, but its tensors are not those of a dense layer")
    if block.is_mixture and architecture.fused_on_disk:
        _check_fused(architecture, config, block.index, routed=routed, experts=experts)
    elif block.is_mixture:
        _check_experts(architecture, config, block.index, routed=routed, experts=experts)


def _check_fused(architecture: Architecture, config: Mapping[str, Any], index: int, *, routed: list[Part], experts: int) -> None:
    """Refuse a mixture saved as one tensor per matrix unless gate and up are [E, D, 2F] and down is [E, F, D], or turned."""
    width = config_count(config, architecture.expert_width_key)
    hidden = config_count(config, "hidden_size")
    shapes = {part.header.name: part.header.shape for part in routed}
    turned = "outputs first" in architecture.fused_layouts
    straight = "inputs first" in architecture.fused_layouts
    for place, (inputs, outputs) in zip(architecture.fused_places, ((hidden, 2 * width), (width, hidden)), strict=True):
        name = f"{architecture.prefix(index)}{place}"
        meant = [(experts, inputs, outputs)] * straight + [(experts, outputs, inputs)] * turned
        if shapes.get(name) not in meant:
            found = f"is of shape {list(shapes[name])}" if name in shapes else "is missing"
            raise BrokenCheckpoint(
                f"tensor {name!r} {found}; config.json means {' or '.join(str(list(shape)) for shape in meant)}"
            )
    for name, shape in shapes.items():
        if shape[:1] != (experts,):
            raise BrokenCheckpoint(f"tensor {name!r} of shape {list(shape)} does not hold {experts} experts")


def _check_experts(
    architecture: Architecture, config: Mapping[str, Any], index: int, *, routed: list[Part], experts: int
) -> None:
    """Refuse a mixture unless experts 0 to E - 1 are all there and alike."""
    prefix = architecture.experts_prefix(index)
    shapes: defaultdict[int, dict[str, tuple[str, tuple[int, ...]]]] = defaultdict(dict)
    for part in routed:
        if part.expert is None or part.expert >= experts:
            raise BrokenCheckpoint(
                f"tensor {part.header.name!r} belongs to none of the {experts} experts that config.json declares"
            )
        shapes[part.expert][part.header.name[len(f"{prefix}.{part.expert}.") :]] = (part.header.dtype, part.header.shape)
    first = shapes[0]
    _check_matrices(architecture, config, prefix, first)
    for expert in range(experts):
        if shapes[expert] != first:
            fault = next(name for name in {*first, *shapes[expert]} if first.get(name) != shapes[expert].get(name))
            raise BrokenCheckpoint(f"tensor '{prefix}.{expert}.{fault}' is missing or unlike that of expert 0")


def _check_matrices(
    architecture: Architecture, config: Mapping[str, Any], prefix: str, first: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Refuse an expert whose matrices do not form gate and up [F, D] and down [D, F]."""
    width = config_count(config, architecture.expert_width_key)
    hidden = config_count(config, "hidden_size")
    gate, up, down = architecture.gate_up_down
    for matrix, shape in ((gate, (width, hidden)), (up, (width, hidden)), (down, (hidden, width))):
        if f"{matrix}.weight" not in first:
            raise BrokenCheckpoint(f"tensor '{prefix}.0.{matrix}.weight' is missing")
        if first[f"{matrix}.weight"][1] != shape:
            raise BrokenCheckpoint(
                f"tensor '{prefix}.0.{matrix}.weight' is of shape {list(first[f'{matrix}.weight'][1])}, "
                f"but config.json means {list(shape)}"
            )


def _check_same_names(architecture: Architecture, blocks: tuple[Block, ...]) -> None:
    """Refuse a block that lacks a tensor which another block of its kind has."""
    if architecture.varied_blocks:
        _check_lacking_among_like(architecture, blocks)
    else:
        _check_lacking(architecture, blocks, ("attention", "other"))
    _check_lacking(architecture, [block for block in blocks if block.is_mixture], ("router", "shared_experts", "dense"))
    _check_lacking(architecture, [block for block in blocks if not block.is_mixture], ("dense",))


def _check_lacking_among_like(architecture: Architecture, blocks: tuple[Block, ...]) -> None:
    """Compare blocks of one kind: with the same modules for mixing tokens, both mixtures or both dense."""
    alike: defaultdict[object, list[Block]] = defaultdict(list)
    for block in blocks:
        own = {part.place for part in block.parts if part.component == "attention"}
        widths = {part.place: part.header.shape for part in block.parts if part.component == "attention"}
        modules = frozenset(place.split(".")[0] for place in own)
        alike[modules, frozenset(widths), block.is_mixture].append(block)
    for kind in alike.values():
        _check_lacking(architecture, kind, ("attention", "other"))


def _check_lacking(architecture: Architecture, blocks: Sequence[Block], components: tuple[Component, ...]) -> None:
    places = [{part.place for part in block.parts if part.component in components} for block in blocks]
    everything = set[str]().union(*places)
    for block, own in zip(blocks, places, strict=True):
        if len(own) < len(everything):
            raise BrokenCheckpoint(f"tensor '{architecture.prefix(block.index)}{min(everything - own)}' is missing")


def _check_outside(architecture: Architecture, config: Mapping[str, Any], outside: Iterable[Part]) -> None:
    needed = {f"{architecture.embedding}.weight", f"{architecture.norm}.weight"}
    said = (where.get("tie_word_embeddings") for where in (config, architecture.settings(config)))
    if not any(architecture.tied if tied is None else tied for tied in said):
        needed.add(f"{architecture.head}.weight")
    if missing := sorted(needed - {part.place for part in outside}):
        raise BrokenCheckpoint(f"tensor {missing[0]!r} is missing")
