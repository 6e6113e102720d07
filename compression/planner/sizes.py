"""How many bytes an artifact takes, as a sum over the very tensors that will be written.

``planned_tensors`` is the one place that says what a cut does to a tensor: vanish, lose rows, or be stored smaller.
Everything else here adds up. Layouts of a matrix [O, I], all of them compressed-tensors':

* pack-quantized, b bits in G groups: int32 words [O, ceil(I b / 32)], scales [O, G] in the weight's own dtype, the shape
  as two int64;
* float-quantized: the weight as 8-bit floats, scales [O, 1] in the dtype that it had;
* sparse bitmask, n of m kept: the kept values [O, I n / m], a bit per input [O, ceil(I / 8)] bytes, the shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple, cast

from compression.architectures import COMPONENTS, Architecture, Component
from compression.checkpoint.headers import DTYPE_BITS, TensorHeader
from compression.planner.inventory import Block, Inventory, Part, config_count
from compression.recipe import BITS, AnyStep, Pattern, Profile, Prune, Quantize, parse_pattern
from compression.request import Serving

QUANTIZABLE: tuple[Component, ...] = ("experts", "attention", "shared_experts", "dense")
MOE_LAYER: tuple[Component, ...] = ("experts", "router", "shared_experts")
"""What goes when a MoE layer goes."""
WHOLE_ROW = -1
"""The group size that gives a row of weights one scale."""
FLOAT = "FP8_DYNAMIC"
"""The scheme without groups: a row of 8-bit floats has one scale, whatever the group size."""
KEEP = "keep"
"""The scheme of what stays as it is."""
SOLVED = ("gptq", "awq", "sparsegpt")
"""Methods that work on Gram matrices: they need tokens, and memory for the matrices."""
MEMORY_CLASSES: dict[str, int] = {
    "gpu.cpu": 2 * 10**9,
    "gpu.16g": 16 * 10**9,
    "gpu.24g": 24 * 10**9,
    "gpu.48g": 48 * 10**9,
    "gpu.80g": 80 * 10**9,
    "gpu.141g": 141 * 10**9,
}
"""Bytes of device memory per class; what needs no more than the first is quick enough without an accelerator."""
_WITHOUT_CACHE = ("linear_attention", "conv", "mamba")
_MICRO_BATCH_TOKENS = 4096
_ACTIVATIONS_PER_TOKEN = 16
"""Float32 vectors of the block's widths alive at once for each token of a micro-batch: inputs, projections, outputs."""


@dataclass(frozen=True)
class Cut:
    """A recipe resolved against one model: all that decides bytes."""

    experts_kept: int
    """In every MoE layer, before any are dropped from all of them together."""
    blocks_dropped: int = 0
    schemes: Mapping[Component, str] = field(default_factory=dict[Component, str])
    """The scheme of each component that is quantized; absent means kept as it is."""
    group_size: int = WHOLE_ROW
    pattern: Pattern | None = None
    """How pruned matrices are packed; None where they are stored dense, or nothing is pruned."""
    pruned: frozenset[Component] = frozenset()
    """The components whose matrices are pruned; that alone changes no byte."""
    layers_dropped: int = 0
    """MoE layers gone from blocks that stay."""
    zero_dense_width: int | None = None
    """Inner values of the dense layer of zeros that stands where a MoE layer was; None where nothing does, not even its norm."""
    experts_dropped: int = 0
    """Experts gone from all MoE layers together: which layer loses how many is the study's choice."""
    named_blocks: frozenset[int] = frozenset()
    """Those of the dropped blocks that the recipe names; the study chooses the others."""
    named_layers: frozenset[int] = frozenset()
    """Those of the dropped MoE layers that the recipe names."""
    kept_in: Mapping[int, int] = field(default_factory=dict[int, int])
    """Blocks that keep another number of experts, with that number."""
    schemes_in: Mapping[int, Mapping[Component, str]] = field(default_factory=dict[int, Mapping[Component, str]])
    """Blocks that store some components by other schemes, or "keep" them."""

    def dense(self) -> Cut:
        """Return the same trims without slimming: what transformers holds after every weight has been unpacked."""
        return replace(self, schemes={}, schemes_in={}, pattern=None)

    def at(self, block: int) -> Cut:
        """Return what is true of one block, as if it were so of all."""
        if not self.kept_in and not self.schemes_in:
            return self
        schemes = {**self.schemes, **self.schemes_in.get(block, {})}
        return replace(
            self,
            experts_kept=self.kept_in.get(block, self.experts_kept),
            schemes={component: scheme for component, scheme in schemes.items() if scheme != KEEP},
            kept_in={},
            schemes_in={},
        )

    @property
    def schemes_used(self) -> frozenset[str]:
        """Every scheme that some matrix of some block is stored by."""
        inside = (scheme for schemes in self.schemes_in.values() for scheme in schemes.values())
        return frozenset((*self.schemes.values(), *inside)) - {KEEP}


