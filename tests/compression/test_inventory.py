from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compression.errors import BrokenCheckpoint, NotAMoE, QuantizedSource, SlimtrimError, UnsupportedArchitecture
from compression.plan import make_plan
from compression.planner.inventory import take_inventory
from tests.compression.made_checkpoints import Config, Tensors, checkpoint, deepseek, gpt_oss, mixtral, qwen, request

FAMILIES = {"mixtral": mixtral, "qwen2_moe": qwen, "deepseek_v3": deepseek, "gpt_oss": gpt_oss}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_that_is_not_left_behind_is_counted_once(family: str):
    config, tensors = FAMILIES[family]()
    whole = checkpoint(config, tensors)

    inventory = take_inventory(whole)

    left_behind = sum(header.bytes for header in inventory.left_behind)
    assert inventory.bytes + left_behind == sum(header.bytes for header in whole.tensors.values())


def test_blocks_past_the_last_and_rotary_buffers_are_left_behind():
    config, tensors = deepseek(mtp=1)
    buffers: Tensors = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (8,)),
        "model.rotary_emb.inv_freq": ("F32", (8,)),
        "mtp.fc.weight": ("BF16", (8, 8)),
    }
    without = {name: entry for name, entry in tensors.items() if not name.startswith("model.layers.4.")}

    inventory = take_inventory(checkpoint(config, tensors | buffers))

    assert inventory.bytes == sum(header.bytes for header in checkpoint(config, without).tensors.values())
    assert {header.name for header in inventory.left_behind} == {*buffers, *(set(tensors) - set(without))}


def test_what_is_left_behind_may_be_quantized():
    config, tensors = deepseek()
    tensors["model.layers.4.eh_proj.weight"] = ("F8_E4M3", (64, 128))

    assert take_inventory(checkpoint(config, tensors)).experts == 16


def test_only_mixtures_that_are_alike_can_be_dropped():
    config, tensors = mixtral(blocks=5)
    tensors["model.layers.3.input_layernorm.weight"] = ("F32", (64,))

    assert take_inventory(checkpoint(config, tensors)).droppable == (0, 1, 2, 4)


def test_dense_blocks_are_never_dropped_even_where_they_are_many():
    config, tensors = qwen(blocks=5, dense=(0, 1, 3))

    assert take_inventory(checkpoint(config, tensors)).droppable == (2, 4)


def test_a_sparse_step_says_which_blocks_are_mixtures():
    config, tensors = qwen(blocks=4, dense=(0, 2))
    config |= {"mlp_only_layers": [], "decoder_sparse_step": 2}

    assert [block.is_mixture for block in take_inventory(checkpoint(config, tensors)).blocks] == [False, True, False, True]


EXPERT = "model.layers.2.block_sparse_moe.experts.5"
FUSED = "model.layers.1.mlp.experts"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


