from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil, prod
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compression.architectures import ARCHITECTURES
from compression.checkpoint.headers import DTYPE_BITS, Checkpoint
from compression.errors import BrokenCheckpoint
from compression.planner.inventory import take_inventory
from compression.planner.sizes import (
    MEMORY_CLASSES,
    Cut,
    artifact_sizes,
    kv_cache_bytes,
    memory_class,
    packed_pattern,
    planned_tensors,
)
from compression.recipe import BITS, Pattern, Prune, Quantize
from compression.request import Serving
from tests.compression.made_checkpoints import Config, Tensors, checkpoint, deepseek, gpt_oss, mixtral, qwen

GIB = 2**30


def real_mixtral() -> Checkpoint:
    """Mixtral-8x7B, from the published shapes."""
    return checkpoint(*mixtral(blocks=32, hidden=4096, width=14336, kv=1024, vocabulary=32000))


@pytest.mark.parametrize(
    ("cut", "gib"),
    [
        (Cut(8), 87.0),
        (Cut(7), 76.5),
        (Cut(6), 66.0),
        (Cut(4), 45.0),
        (Cut(8, 4), 76.2),
        (Cut(8, 5), 73.5),
        (Cut(8, 8), 65.4),
    ],
)
def test_trims_of_mixtral_8x7b_weigh_what_the_reference_table_says(cut: Cut, gib: float):
    assert round(artifact_sizes(take_inventory(real_mixtral()), cut).total / GIB, 1) == gib