class PlannedTensor(NamedTuple):
    """One tensor of the artifact. Blocks and experts still carry the source's numbers: which of them go is the study's choice."""

    name: str
    name_in_source: str
    component: Component
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    scheme: str | None


@dataclass(frozen=True)
class Sizes:
    """Tensor bytes of an artifact: by component, of each source block if it stays, and in all."""

    components: dict[Component, int]
    blocks: tuple[int, ...]
    total: int


def packed_pattern(steps: Iterable[AnyStep], profile: Profile, architecture: Architecture) -> Pattern | None:
    """Return the n:m pattern in which pruned matrices are stored packed; None where they are stored dense.

    Packed by the custom profile alone, since no stock loader reads it. Not where a quantize step follows, since the zeros
    then live inside the integers; not for experts saved in one 3-D tensor; and not where it would take more bytes than
    16-bit weights: n/m of their 16 bits and a bit per input.
    """
    steps = tuple(steps)
    if profile != "custom" or architecture.fused_on_disk or any(isinstance(step, Quantize) for step in steps):
        return None
    written = next((step.pattern for step in steps if isinstance(step, Prune)), None)
    pattern = parse_pattern(written) if written is not None else None
    return pattern if pattern is not None and 16 * pattern.n + pattern.m < 16 * pattern.m else None


def planned_tensors(inventory: Inventory, cut: Cut, block: Block | None) -> Iterator[PlannedTensor]:
    """Yield the artifact's tensors for one source block that stays; for None, those outside the blocks.

    Of the routed experts, the first ``experts_kept`` stand for whichever stay: they are all of one size.
    """
    cut = cut if block is None else cut.at(block.index)
    for part in inventory.outside if block is None else block.parts:
        if part.expert is not None and part.expert >= cut.experts_kept:
            continue
        scheme = scheme_of(part, cut, block)
        if scheme == FLOAT:
            yield from _floats(part, scheme)
        elif scheme is not None:
            yield from _integers(part, scheme, cut.group_size)
        elif cut.pattern is not None and is_pruned(part, cut, block):
            yield from _sparse(part, cut.pattern)
        else:
            shape = _trimmed_shape(inventory, part, cut)
            yield _planned(part, part.header.name, part.header.dtype, shape=shape, scheme=None)


def scheme_of(part: Part, cut: Cut, block: Block | None) -> str | None:
    """Return the scheme under which a tensor is stored; None for all that is no matrix of a quantized component."""
    return cut.schemes.get(part.component) if _is_matrix(part, block) else None


def is_pruned(part: Part, cut: Cut, block: Block | None) -> bool:
    """Say whether a tensor is a matrix of a pruned component; of experts saved together, each matrix is one 3-D tensor."""
    if part.component not in cut.pruned:
        return False
    return _is_matrix(part, block) or (part.component == "experts" and len(part.header.shape) == 3)


