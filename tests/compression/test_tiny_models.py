"""The tiny checkpoints are sound, and built so that a fault in any part of them would show in the logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.tiny_models import EXPERTS, MODEL_TYPES, TOP_K, VARIANTS, VOCABULARY, WINDOW, build, tiny_config

Factory = Callable[..., Path]
EVERY = (*MODEL_TYPES, *VARIANTS)
TOKENS_BS = torch.randint(0, VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(1))


def _opened(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS_BS).logits


@pytest.mark.parametrize("name", EVERY)
def test_a_tiny_model_opens_with_no_tensor_missing_or_left_over(name: str, tiny_model_factory: Factory) -> None:
    folder = tiny_model_factory(name)

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert not any(info.values())
    assert _logits(model).isfinite().all()
    assert _logits(model).std() > 1.0


@pytest.mark.parametrize("name", EVERY)
def test_reversing_any_one_tensor_changes_the_logits(name: str, tiny_model_factory: Factory) -> None:
    model = _opened(tiny_model_factory(name))
    before = _logits(model)

    unfelt = []
    for key, tensor in model.state_dict().items():
        original = tensor.clone()
        tensor.copy_(original.flip(list(range(tensor.ndim))))
        if torch.equal(_logits(model), before):
            unfelt.append(key)
        tensor.copy_(original)

    assert unfelt == []
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", EVERY)
def test_every_expert_of_every_layer_is_chosen_by_some_token(name: str, tiny_model_factory: Factory) -> None:
    model = _opened(tiny_model_factory(name))
    chosen: list[Tensor] = []
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda _, arguments: chosen.append(arguments[1]))

    _logits(model)

    assert chosen
    for ids_TK in chosen:
        assert ids_TK.shape[1] == TOP_K
        assert (torch.bincount(ids_TK.flatten(), minlength=EXPERTS) > 0).all()


# phimoe computes its frequencies from the config at every call and never reads the table.
@pytest.mark.parametrize("name", [name for name in EVERY if name != "phimoe"])
def test_a_destroyed_rotary_table_changes_the_logits(name: str, tiny_model_factory: Factory) -> None:
    model = _opened(tiny_model_factory(name))
    before = _logits(model)
    table = model.model.rotary_emb.inv_freq
    assert table.numel() >= 8 // 2

    table[1:] = table[:1].clone()

    assert not torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", ["mixtral_sliding", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe"])
def test_the_sliding_window_is_felt_behind_its_edge_and_not_before(name: str, tiny_model_factory: Factory) -> None:
    folder = tiny_model_factory(name)

    narrow, wide = _logits(_opened(folder)), _logits(_opened(folder, sliding_window=4096))

    # 1e-4: the two runs differ in the mask alone, but another mask may take another attention kernel.
    assert torch.allclose(narrow[:, :WINDOW], wide[:, :WINDOW], atol=1e-4)
    assert (narrow[:, WINDOW:] - wide[:, WINDOW:]).abs().max() > 0.1


@pytest.mark.parametrize(("name", "unlimited"), [("olmoe", {"clip_qkv": 1e6}), ("gpt_oss", {"swiglu_limit": 1e6})])
def test_the_limits_that_a_family_sets_are_felt(name: str, unlimited: dict[str, float], tiny_model_factory: Factory) -> None:
    folder = tiny_model_factory(name)

    assert (_logits(_opened(folder)) - _logits(_opened(folder, **unlimited))).abs().max() > 0.01


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_families_with_two_attention_types_have_both(name: str) -> None:
    assert set(tiny_config(name).layer_types) == {"sliding_attention", "full_attention"}
    assert len(tiny_config(name, num_hidden_layers=7).layer_types) == 7


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "deepseek_v3", "qwen2_moe_sparse_step"])
def test_families_with_dense_blocks_have_both_kinds(name: str, tiny_model_factory: Factory) -> None:
    blocks = _opened(tiny_model_factory(name)).model.layers

    assert {hasattr(block.mlp, "experts") for block in blocks} == {True, False}


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_one_seed_gives_one_checkpoint_and_another_seed_another(name: str, tmp_path: Path, tiny_model_factory: Factory) -> None:
    first = load_file(tiny_model_factory(name) / "model.safetensors")
    torch.manual_seed(99)
    again = load_file(build(name, tmp_path / "again") / "model.safetensors")
    other = load_file(build(name, tmp_path / "other", seed=1) / "model.safetensors")

    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_building_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()

    build("mixtral", tmp_path)

    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_bfloat16_is_saved_as_such_save_for_the_correction_bias(name: str, tiny_model_factory: Factory) -> None:
    folder = tiny_model_factory(name, dtype="bfloat16")
    saved = load_file(folder / "model.safetensors")

    wide = {key for key, tensor in saved.items() if tensor.dtype != torch.bfloat16}

    assert all(key.endswith("e_score_correction_bias") for key in wide)
    assert bool(wide) == (name == "deepseek_v3")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_small_shard_size_leaves_shards_and_an_index(tiny_model_factory: Factory) -> None:
    folder = tiny_model_factory("mixtral", max_shard_size="1MB")

    index = json.loads((folder / "model.safetensors.index.json").read_text())

    files = {path.name for path in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 2


@pytest.mark.parametrize(("tied", "separate_head"), [(True, False), (False, True)])
def test_a_tied_head_is_not_saved(tied: bool, separate_head: bool, tiny_model_factory: Factory) -> None:
    saved = load_file(tiny_model_factory("mixtral", tie_word_embeddings=tied) / "model.safetensors")

    assert ("lm_head.weight" in saved) == separate_head


def test_a_setting_that_the_family_lacks_is_an_error() -> None:
    with pytest.raises(TypeError, match="mixtral has no setting num_expert_per_tok"):
        tiny_config("mixtral", num_expert_per_tok=1)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_the_tokenizer_gives_text_back_and_begins_with_bos(name: str, tiny_model_factory: Factory) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_factory(name))
    text = "The fox — ünïcode, 12\n\ttabs"

    ids = tokenizer(text).input_ids

    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < len(tokenizer) <= VOCABULARY