def test_mixtral_8x7b_at_four_bits_is_the_sum_done_by_hand():
    inventory = take_inventory(real_mixtral())

    total = artifact_sizes(inventory, Cut(8, 0, {"experts": "W4A16", "attention": "W4A16"}, 128)).total

    weights = 32 * (8 * 3 * 4096 * 14336 + 4096 * (4096 + 1024 + 1024 + 4096))
    matrices = 32 * (8 * 3 + 4)
    rest = 2 * (32 * (8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096)
    assert total == weights // 2 + 2 * weights // 128 + 16 * matrices + rest


@pytest.mark.parametrize(
    ("scheme", "group_size", "inputs", "bytes_of_a_row"),
    [
        ("W4A16", 32, 64, 32 + 2 * 2),
        ("W4A16", 64, 64, 32 + 2),
        ("W4A16", -1, 64, 32 + 2),
        ("W8A16", 32, 128, 128 + 4 * 2),
        ("W8A16", -1, 128, 128 + 2),
        ("W4A16", -1, 65, 36 + 2),  # 260 bits fill 9 words of 4 bytes
        ("W8A16", -1, 65, 68 + 2),
        ("W3A16", 32, 64, 24 + 2 * 2),
        ("W3A16", -1, 65, 28 + 2),  # 195 bits fill 7 words
        ("W2A16", 64, 128, 32 + 2 * 2),
        ("W2A16", -1, 65, 20 + 2),
    ],
)
def test_a_packed_row_is_its_words_and_its_scales(scheme: str, group_size: int, inputs: int, bytes_of_a_row: int):
    config, tensors = mixtral(blocks=1, hidden=inputs, width=128)
    inventory = take_inventory(checkpoint(config, tensors))

    planned = planned_tensors(inventory, Cut(8, 0, {"experts": scheme}, group_size), inventory.blocks[0])

    w1 = [tensor for tensor in planned if tensor.name_in_source.endswith("experts.3.w1.weight")]
    assert sum(tensor.bytes for tensor in w1) == 128 * bytes_of_a_row + 16
    assert [(tensor.name.rsplit(".", 1)[1], tensor.dtype) for tensor in w1] == [
        ("weight_packed", "I32"),
        ("weight_scale", "BF16"),
        ("weight_shape", "I64"),
    ]


@pytest.mark.parametrize("group_size", [32, -1])
def test_floats_are_a_byte_per_weight_and_a_scale_per_row_whatever_the_group(group_size: int):
    inventory = take_inventory(checkpoint(*mixtral(blocks=1, hidden=64, width=128)))

    planned = planned_tensors(inventory, Cut(8, 0, {"experts": "FP8_DYNAMIC"}, group_size), inventory.blocks[0])

    w2 = [tensor for tensor in planned if tensor.name_in_source.endswith("experts.3.w2.weight")]
    prefix = "model.layers.0.block_sparse_moe.experts.3.w2"
    assert [(tensor.name, tensor.dtype, tensor.shape, tensor.bytes) for tensor in w2] == [
        (f"{prefix}.weight", "F8_E4M3", (64, 128), 64 * 128),
        (f"{prefix}.weight_scale", "BF16", (64, 1), 64 * 2),
    ]


@pytest.mark.parametrize(
    ("pattern", "kept", "mask"), [((2, 4), 60, 15), ((4, 8), 60, 15), ((1, 4), 30, 15), ((3, 5), 72, 15), ((1, 40), 3, 15)]
)
def test_packed_zeros_are_the_kept_values_a_bit_per_input_and_the_shape(pattern: tuple[int, int], kept: int, mask: int):
    inventory = take_inventory(checkpoint(*mixtral(blocks=1, hidden=120, width=240)))
    cut = Cut(8, pattern=Pattern(*pattern), pruned=frozenset({"experts"}))

    planned = list(planned_tensors(inventory, cut, inventory.blocks[0]))

    w1 = [tensor for tensor in planned if tensor.name_in_source.endswith("experts.3.w1.weight")]
    prefix = "model.layers.0.block_sparse_moe.experts.3.w1"
    assert [(tensor.name, tensor.dtype, tensor.shape, tensor.bytes) for tensor in w1] == [
        (f"{prefix}.compressed", "BF16", (240, kept), 240 * kept * 2),
        (f"{prefix}.bitmask", "U8", (240, mask), 240 * mask),
        (f"{prefix}.shape", "I64", (2,), 16),
    ]
    assert {tensor.component for tensor in planned if tensor.name.endswith("bitmask")} == {"experts"}


def test_2_of_4_takes_nine_sixteenths_of_the_experts():
    inventory = take_inventory(real_mixtral())

    experts = artifact_sizes(inventory, Cut(8, pattern=Pattern(2, 4), pruned=frozenset({"experts"}))).components["experts"]

    matrices = 32 * 8 * 3
    assert experts == matrices * (4096 * 14336 * 2 * 9 // 16 + 16)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_experts_are_packed_only_where_they_are_pruned_and_never_their_gate(shared: bool):
    inventory = take_inventory(checkpoint(*qwen()))
    pruned = frozenset({"experts", "shared_experts"} if shared else {"experts"})

    planned = planned_tensors(inventory, Cut(8, pattern=Pattern(2, 4), pruned=pruned), inventory.blocks[1])

    names = {tensor.name for tensor in planned}
    assert ("model.layers.1.mlp.shared_expert.down_proj.bitmask" in names) == shared
    assert {"model.layers.1.mlp.shared_expert_gate.weight", "model.layers.1.mlp.gate.weight"} <= names


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_scales_are_stored_in_the_dtype_of_the_weight(dtype: str):
    config, tensors = mixtral(blocks=1)
    inventory = take_inventory(checkpoint(config, {name: (dtype, shape) for name, (_, shape) in tensors.items()}))

    planned = planned_tensors(inventory, Cut(8, 0, {"experts": "W4A16"}, 64), inventory.blocks[0])

    assert {tensor.dtype for tensor in planned if tensor.name.endswith("weight_scale")} == {dtype}


def test_router_norms_biases_embeddings_and_the_shared_experts_gate_stay_as_they_are():
    config, tensors = qwen()
    tensors |= {f"model.layers.{index}.self_attn.q_proj.bias": ("BF16", (64,)) for index in range(4)}
    inventory = take_inventory(checkpoint(config, tensors))
    everything = Cut(8, 0, dict.fromkeys(("experts", "attention", "shared_experts", "dense"), "W4A16"), 64)

    untouched = {
        re.sub(r"layers\.\d+", "layers.N", tensor.name)
        for block in (None, *inventory.blocks)
        for tensor in planned_tensors(inventory, everything, block)
        if tensor.scheme is None
    }

    assert untouched == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.N.input_layernorm.weight",
        "model.layers.N.post_attention_layernorm.weight", "model.layers.N.self_attn.q_proj.bias",
        "model.layers.N.mlp.gate.weight", "model.layers.N.mlp.shared_expert_gate.weight",
    }  # fmt: skip


def written(
    config: Config,
    tensors: Tensors,
    *,
    blocks: set[int],
    experts: Mapping[int, set[int]],
    schemes: Mapping[str, str],
    group: int,
    pattern: Pattern | None,
    pruned: frozenset[str],
) -> int:
    """Cut the tensors one by one, as a writer would, and return their bytes; knows nothing of the code under test."""
    total = 0
    for name, (dtype, shape) in tensors.items():
        place = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if place is None:
            total += size(dtype, shape)
            continue
        block, rest = int(place[1]), place[2]
        expert = re.search(r"experts\.(\d+)\.", rest)
        if block not in blocks or (expert and int(expert[1]) not in experts[block]):
            continue
        if re.search(r"\.(gate|router)\.(weight|bias|e_score_correction_bias)$|mlp\.experts\.[a-z_]+$", rest):
            shape = (len(experts[block]), *shape[1:])
        component = kind(rest) if rest.endswith(".weight") and len(shape) == 2 else "other"
        if component in schemes:
            total += packed(dtype, shape, schemes[component], group)
        elif pattern and component in pruned:
            rows, inputs = shape
            total += size(dtype, (rows, inputs // pattern.m * pattern.n)) + rows * ceil(inputs / 8) + 16
        else:
            total += size(dtype, shape)
    return total


def kind(rest: str) -> str:
    patterns = {
        "experts": r"experts\.\d+\.",
        "attention": "self_attn",
        "shared_experts": r"shared_experts?\.",
        "dense": r"mlp\.(gate|up|down)_proj",
    }
    return next((name for name, pattern in patterns.items() if re.search(pattern, rest)), "other")


def size(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BITS[dtype] // 8


def packed(dtype: str, shape: tuple[int, ...], scheme: str, group: int) -> int:
    rows, inputs = shape
    if scheme == "FP8_DYNAMIC":
        return rows * inputs + size(dtype, (rows, 1))
    bits = BITS[scheme]
    return 4 * rows * ceil(inputs * bits / 32) + size(dtype, (rows, inputs // group if group > 0 else 1)) + 16


FAMILIES = {
    "mixtral": mixtral,
    "qwen2_moe": lambda: qwen(blocks=5, dense=(0, 3)),
    "deepseek_v3": lambda: deepseek(mtp=0),
    "gpt_oss": gpt_oss,
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), family=st.sampled_from(sorted(FAMILIES)), group=st.sampled_from([32, 64, -1]))
def test_whatever_experts_and_blocks_are_chosen_the_bytes_are_those_of_the_plan(data: Any, family: str, group: int):
    config, tensors = FAMILIES[family]()
    inventory = take_inventory(checkpoint(config, tensors))
    kept = data.draw(st.integers(1, inventory.experts))
    gone = data.draw(st.sets(st.sampled_from(inventory.droppable), max_size=len(inventory.droppable) - 1))
    of_block = st.sets(st.integers(0, inventory.experts - 1), min_size=kept, max_size=kept)
    experts = {block.index: data.draw(of_block) for block in inventory.blocks}
    parts = st.sampled_from(["experts", "attention", "shared_experts", "dense"])
    schemes = {} if family == "gpt_oss" else data.draw(st.dictionaries(parts, st.sampled_from(sorted(BITS))))

    pruned = data.draw(st.sampled_from([frozenset[Any](), frozenset({"experts"}), frozenset({"experts", "shared_experts"})]))
    patterns = st.sampled_from([Pattern(2, 4), Pattern(1, 16), Pattern(3, 8)])
    pattern = None if schemes or family == "gpt_oss" or not pruned else data.draw(st.none() | patterns)
    way: Any = {"experts": experts, "schemes": schemes, "group": group, "pattern": pattern, "pruned": pruned}

    sizes = artifact_sizes(inventory, Cut(kept, len(gone), schemes, group, pattern, pruned))

    blocks = set(range(len(inventory.blocks))) - gone
    assert sizes.total == written(config, tensors, blocks=blocks, **way)
    assert sizes.total == sum(sizes.components.values())
    for index, bytes_of_block in enumerate(sizes.blocks):
        alone = written(config, tensors, blocks={index}, **way)
        outside = written(config, tensors, blocks=set(), **way)
        assert bytes_of_block == alone - outside


def test_a_cut_that_does_nothing_leaves_every_byte():
    inventory = take_inventory(checkpoint(*deepseek()))

    assert artifact_sizes(inventory, Cut(16)).total == inventory.bytes


def test_mixtral_8x7b_keeps_128_kib_per_token_and_108_without_five_blocks():
    inventory = take_inventory(real_mixtral())

    assert kv_cache_bytes(inventory, Cut(8), Serving(context_tokens=1000)) == 1000 * 128 * 1024
    assert kv_cache_bytes(inventory, Cut(8, 5), Serving(context_tokens=1000)) == 1000 * 108 * 1024


def test_the_cache_grows_with_every_sequence_served_at_once_and_is_nothing_without_context():
    inventory = take_inventory(checkpoint(*mixtral(blocks=2, kv=32)))

    assert kv_cache_bytes(inventory, Cut(8), Serving(context_tokens=10, batch_size=3)) == 3 * 10 * 2 * 2 * 32 * 2
    assert kv_cache_bytes(inventory, Cut(8), Serving(batch_size=3)) == 0


def test_latent_attention_keeps_the_latent_and_the_rotary_part():
    config, tensors = deepseek(latent=64, rotary=16)

    assert (
        kv_cache_bytes(take_inventory(checkpoint(config, tensors)), Cut(16), Serving(context_tokens=10)) == 4 * 10 * (64 + 16) * 2
    )


def test_a_sliding_window_bounds_the_cache_of_the_blocks_that_slide():
    inventory = take_inventory(checkpoint(*gpt_oss()))
    per_token = 2 * 32 * 2

    assert kv_cache_bytes(inventory, Cut(8), Serving(context_tokens=100)) == per_token * (8 + 100 + 8 + 100)
    assert kv_cache_bytes(inventory, Cut(8), Serving(context_tokens=5)) == per_token * 4 * 5


def test_of_unlike_caches_the_smallest_count_as_dropped_so_that_the_sum_is_a_bound():
    inventory = take_inventory(checkpoint(*gpt_oss()))

    assert kv_cache_bytes(inventory, Cut(8, 1), Serving(context_tokens=100)) == 2 * 32 * 2 * (100 + 8 + 100)


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"sliding_window": 8}, 8),
        ({"sliding_window": None}, 100),
        ({"sliding_window": 200}, 100),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, 100),
    ],
)
def test_in_mixtral_a_window_holds_for_every_block_unless_layer_types_say_otherwise(settings: Config, window: int):
    config, tensors = mixtral(blocks=1, kv=32)

    assert (
        kv_cache_bytes(take_inventory(checkpoint(config | settings, tensors)), Cut(8), Serving(context_tokens=100))
        == window * 128
    )


