"""Schemes by block: what the recipe says of a block of the source holds for what becomes of it, however it is opened."""

from __future__ import annotations

import json
import re

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from compression.architectures import ARCHITECTURES
from compression.block import stock_class
from compression.checkpoint.packing import unpack
from compression.checkpoint.reader import Reader
from compression.checkpoint.schemes import quantization_config
from compression.checkpoint.writer import needs_runtime
from compression.errors import VerificationFailed
from compression.evaluation.verification import in_windows, verify
from compression.recipe import BITS, Quantize
from compression.runtime.slimtrim_runtime import open_model, with_weights
from compression.slimming.grid import dequantize
from compression.trimming.surgery import cut_block
from tests.compression.made_trims import IDS_NS, logits, swept, trimmed, whole_cuts

MATRIX = re.compile(r"(.*)\.weight(?:_packed)?")
MIXTRAL = ARCHITECTURES["mixtral"]
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("code_that_travels_stays_here")


def without_block(source, block):
    whole = whole_cuts(source)
    return whole.without(frozenset({block}))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def step_of(by_block, **settings):
    return Quantize(method="rtn", group_size=32, by_block=by_block, **settings)


# ----- saying nothing new changes nothing

USUAL = {"attention": "W8A16", "shared_experts": "FP8_DYNAMIC", "dense": "W8A16"}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_block_that_is_told_what_holds_for_all_is_stored_to_the_byte_as_without(tiny_model_factory, tmp_path, family):
    source = tiny_model_factory(family, dtype="bfloat16")
    same = {key: {"experts": "W4A16", **USUAL} for key in range(4)}

    for name, by_block in (("without", {}), ("with", same)):
        trimmed(source, tmp_path / name, without_block(source, 1), quantize=step_of(by_block, **USUAL))

    assert files(tmp_path / "with") == files(tmp_path / "without")


def test_a_scheme_for_every_block_is_a_scheme_for_all(tiny_model_factory, tmp_path):
    source = tiny_model_factory("qwen2_moe", dtype="bfloat16")
    every = {key: {"experts": "W8A16", "attention": "FP8_DYNAMIC"} for key in range(4)}

    trimmed(source, tmp_path / "every", whole_cuts(source), quantize=step_of(every))
    trimmed(source, tmp_path / "all", whole_cuts(source), quantize=step_of({}, scheme="W8A16", attention="FP8_DYNAMIC"))

    assert files(tmp_path / "every") == files(tmp_path / "all")


def test_what_is_said_of_parts_that_a_block_does_not_have_changes_nothing():
    config = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
    idle = {0: {"experts": "W8A16", "shared_experts": "W8A16"}, 2: {"dense": "W8A16"}}

    said = quantization_config(ARCHITECTURES["deepseek_v3"], step_of(idle), config, (0, 1, 2, 3))

    assert said == quantization_config(ARCHITECTURES["deepseek_v3"], step_of({}))


# ----- in stock transformers

PORTABLE = {
    # Block 1 of the four goes, so what is said of 2 and 3 holds for 1 and 2.
    "qwen2_moe": step_of(
        {0: {"attention": "keep"}, 2: {"attention": "FP8_DYNAMIC", "shared_experts": "W8A16"}, 3: {"shared_experts": "keep"}},
        attention="W4A16",
        shared_experts="W4A16",
    ),
    "deepseek_v3": step_of(
        {0: {"dense": "W8A16"}, 2: {"attention": "FP8_DYNAMIC"}, 3: {"attention": "keep", "shared_experts": "FP8_DYNAMIC"}},
        attention="W8A16",
        scheme="FP8_DYNAMIC",
    ),
    "mixtral": step_of({3: {"attention": "W4A16"}}),
    "qwen3_5_moe": step_of({0: {"shared_experts": "W8A16"}, 3: {"shared_experts": "keep"}}, shared_experts="W4A16"),
}