def matrices_to_prune(inventory: Inventory, cut: Cut) -> Iterator[tuple[TensorHeader, int]]:
    """Yield every kind of matrix that the cut prunes once, and how many inputs it has."""
    for kind in sorted(set(inventory.kinds)):
        block = inventory.blocks[kind]
        for part in block.parts:
            if part.expert in (None, 0) and is_pruned(part, cut, block):
                yield part.header, part.header.shape[1]  # [O, I]; saved together, experts are [E, I, O]


def matrices_to_quantize(inventory: Inventory, cut: Cut) -> Iterator[tuple[TensorHeader, str]]:
    """Yield every kind of matrix that the cut quantizes once by each of its schemes: from a block of each likeness, expert 0."""
    for kind, schemes in sorted({(kind, _schemes_at(cut, block)) for block, kind in enumerate(inventory.kinds)}):
        block, at = inventory.blocks[kind], replace(cut, schemes=dict(schemes))
        for part in block.parts:
            scheme = scheme_of(part, at, block)
            if part.expert in (None, 0) and scheme is not None:
                yield part.header, scheme


def _schemes_at(cut: Cut, block: int) -> tuple[tuple[Component, str], ...]:
    return tuple(sorted(cut.at(block).schemes.items()))


def artifact_sizes(inventory: Inventory, cut: Cut) -> Sizes:
    """Return the artifact's tensor bytes; exact before the study, since the blocks it chooses from are alike."""
    components = _by_component(planned_tensors(inventory, cut, None))
    found: dict[object, dict[Component, int]] = {}
    blocks: list[int] = []
    for index, kind in enumerate(inventory.kinds):
        at, gone = cut.at(index), index in cut.named_blocks
        key = (kind, at.experts_kept, _schemes_at(cut, index), index in cut.named_layers)
        if key not in found and not gone:
            found[key] = _block_bytes(inventory, at, inventory.blocks[kind], without_layer=index in cut.named_layers)
        sizes = {} if gone else found[key]
        _add(components, sizes, 1)
        blocks.append(sum(sizes.values()))
    _take_counted(components, inventory, cut)
    return Sizes(components, tuple(blocks), sum(components.values()))


def _block_bytes(inventory: Inventory, at: Cut, block: Block, *, without_layer: bool) -> dict[Component, int]:
    sizes = _by_component(planned_tensors(inventory, at, block))
    if without_layer:
        _add(sizes, moe_layer_bytes(inventory, at), -1)
    return sizes


def _take_counted(components: dict[Component, int], inventory: Inventory, cut: Cut) -> None:
    """Take off what the study chooses to drop: all that it chooses from are alike, so it matters not which."""
    block = inventory.blocks[inventory.droppable[0]]
    if blocks := cut.blocks_dropped - len(cut.named_blocks):
        _add(components, _by_component(planned_tensors(inventory, cut, block)), -blocks)
    if layers := cut.layers_dropped - len(cut.named_layers):
        _add(components, moe_layer_bytes(inventory, cut), -layers)
    if cut.experts_dropped:
        _add(components, expert_bytes(inventory, cut, block), -cut.experts_dropped)


def expert_bytes(inventory: Inventory, cut: Cut, block: Block) -> dict[Component, int]:
    """Return what one routed expert of a block takes, its row of the router included."""
    more, fewer = (_by_component(planned_tensors(inventory, replace(cut, experts_kept=kept), block)) for kept in (2, 1))
    return {component: more[component] - fewer[component] for component in more}


def moe_layer_bytes(inventory: Inventory, cut: Cut) -> dict[Component, int]:
    """Return what a block loses with its MoE layer: all of that, and its norm or, for a stock class, nothing but that."""
    block = inventory.blocks[inventory.droppable[0]]
    norm = f"{inventory.architecture.feed_forward_norm}."
    gone = dict.fromkeys(COMPONENTS, 0)
    for tensor in planned_tensors(inventory, cut, block):
        is_norm = inventory.architecture.place_of(tensor.name_in_source).startswith(norm)
        if tensor.component in MOE_LAYER or (is_norm and cut.zero_dense_width is None):
            gone[tensor.component] += tensor.bytes
    gone["dense"] -= _dense_layer_of_zeros(inventory, cut, block)
    return gone