@pytest.mark.parametrize(("flag", "window"), [(True, 8), (False, 100), (None, 100)])
def test_in_qwen3_a_window_holds_only_where_its_flag_is_set(flag: bool | None, window: int):
    config, tensors = qwen(blocks=1, dense=())
    tensors = {name: entry for name, entry in tensors.items() if "shared" not in name}
    config |= {"model_type": "qwen3_moe", "sliding_window": 8, "use_sliding_window": flag}

    assert kv_cache_bytes(take_inventory(checkpoint(config, tensors)), Cut(8), Serving(context_tokens=100)) == window * 128


def test_a_cache_without_key_projections_is_refused_by_name():
    config, tensors = mixtral()
    tensors = {name: entry for name, entry in tensors.items() if "k_proj" not in name}

    with pytest.raises(BrokenCheckpoint, match="k_proj"):
        kv_cache_bytes(take_inventory(checkpoint(config, tensors)), Cut(8), Serving(context_tokens=1))


def test_the_memory_class_grows_with_the_block_and_with_the_solver():
    small = take_inventory(checkpoint(*mixtral()))
    large = take_inventory(real_mixtral())

    assert memory_class(small, method="gptq")[0] == "gpu.cpu"
    assert memory_class(large, method=None)[0] == "gpu.16g"
    assert memory_class(large, method="gptq")[1] - memory_class(large, method="rtn")[1] == 18 * 4096 * 14336 + 12 * 14336**2
    assert memory_class(large, method="awq") == memory_class(large, method="sparsegpt") == memory_class(large, method="gptq")
    assert memory_class(large, method="wanda") == memory_class(large, method=None)
    assert 2 * 2.7 * GIB < memory_class(large, method=None)[1] < MEMORY_CLASSES["gpu.16g"]


def test_a_block_beyond_every_class_gets_the_largest():
    config, tensors = mixtral(blocks=1, hidden=2**16, width=2**18, kv=64)

    name, needed = memory_class(take_inventory(checkpoint(config, tensors)), method="gptq")

    assert name == "gpu.141g"
    assert needed > MEMORY_CLASSES[name]


def test_the_packed_pattern_is_that_of_the_prune_step_in_the_custom_profile():
    mixtral, gpt_oss = ARCHITECTURES["mixtral"], ARCHITECTURES["gpt_oss"]
    steps = (Prune(pattern="2:4"),)

    assert packed_pattern(steps, "custom", mixtral) == Pattern(2, 4)
    assert packed_pattern(steps, "portable", mixtral) is None
    assert packed_pattern(steps, "custom", gpt_oss) is None
    assert packed_pattern((*steps, Quantize()), "custom", mixtral) is None
    assert packed_pattern((Prune(sparsity=0.5),), "custom", mixtral) is None
    assert packed_pattern((), "custom", mixtral) is None