@pytest.mark.parametrize("family", PORTABLE)
def test_stock_transformers_computes_what_was_computed_when_blocks_differ(tiny_model_factory, tmp_path, family):
    source, step = tiny_model_factory(family, dtype="bfloat16"), PORTABLE[family]
    cuts = without_block(source, 1)

    expected = trimmed(source, tmp_path / "out", cuts, quantize=step)

    config = config_of(tmp_path / "out")
    assert not needs_runtime(config)
    model, info = stock_class(config).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert torch.equal(logits(model), expected)
    assert torch.equal(swept(Reader(tmp_path / "out")), expected)
    assert torch.equal(in_windows(tmp_path / "out", ARCHITECTURES[family], ids_BS=IDS_NS, device=CPU), expected)


def scheme_stored(tensors, name):
    """The scheme of a matrix, told by the dtypes and sizes of what lies in its place."""
    if f"{name}.weight_packed" in tensors:
        bits = tensors[f"{name}.weight_packed"].shape[1] * 32 // int(tensors[f"{name}.weight_shape"][1])
        return f"W{bits}A16"
    return "FP8_DYNAMIC" if tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn else "keep"


def scheme_stated(config, name):
    """The scheme that engines find for a module, which must be one."""
    module, ignored = torch.nn.Linear(1, 1), match_targets(name, torch.nn.Linear(1, 1), config["ignore"])
    groups = [group for group in config["config_groups"].values() if match_targets(name, module, group["targets"])]
    if ignored:
        return "keep"
    [group] = groups
    return "FP8_DYNAMIC" if group["weights"]["type"] == "float" else f"W{group['weights']['num_bits']}A16"


@pytest.mark.parametrize("family", PORTABLE)
def test_every_matrix_is_stored_as_its_source_block_was_told_and_config_says_so(tiny_model_factory, tmp_path, family):
    source, step, architecture = tiny_model_factory(family, dtype="bfloat16"), PORTABLE[family], ARCHITECTURES[family]
    cuts = without_block(source, 1)

    trimmed(source, tmp_path / "out", cuts, quantize=step)

    tensors, config = stored(tmp_path / "out"), config_of(tmp_path / "out")["quantization_config"]
    seen = set()
    for name in (match[1] for name in tensors if tensors[name].dim() == 2 and (match := MATRIX.fullmatch(name))):
        component, index = architecture.component_of(f"{name}.weight"), architecture.block_of(f"{name}.weight")
        if component in ("experts", "attention", "shared_experts", "dense") and not name.endswith("_gate"):
            told = step.scheme_in(cuts.blocks[index], component)
            assert scheme_stored(tensors, name) == told
            assert scheme_stated(config, name) == told
            seen.add((component, told))
    assert {scheme for component, scheme in seen} >= {step.scheme}
    assert len(seen) >= 3


def test_block_1_is_not_taken_for_block_11_nor_any_block_for_two():
    by_block = {2: {"attention": "W8A16"}, 13: {"attention": "keep"}, 20: {"attention": "FP8_DYNAMIC"}}
    kept = (*range(1, 12), 13, 20, 21)  # so that 2 becomes 1, 13 becomes 11 and 20 becomes 12

    config = quantization_config(MIXTRAL, step_of(by_block, attention="W4A16"), {"num_hidden_layers": 14}, kept)

    stated = [scheme_stated(config, f"model.layers.{index}.self_attn.q_proj") for index in range(14)]
    assert stated == ["W4A16", "W8A16", *["W4A16"] * 9, "keep", "FP8_DYNAMIC", "W4A16"]
    assert scheme_stated(config, "model.layers.11.block_sparse_moe.experts.1.w1") == "W4A16"


# ----- experts of several widths, which the loader in the artifact unpacks

MIXED = {
    "mixtral": step_of({0: {"experts": "W3A16", "attention": "W8A16"}, 2: {"experts": "keep"}, 3: {"experts": "W2A16"}}),
    "qwen2_moe": step_of(
        {0: {"experts": "W8A16", "shared_experts": "keep"}, 3: {"experts": "keep", "attention": "FP8_DYNAMIC"}},
        attention="W4A16",
        shared_experts="W3A16",
    ),
    "deepseek_v3": step_of({2: {"experts": "W2A16"}, 3: {"experts": "W3A16"}}),
    "qwen3_5_moe": step_of({0: {"experts": "W3A16"}, 3: {"experts": "keep"}}, shared_experts="W8A16"),
}
FEWER = (0, 3, 5, 7)


