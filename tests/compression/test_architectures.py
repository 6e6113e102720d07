from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compression.architectures import (
    ARCHITECTURES,
    EXPERT_COUNT_SPELLINGS,
    REFUSED,
    expert_count,
    find_architecture,
)
from compression.checkpoint.headers import Checkpoint, FolderFiles, read_checkpoint
from compression.errors import BrokenCheckpoint, NotAMoE, UnsupportedArchitecture
from compression.planner.inventory import Inventory, take_inventory
from compression.planner.sizes import Cut, artifact_sizes, kv_cache_bytes
from compression.request import Serving
from tests.compression.made_checkpoints import checkpoint, mixtral

Factory = Callable[..., Path]
MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe")
"""The families that these tests run over; test_families.py has the others."""
VARIANTS = {"mixtral_sliding": "mixtral", "qwen2_moe_sparse_step": "qwen2_moe"}
SHAPES = [*MODEL_TYPES, *VARIANTS]


def saved(tiny_model_factory: Factory, model_type: str) -> Checkpoint:
    return read_checkpoint(FolderFiles(tiny_model_factory(model_type)))


def inventory_of(tiny_model_factory: Factory, model_type: str) -> Inventory:
    return take_inventory(saved(tiny_model_factory, model_type))


def test_the_table_holds_the_supported_families_and_each_knows_its_name():
    assert {name: row.model_type for name, row in ARCHITECTURES.items()} == {name: name for name in ARCHITECTURES}
    assert set(MODEL_TYPES) < set(ARCHITECTURES)
    assert not set(ARCHITECTURES) & set(REFUSED)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_known_mixture_without_a_row_is_refused_by_name_with_what_is_in_the_way(model_type: str):
    with pytest.raises(UnsupportedArchitecture, match=re.escape(f"{model_type!r} is not supported: {REFUSED[model_type]}")):
        find_architecture({"model_type": model_type, "text_config": {}})


@pytest.mark.parametrize("model_type", SHAPES)
def test_a_checkpoint_saved_by_the_stock_class_is_whole_and_every_byte_is_counted(tiny_model_factory: Factory, model_type: str):
    checkpoint = saved(tiny_model_factory, model_type)

    inventory = take_inventory(checkpoint)

    assert inventory.left_behind == ()
    assert inventory.bytes == sum(tensor.bytes for tensor in checkpoint.tensors.values())
    assert artifact_sizes(inventory, Cut(inventory.experts)).total == inventory.bytes
    assert inventory.architecture.model_type == VARIANTS.get(model_type, model_type)


@pytest.mark.parametrize("model_type", SHAPES)
def test_every_saved_tensor_has_the_component_that_its_name_says(tiny_model_factory: Factory, model_type: str):
    row = find_architecture(saved(tiny_model_factory, model_type).config)
    words = {
        "experts": r"\.experts\.",
        "router": r"\.(mlp|block_sparse_moe)\.(gate|router)\.(weight|bias|e_score_correction_bias)$",
        "shared_experts": r"\.shared_expert",
        "attention": r"\.self_attn\.",
        "dense": r"\d\.mlp\.(gate|up|down)_proj\.weight$",
        "embeddings": r"^(model\.embed_tokens|lm_head)\.",
        "other": r"(layernorm|model\.norm)\.(weight|bias)$",
    }

    for name in saved(tiny_model_factory, model_type).tensors:
        assert re.search(words[row.component_of(name)], name), name


@pytest.mark.parametrize("model_type", SHAPES)
def test_exactly_the_mixtures_have_a_router_with_a_row_per_expert(tiny_model_factory: Factory, model_type: str):
    whole = saved(tiny_model_factory, model_type)
    row = find_architecture(whole.config)
    inventory = take_inventory(whole)

    with_router = [index for index in range(len(inventory.blocks)) if row.router_name(index) in whole.tensors]

    assert with_router == [block.index for block in inventory.blocks if block.is_mixture] != []
    assert {whole.tensors[row.router_name(index)].shape[0] for index in with_router} == {expert_count(row, whole.config)}


