"""Schemes by block: what the recipe says of a block of the source holds for what becomes of it, however it is opened."""

from __future__ import annotations

import json
import re

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file

from compression.architectures import ARCHITECTURES
from compression.block import stock_class
from compression.checkpoint.reader import Reader
from compression.checkpoint.schemes import quantization_config
from compression.checkpoint.writer import needs_runtime
from compression.evaluation.verification import in_windows
from compression.recipe import Quantize
from tests.compression.made_trims import IDS_NS, swept, trimmed, whole_cuts

MATRIX = re.compile(r"(.*)\.weight(?:_packed)?")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def code_that_travels_stays_here(tmp_path_factory):
    """Keep the copies that transformers makes of an artifact's code out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_NS, use_cache=False).logits


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