def _dense_layer_of_zeros(inventory: Inventory, cut: Cut, block: Block) -> int:
    """Return the bytes of what stands where a MoE layer was: stored as the model's dense layers are, where it has any."""
    if cut.zero_dense_width is None:
        return 0
    real = next((other for other in inventory.blocks if not other.is_mixture), None)
    if real is not None:
        tensors = planned_tensors(inventory, cut, real)
        return sum(tensor.bytes for tensor in tensors if tensor.component == "dense")
    largest = max((part.header for part in block.parts), key=lambda header: prod(header.shape))
    return 3 * cut.zero_dense_width * config_count(inventory.config, "hidden_size") * DTYPE_BITS[largest.dtype] // 8


def kv_cache_bytes(inventory: Inventory, cut: Cut, serving: Serving) -> int:
    """Return the bytes of the key-value cache for every token of every sequence that is served at once.

    Where blocks differ (sliding and full attention), those with the smallest cache are taken as dropped: an upper bound.
    """
    if serving.context_tokens == 0:
        return 0
    caches = [block_cache(inventory, block, serving.context_tokens) for block in inventory.blocks]
    named = sum(caches[index] for index in cut.named_blocks)
    counted = cut.blocks_dropped - len(cut.named_blocks)
    dropped = sorted(caches[index] for index in inventory.droppable if index not in cut.named_blocks)[:counted]
    return (sum(caches) - named - sum(dropped)) * serving.batch_size


def memory_class(inventory: Inventory, *, method: str | None) -> tuple[str, int]:
    """Return the smallest class that can work on one block, and the bytes it was chosen for.

    The block twice (as read, and as rewritten), one micro-batch of activations, and for a method that solves, one expert:
    float32 weights, their feedback and int8 codes [O, I], and Gram matrix, its factor and a permuted copy [I, I].
    """
    block = max(sum(part.header.bytes for part in block.parts) for block in inventory.blocks)
    shapes = inventory.expert_matrices
    widest = max(max(shape) for shape in shapes)
    needed = 2 * block + _MICRO_BATCH_TOKENS * _ACTIVATIONS_PER_TOKEN * 4 * widest
    if method in SOLVED:
        needed += max(2 * 9 * prod(shape) + 12 * max(shape) ** 2 for shape in shapes)  # twice: gate and up are solved as one
    fitting = [name for name, size in MEMORY_CLASSES.items() if needed <= size]
    return (fitting or list(MEMORY_CLASSES)[-1:])[0], needed