@pytest.mark.parametrize("model_type", SHAPES)
def test_every_expert_of_a_mixture_has_the_rows_matrices(tiny_model_factory: Factory, model_type: str):
    whole = saved(tiny_model_factory, model_type)
    row = find_architecture(whole.config)
    inventory = take_inventory(whole)
    index = inventory.droppable[0]
    below = {name for name in whole.tensors if name.startswith(row.experts_prefix(index) + ".")}

    if row.fused_on_disk:
        assert {row.expert_of(name) for name in below} == {None}
    else:
        assert below == {
            f"{row.experts_prefix(index)}.{expert}.{matrix}.weight"
            for expert in range(inventory.experts)
            for matrix in row.gate_up_down
        }
        assert {row.expert_of(name) for name in below} == set(range(inventory.experts))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_keys_of_a_row_are_those_that_the_stock_class_saves(tiny_model_factory: Factory, model_type: str):
    config = json.loads((tiny_model_factory(model_type) / "config.json").read_text())
    row = ARCHITECTURES[model_type]

    saved_spellings = [key for key in EXPERT_COUNT_SPELLINGS if key in config]
    assert saved_spellings
    assert set(saved_spellings) <= set(row.expert_count_keys)
    keys = [row.expert_width_key, *(row.group_keys or ()), row.dense_prefix_key, row.dense_list_key, row.sparse_step_key]
    assert [key for key in keys if key is not None and key not in config] == []


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("model_type", SHAPES)
def test_the_key_value_cache_is_as_big_as_the_one_that_the_stock_model_fills(
    tiny_model_factory: Factory, model_type: str, tokens: int
):
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    folder = tiny_model_factory(model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inventory = inventory_of(tiny_model_factory, model_type)

    with torch.no_grad():
        layers = model(torch.arange(3, 3 + 2 * tokens).view(2, tokens), use_cache=True).past_key_values.layers

    planned = kv_cache_bytes(inventory, Cut(inventory.experts), Serving(context_tokens=tokens, batch_size=2))
    # A stock sliding layer forgets one token early: it keeps what the next token will need, not what this one saw.
    forgotten = [layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.keys.shape[2] < tokens]
    assert planned == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) + sum(size // 7 for size in forgotten)
    assert bool(forgotten) == (tokens > 8 and model_type not in ("mixtral", "olmoe", "deepseek_v2", "deepseek_v3"))


@pytest.mark.parametrize("kept", [1, 2])
def test_a_group_needs_as_many_experts_as_the_row_says_or_the_stock_router_fails(tiny_model_factory: Factory, kept: int):
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    needed = {model_type: ARCHITECTURES[model_type].group_members for model_type in ("deepseek_v2", "deepseek_v3")}

    for model_type, members in needed.items():
        config = transformers.AutoConfig.from_pretrained(tiny_model_factory(model_type))
        config.update({"n_routed_experts": 2 * kept, "num_experts_per_tok": 1, "num_hidden_layers": 2})
        model = transformers.AutoModelForCausalLM.from_config(config)
        if kept < members:
            with pytest.raises(RuntimeError, match="index k out of range"):
                model(torch.tensor([[3, 4, 5]]))
        else:
            assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_dense_model_is_no_mixture_and_an_unknown_mixture_is_unsupported():
    with pytest.raises(NotAMoE, match=r"'llama'.*mixtral"):
        find_architecture({"model_type": "llama"})
    with pytest.raises(NotAMoE):
        find_architecture({})
    with pytest.raises(NotAMoE):
        find_architecture({"model_type": ["mixtral"]})
    for spelling in EXPERT_COUNT_SPELLINGS:
        with pytest.raises(UnsupportedArchitecture, match=r"'new_moe'.*qwen3_moe"):
            find_architecture({"model_type": "new_moe", spelling: 8})


def test_the_expert_count_is_found_in_any_spelling_and_never_guessed():
    row = ARCHITECTURES["qwen3_moe"]

    assert expert_count(row, {"num_experts": 8}) == expert_count(row, {"num_local_experts": 8}) == 8
    for nonsense in (None, 0, -8, True, 8.0, "8"):
        with pytest.raises(BrokenCheckpoint, match="num_experts"):
            expert_count(row, {"num_experts": nonsense})


def test_a_name_outside_the_blocks_belongs_to_no_block():
    assert ARCHITECTURES["mixtral"].block_of("model.layers.12.mlp.gate.weight") == 12
    assert ARCHITECTURES["mixtral"].block_of("model.norm.weight") is None
    assert ARCHITECTURES["mixtral"].block_of("model.layers.x.mlp") is None
    assert ARCHITECTURES["mixtral"].block_of("other.model.layers.3.mlp") is None


def test_names_that_only_look_like_an_expert_are_none():
    row = ARCHITECTURES["qwen2_moe"]

    assert row.expert_of("model.layers.1.mlp.experts.7.up_proj.weight") == 7
    assert row.expert_of("model.layers.1.mlp.shared_expert.up_proj.weight") is None
    assert row.expert_of("model.layers.1.mlp.gate.weight") is None


def test_a_row_that_lies_about_its_router_is_caught_by_the_checkpoint():
    config, tensors = mixtral()

    with pytest.raises(BrokenCheckpoint):
        take_inventory(checkpoint(config | {"model_type": "qwen3_moe", "moe_intermediate_size": 128}, tensors))