def trimmed_mixed(source, out, family, **more):
    """Write it without block 1 and half of the experts of one block; return the cuts and the logits that were computed."""
    whole = without_block(source, 1)
    cuts = whole.keeping({**whole.experts, 2: FEWER})
    return cuts, trimmed(source, out, cuts, quantize=MIXED[family], **more)


@pytest.mark.parametrize("family", MIXED)
def test_every_way_to_open_experts_of_several_widths_gives_what_was_computed(tiny_model_factory, tmp_path, family):
    source, out = tiny_model_factory(family, dtype="bfloat16"), tmp_path / "out"

    _, expected = trimmed_mixed(source, out, family)

    model, info = open_model(out, output_loading_info=True)
    assert not [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert torch.equal(logits(model), expected)
    assert torch.equal(swept(Reader(out)), expected)
    assert torch.equal(in_windows(out, ARCHITECTURES[family], ids_BS=IDS_NS, device=CPU), expected)
    auto = AutoModelForMultimodalLM if family == "qwen3_5_moe" else AutoModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(out, trust_remote_code=True)), expected)
    with pytest.raises(ValueError, match=r"open_model of slimtrim_runtime\.py"):
        auto.from_pretrained(out)


@pytest.mark.parametrize("family", MIXED)
def test_experts_are_what_their_integers_say_and_kept_ones_what_they_were(tiny_model_factory, tmp_path, family):
    source, out, architecture = tiny_model_factory(family, dtype="bfloat16"), tmp_path / "out", ARCHITECTURES[family]
    cuts, _ = trimmed_mixed(source, out, family)
    before, after = Reader(source), stored(out)

    opened = with_weights(after, config_of(out)["slimtrim"])

    seen = set()
    for index, block in enumerate(cuts.blocks):
        for name, weight_OI in cut_block(before.block(block), architecture, cuts, index).items():
            if architecture.component_of(name) != "experts":
                continue
            told, stem = MIXED[family].scheme_in(block, "experts"), name.removesuffix(".weight")
            assert scheme_stored(after, stem) == told
            expected_OI = weight_OI
            if told != "keep":
                codes_OI = unpack(after[f"{stem}.weight_packed"], BITS[told], weight_OI.shape[1])
                expected_OI = dequantize(codes_OI, after[f"{stem}.weight_scale"])
            assert torch.equal(opened[name][...], expected_OI)
            seen.add(told)
    assert len(seen) >= 2


def test_config_says_bits_block_by_block_and_that_stock_classes_have_nothing_to_unpack(tiny_model_factory, tmp_path):
    trimmed_mixed(tiny_model_factory("deepseek_v3", dtype="bfloat16"), tmp_path / "out", "deepseek_v3")

    config = config_of(tmp_path / "out")
    assert config["slimtrim"]["packed_experts"] == {
        "names": r"model\.layers\.(\d+)\.mlp\.experts\.",
        "group_size": 32,
        "bits": [None, 2, 3],
    }
    assert needs_runtime(config)
    assert "quantization_config" not in config
    assert not [name for name in with_weights(stored(tmp_path / "out"), config["slimtrim"]) if "_packed" in name]