def _planned(part: Part, name: str, dtype: str, *, shape: tuple[int, ...], scheme: str | None) -> PlannedTensor:
    return PlannedTensor(name, part.header.name, part.component, dtype, shape, prod(shape) * DTYPE_BITS[dtype] // 8, scheme)


def _trimmed_shape(inventory: Inventory, part: Part, cut: Cut) -> tuple[int, ...]:
    """The router counts experts in one dimension, and so do tensors that hold all experts at once."""
    counts_experts = part.component == "router" or (part.component == "experts" and inventory.architecture.fused_on_disk)
    if not counts_experts:
        return part.header.shape
    shape = list(part.header.shape)
    shape[inventory.architecture.expert_axis(part.header.name)] = cut.experts_kept
    return tuple(shape)


def _is_matrix(part: Part, block: Block | None) -> bool:
    """Say whether a tensor is the weight of a linear layer that slimming may touch."""
    header = part.header
    if block is None or len(header.shape) != 2 or not header.name.endswith(".weight"):
        return False
    if header.name.endswith("_gate.weight"):  # shared_expert_gate: one row, and what it scales is the whole expert
        return False
    return part.component != "dense" or not block.is_mixture


def _floats(part: Part, scheme: str) -> Iterator[PlannedTensor]:
    name = part.header.name
    yield _planned(part, name, "F8_E4M3", shape=part.header.shape, scheme=scheme)
    yield _planned(part, f"{name}_scale", part.header.dtype, shape=(part.header.shape[0], 1), scheme=scheme)


def _sparse(part: Part, pattern: Pattern) -> Iterator[PlannedTensor]:
    outputs, inputs = part.header.shape
    stem = part.header.name.removesuffix("weight")
    kept = (outputs, inputs * pattern.n // pattern.m)
    yield _planned(part, f"{stem}compressed", part.header.dtype, shape=kept, scheme=None)
    yield _planned(part, f"{stem}bitmask", "U8", shape=(outputs, -(-inputs // 8)), scheme=None)
    yield _planned(part, f"{stem}shape", "I64", shape=(2,), scheme=None)


def _integers(part: Part, scheme: str, group_size: int) -> Iterator[PlannedTensor]:
    outputs, inputs = part.header.shape
    groups = 1 if group_size == WHOLE_ROW else inputs // group_size
    stem = part.header.name.removesuffix("weight")
    words = (outputs, -(-inputs * BITS[scheme] // 32))
    yield _planned(part, f"{stem}weight_packed", "I32", shape=words, scheme=scheme)
    yield _planned(part, f"{stem}weight_scale", part.header.dtype, shape=(outputs, groups), scheme=scheme)
    yield _planned(part, f"{stem}weight_shape", "I64", shape=(2,), scheme=scheme)


def _by_component(tensors: Iterable[PlannedTensor]) -> dict[Component, int]:
    totals = dict.fromkeys(COMPONENTS, 0)
    for tensor in tensors:
        totals[tensor.component] += tensor.bytes
    return totals


def _add(totals: dict[Component, int], more: Mapping[Component, int], times: int) -> None:
    for component, size in more.items():
        totals[component] += times * size


def block_cache(inventory: Inventory, block: Block, context: int) -> int:
    """Keys and values of one sequence in one block; latent attention caches the latent and its rotary part instead.

    What stands in for attention in some blocks (linear attention, convolution) keeps a state that does not grow with the text,
    and is not counted.
    """
    row = inventory.architecture
    if _layer_type(inventory, block.index) in _WITHOUT_CACHE:
        return 0
    places = ("kv_a_proj_with_mqa", "indexer.wk") if row.latent_attention else ("k_proj", "v_proj")
    names = {f"{module}.{place}.weight" for module in row.attention for place in places}
    projections = [part.header for part in block.parts if part.place in names]
    if row.attention == ("self_attn",):  # where nothing stands in for attention, it must have what fills the cache
        for place in places[: 1 if row.latent_attention else 2]:
            block.header(f"self_attn.{place}.weight")
    per_token = sum(prod(header.shape[:1]) * DTYPE_BITS[header.dtype] // 8 for header in projections)
    return per_token * min(context, _window(inventory, block.index) or context)


def _layer_type(inventory: Inventory, index: int) -> object:
    listed: object = inventory.config.get("layer_types")
    layer_types = cast("list[object]", listed) if isinstance(listed, list) else []
    return layer_types[index] if index < len(layer_types) else None


def _window(inventory: Inventory, index: int) -> int | None:
    """Return the sliding window of a block; None where it sees, or may see, everything."""
    config, row = inventory.config, inventory.architecture
    if (layer_type := _layer_type(inventory, index)) is not None:
        slides = layer_type == "sliding_attention"
    else:
        slides = row.window == "everywhere" or (row.window == "flagged" and config.get("use_sliding_window") is True)
    return config_count(config, "sliding_window") if slides and config.get("sliding_window") else None