def broken_tensors() -> dict[str, tuple[Config, Tensors, str]]:
    """name of the fault -> config, tensors, and what the message must name."""

    def without(name: str) -> tuple[Config, Tensors, str]:
        config, tensors = mixtral()
        del tensors[name]
        return config, tensors, name

    def changed(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> tuple[Config, Tensors, str]:
        config, tensors = mixtral()
        return config, tensors | {name: (dtype, shape)}, name

    def configured(word: str, **settings: Any) -> tuple[Config, Tensors, str]:
        config, tensors = mixtral()
        return config | settings, tensors, word

    def renamed(old: str, new: str, word: str) -> tuple[Config, Tensors, str]:
        config, tensors = mixtral()
        return config, {name.replace(old, new): entry for name, entry in tensors.items()}, word

    fused_config, fused = gpt_oss()
    dense_config, dense = qwen()
    return {
        "an expert lacks a matrix": without(f"{EXPERT}.w2.weight"),
        "expert 0 lacks a matrix": without("model.layers.2.block_sparse_moe.experts.0.w3.weight"),
        "an expert is unlike the others": changed(f"{EXPERT}.w1.weight", (96, 64)),
        "an expert is of another dtype": changed(f"{EXPERT}.w1.weight", (128, 64), "F16"),
        "an expert more than declared": changed("model.layers.2.block_sparse_moe.experts.8.w1.weight", (128, 64)),
        "an expert number with a zero before it": changed("model.layers.2.block_sparse_moe.experts.05.w1.weight", (128, 64)),
        "a block number with a zero before it": changed("model.layers.02.block_sparse_moe.extra", (1,)),
        "a block number in other digits": changed("model.layers.٢.block_sparse_moe.extra", (1,)),
        "experts beside numbered experts": changed("model.layers.2.block_sparse_moe.experts.gate_up_proj", (8, 64, 256)),
        "a router with too few rows": changed(GATE, (7, 64)),
        "a router that is a number": changed(GATE, ()),
        "a router is missing": without(GATE),
        "an attention matrix is missing": without("model.layers.3.self_attn.k_proj.weight"),
        "a norm is missing": without("model.layers.0.post_attention_layernorm.weight"),
        "the embedding is missing": without("model.embed_tokens.weight"),
        "the head is missing": without("lm_head.weight"),
        "a correction bias of another length": (*_deepseek_with("e_score_correction_bias", (15,)), "e_score_correction_bias"),
        "more blocks than tensors": configured("block 4", num_hidden_layers=5),
        "a billion blocks": configured("block 4", num_hidden_layers=10**9),
        "no blocks": configured("num_hidden_layers", num_hidden_layers=0),
        "blocks are a fraction": configured("num_hidden_layers", num_hidden_layers=4.0),
        "another expert count": configured("router", num_local_experts=6),
        "a billion experts": configured("not believed", num_local_experts=10**9),
        "a count of 4000 digits": configured("not believed", num_local_experts=10**4000),
        "a width of 4000 digits": configured("intermediate_size", intermediate_size=10**4000),
        "two spellings disagree": configured("num_experts", num_experts=16),
        "no expert count": configured("num_local_experts", num_local_experts=None),
        "more experts per token than there are": configured("9 experts per token", num_experts_per_tok=9),
        "no experts per token": configured("num_experts_per_tok", num_experts_per_tok=None),
        "another expert width": configured("w1.weight", intermediate_size=256),
        "another hidden size": configured("w1.weight", hidden_size=32),
        "foreign names": renamed("model.layers.", "transformer.h.", "block 0"),
        "fused experts of another count": (fused_config, fused | {f"{FUSED}.down_proj": ("BF16", (7, 128, 64))}, "down_proj"),
        "fused experts transposed": (fused_config, fused | {f"{FUSED}.down_proj": ("BF16", (8, 64, 128))}, "down_proj"),
        "fused biases of another count": (fused_config, fused | {f"{FUSED}.down_proj_bias": ("BF16", (7, 64))}, "down_proj_bias"),
        "fused experts are missing": (fused_config, {k: v for k, v in fused.items() if k != f"{FUSED}.gate_up_proj"}, FUSED),
        "a mixture where config says dense": (dense_config | {"mlp_only_layers": [0, 1]}, dense, "block 1"),
        "dense where config says mixture": (dense_config | {"mlp_only_layers": []}, dense, "block 0"),
        "a dense block without a matrix": (
            qwen(dense=(0, 2))[0],
            {k: v for k, v in qwen(dense=(0, 2))[1].items() if k != "model.layers.2.mlp.up_proj.weight"},
            "model.layers.2.mlp.up_proj.weight",
        ),
        "a dense list that is none": (dense_config | {"mlp_only_layers": "0"}, dense, "dense"),
        "groups that do not divide": (*_deepseek_with("groups", (), n_group=3), "16 experts in 3 groups"),
        "more groups used than there are": (*_deepseek_with("groups", (), topk_group=5), "of which 5"),
    }  # fmt: skip


def _deepseek_with(suffix: str, shape: tuple[int, ...], **changes: Any) -> tuple[Config, Tensors]:
    config, tensors = deepseek()
    return config | changes, {name: ("F32", shape) if name.endswith(suffix) else entry for name, entry in tensors.items()}


@pytest.mark.parametrize("fault", broken_tensors())
def test_a_checkpoint_that_contradicts_itself_is_refused_by_name(fault: str):
    config, tensors, word = broken_tensors()[fault]

    with pytest.raises(BrokenCheckpoint) as refusal:
        take_inventory(checkpoint(config, tensors))

    assert word in refusal.value.message
    assert len(refusal.value.message) < 500


def test_a_spelling_of_the_expert_count_that_is_null_says_nothing():
    config, tensors = mixtral()

    assert take_inventory(checkpoint(config | {"num_experts": None}, tensors)).experts == 8


def test_tied_embeddings_need_no_head():
    config, tensors = mixtral()
    del tensors["lm_head.weight"]

    inventory = take_inventory(checkpoint(config | {"tie_word_embeddings": True}, tensors))

    assert [part.place for part in inventory.outside] == ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_that_speaks_of_quantization_without_saying_enough_is_refused(key: str):
    config, tensors = mixtral()

    with pytest.raises(QuantizedSource, match=key):
        take_inventory(checkpoint(config | {key: {"quant_method": "fp8"}}, tensors))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I32", "I8", "F4"])
def test_a_weight_stored_in_few_bits_is_refused_even_if_config_is_silent(dtype: str):
    config, tensors = mixtral()
    tensors[f"{EXPERT}.w1.weight"] = (dtype, (128, 64))

    with pytest.raises(QuantizedSource, match=r"experts\.5\.w1"):
        take_inventory(checkpoint(config, tensors))


def test_a_dense_model_and_an_unknown_mixture_are_told_apart():
    with pytest.raises(NotAMoE, match="llama"):
        take_inventory(checkpoint({"model_type": "llama", "num_hidden_layers": 1}, {}))
    with pytest.raises(UnsupportedArchitecture, match=r"zaya.*hand each other"):
        take_inventory(checkpoint({"model_type": "zaya", "num_experts": 8}, {}))


def test_a_known_family_without_a_single_mixture_is_no_mixture():
    config, tensors = qwen(blocks=2, dense=(0, 1))

    with pytest.raises(NotAMoE):
        take_inventory(checkpoint(config, tensors))


config_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 20), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.none(), st.text(max_size=3), st.lists(st.none(), max_size=1)), max_size=5),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip
config_keys = st.sampled_from(
    [
        "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_local_experts",
        "num_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace",
        "mlp_only_layers", "decoder_sparse_step", "layer_types", "sliding_window", "use_sliding_window", "tie_word_embeddings",
        "quantization_config", "kv_lora_rank",
    ]
)  # fmt: skip
shapes = st.lists(st.sampled_from([0, 1, 2, 8, 16, 64, 128, 10**9]), max_size=3).map(tuple)
_TRIMS = ({"step": "block_drop", "blocks_dropped": 1}, {"step": "expert_drop", "fraction_dropped": 0.5})
TRIMS = request(*_TRIMS, serving={"context_tokens": 100})
RECIPE = request(
    *_TRIMS,
    {"step": "quantize", "attention": "W8A16", "shared_experts": "W4A16", "dense": "W8A16"},
    serving={"context_tokens": 100},
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(config_keys, config_values, max_size=2),
    reshaped=st.lists(st.tuples(st.integers(0, 10**6), shapes), max_size=2),
    removed=st.lists(st.integers(0, 10**6), max_size=1),
)
def test_no_config_and_no_shapes_make_the_plan_fail_otherwise_than_by_name(
    family: str, changes: Config, reshaped: list[tuple[int, tuple[int, ...]]], removed: list[int]
):
    config, tensors = FAMILIES[family]()
    names = sorted(tensors)
    for position, shape in reshaped:
        tensors[names[position % len(names)]] = ("BF16", shape)
    for position in removed:
        tensors.pop(names[position % len(names)], None)

    for recipe in (TRIMS, RECIPE):
        with suppress(SlimtrimError):
            plan = make_plan(recipe, checkpoint(config | changes, tensors))
            assert 0 < plan.smallest_possible_bytes <= plan.bytes_after