def test_where_all_experts_are_of_one_width_after_all_stock_transformers_unpacks_them(tiny_model_factory, tmp_path):
    source, step = tiny_model_factory("mixtral", dtype="bfloat16"), step_of({1: {"experts": "W8A16"}})

    expected = trimmed(source, tmp_path / "out", without_block(source, 1), quantize=step)

    assert "slimtrim" not in config_of(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("attention", ["W4A16", "FP8_DYNAMIC", "keep"])
def test_stock_transformers_opens_experts_that_are_all_kept_beside_anything(tiny_model_factory, tmp_path, attention):
    source = tiny_model_factory("mixtral", dtype="bfloat16")
    step = step_of({block: {"experts": "keep"} for block in range(4)}, attention=attention)

    expected = trimmed(source, tmp_path / "out", whole_cuts(source), quantize=step)

    assert ("quantization_config" in config_of(tmp_path / "out")) == (attention != "keep")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


# Experts alone: stock transformers cannot write a mixture that has a quantization_config.
def test_an_opened_model_is_saved_with_experts_that_are_no_longer_packed(tiny_model_factory, tmp_path):
    _, expected = trimmed_mixed(tiny_model_factory("deepseek_v3", dtype="bfloat16"), tmp_path / "out", "deepseek_v3")

    open_model(tmp_path / "out").save_pretrained(tmp_path / "again")

    section = config_of(tmp_path / "again")["slimtrim"]
    assert "packed_experts" not in section
    assert section["experts"] == [None, 4, 8]
    assert torch.equal(logits(open_model(tmp_path / "again")), expected)


def test_an_opened_model_without_other_peculiarities_is_saved_for_stock_transformers(tiny_model_factory, tmp_path):
    source = tiny_model_factory("deepseek_v3", dtype="bfloat16")
    expected = trimmed(source, tmp_path / "out", whole_cuts(source), quantize=MIXED["deepseek_v3"])

    open_model(tmp_path / "out").save_pretrained(tmp_path / "again")

    assert needs_runtime(config_of(tmp_path / "out"))
    assert "slimtrim" not in config_of(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


@pytest.mark.parametrize("whole", [True, False])
def test_verification_opens_experts_of_several_widths_and_notices_a_word_that_changed(tiny_model_factory, tmp_path, whole):
    _, expected = trimmed_mixed(tiny_model_factory("mixtral", dtype="bfloat16"), tmp_path / "out", "mixtral")
    settings = {"ids_BS": IDS_NS, "logits_BSV": expected, "whole": whole, "on_block": lambda *_: None}

    verified = verify(tmp_path / "out", ARCHITECTURES["mixtral"], **settings)

    assert verified.largest_logit_difference == 0.0
    assert verified.opened_with.startswith("slimtrim_runtime.py on ")
    shard = tmp_path / "out" / "model-00004-of-00004.safetensors"
    tensors = load_file(shard)
    for name in (name for name in tensors if name.endswith("experts.0.w2.weight_packed")):
        tensors[name] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(VerificationFailed, match="differ by up to"):
        verify(tmp_path / "out", ARCHITECTURES["mixtral"], **settings)


# ----- calibration


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("propagate_error", [True, False])
def test_calibrated_methods_work_where_a_block_is_kept_whole(tiny_model_factory, tmp_path, method, propagate_error):
    source = tiny_model_factory("qwen2_moe", dtype="bfloat16")
    kept = {"experts": "keep", "attention": "keep", "shared_experts": "keep"}
    by_block = {1: kept, 2: {"attention": "keep", "experts": "W8A16"}, 3: {"experts": "keep"}}
    step = Quantize(
        method=method,
        group_size=32,
        attention="W4A16",
        shared_experts="W4A16",
        by_block=by_block,
        propagate_error=propagate_error,
    )

    expected = trimmed(source, tmp_path / "out", whole_cuts(source), quantize=step)

    assert torch.equal(logits(open_model(tmp_path / "out")), expected)
    before, after = Reader(source).block(1), Reader(tmp_path / "out").block(1)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_block_is_calibrated_on_what_its_own_attention_answers(tiny_model_factory, tmp_path):
    """Kept attention may be remembered from one pass to the next, rounded attention may not, and each block knows which."""
    source = tiny_model_factory("mixtral", dtype="bfloat16")
    usual = Quantize(group_size=32, attention="W4A16")
    inverse = Quantize(group_size=32, by_block={block: {"attention": "W4A16"} for block in range(3)})
    by_block = Quantize(group_size=32, attention="W4A16", by_block={3: {"attention": "keep"}})

    for name, step in (("usual", usual), ("inverse", inverse), ("by_block", by_block)):
        trimmed(source, tmp_path / name, whole_cuts(source), quantize=step)

    tensors = {name: stored(tmp_path / name) for name in ("usual", "inverse", "by_block")}
    assert files(tmp_path / "inverse") == files(tmp_path / "by_block")
    early = [name for name in tensors["usual"] if not name.startswith("model.layers.3.")]
    assert all(torch.equal(tensors["usual"][name], tensors["by_block"][name]) for name in early)
