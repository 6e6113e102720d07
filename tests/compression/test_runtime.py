"""The loader that ships in artifacts: what it opens is the model whose weights were packed, and nothing else opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.checkpoint.packing import pack
from compression.checkpoint.reader import Reader
from compression.checkpoint.writer import RUNTIME
from compression.errors import BrokenCheckpoint, UnsupportedArchitecture, VerificationFailed
from compression.evaluation.verification import verify
from compression.plan import make_plan
from compression.runtime.slimtrim_runtime import CannotUnpack, open_model, unpack_integers, with_weights
from compression.slimming.grid import dequantize
from tests.compression.made_artifacts import pruned, tampered
from tests.compression.made_checkpoints import request
from tests.compression.made_trims import said_far_from_here
from tests.tiny_models import MODEL_TYPES

IDS_BS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(11))
UNFUSED = [model_type for model_type in MODEL_TYPES if model_type != "gpt_oss"]


@pytest.fixture(scope="module")
def artifact(tiny_model_factory, tmp_path_factory):
    """A Mixtral with 2 of every 4 inputs kept; the same with whole weights lies in ``out-dense``."""
    out = tmp_path_factory.mktemp("packed") / "out"
    pruned(tiny_model_factory("mixtral", dtype="bfloat16"), out, "2:4")
    return out


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS_BS, use_cache=False).logits


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "1:64"])
@pytest.mark.parametrize("model_type", UNFUSED)
def test_what_is_opened_is_the_model_with_whole_weights_in_every_bit(tiny_model_factory, tmp_path, model_type, pattern):
    source = tiny_model_factory(model_type, dtype="bfloat16")
    dense = pruned(source, tmp_path / "out", pattern, shared_experts=True)

    opened, stock = open_model(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(dense)

    assert type(opened) is type(stock)
    assert opened.dtype == torch.bfloat16
    expected = stock.state_dict()
    assert opened.state_dict().keys() == expected.keys()
    assert [name for name, tensor in opened.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert torch.equal(logits(opened), logits(stock))


@pytest.mark.parametrize("pattern", ["2:4", "1:64"])
@pytest.mark.parametrize("model_type", UNFUSED)
def test_the_packed_artifact_is_as_big_as_its_plan(tiny_model_factory, tmp_path, model_type, pattern):
    source = tiny_model_factory(model_type, dtype="bfloat16")
    wish = request({"step": "prune", "pattern": pattern, "shared_experts": True}, profile="custom")
    plan = make_plan(wish, read_checkpoint(FolderFiles(source)))

    pruned(source, tmp_path / "out", pattern, shared_experts=True)

    headers = read_checkpoint(FolderFiles(tmp_path / "out")).tensors.values()
    assert sum(header.bytes for header in headers) == plan.tensor_bytes < plan.bytes_before


def test_a_live_block_is_the_same_from_packed_and_from_whole_weights(artifact):
    packed, dense = Reader(artifact), Reader(artifact.parent / "out-dense")
    shells = [Shell(reader.config, reader.outside()) for reader in (packed, dense)]

    with shells[0].live(2, packed.block(2)) as ours, shells[1].live(2, dense.block(2)) as stock:
        pairs = [(tensor, stock.state_dict()[name]) for name, tensor in ours.state_dict().items()]

    assert len(pairs) > 5
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_stock_loader_stops_and_names_the_one_that_can(artifact):
    with pytest.raises(ValueError, match=RUNTIME.name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_settings_of_from_pretrained_are_passed_on(artifact):
    model, info = open_model(artifact, dtype="float32", output_loading_info=True)

    assert model.dtype == torch.float32
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_model_saved_again_is_an_ordinary_checkpoint(artifact, tmp_path):
    open_model(artifact).save_pretrained(tmp_path / "whole")

    assert "slimtrim" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(again), logits(open_model(artifact)))


def test_the_file_that_ships_needs_nothing_of_ours(artifact, tmp_path):
    opening = "from slimtrim_runtime import open_model; model = open_model('.')"
    saying = "type(model).__name__, model.generation_config is not None"

    assert said_far_from_here(artifact, tmp_path, opening, saying) == "MixtralForCausalLM True"


def test_config_says_pattern_and_profile(artifact):
    config = json.loads((artifact / "config.json").read_text())

    assert config["slimtrim"] == {"profile": "custom", "sparse": {"pattern": "2:4"}}
    assert "quantization_config" not in config


def test_an_artifact_with_packed_zeros_is_no_source(artifact):
    with pytest.raises(UnsupportedArchitecture, match="start from its original"):
        make_plan(request({"step": "quantize"}), read_checkpoint(FolderFiles(artifact)))


def check(folder: Path, logits_BSV: torch.Tensor, *, whole: bool):
    return verify(folder, ARCHITECTURES["mixtral"], ids_BS=IDS_BS, logits_BSV=logits_BSV, whole=whole, on_block=lambda *_: None)


@pytest.mark.parametrize("whole", [True, False])
def test_verification_opens_it_with_its_own_loader_and_says_so(artifact, whole):
    expected = logits(AutoModelForCausalLM.from_pretrained(artifact.parent / "out-dense"))

    verified = check(artifact, expected, whole=whole)

    assert verified.largest_logit_difference == 0.0
    assert verified.opened_with.startswith(f"{RUNTIME.name} on transformers ")
    assert verified.mode == ("whole" if whole else "windows")


def test_verification_opens_a_whole_artifact_with_the_stock_loader_and_says_so(artifact):
    dense = artifact.parent / "out-dense"

    assert check(dense, logits(AutoModelForCausalLM.from_pretrained(dense)), whole=True).opened_with.startswith("transformers ")
    assert not (dense / RUNTIME.name).exists()


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_text("open_model = print\n")])
def test_an_artifact_without_the_loader_that_it_needs_is_refused(artifact, tmp_path, change):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    change(copy / RUNTIME.name)

    with pytest.raises(VerificationFailed, match=RUNTIME.name):
        check(copy, torch.zeros(1), whole=True)


NAME = "model.layers.1.block_sparse_moe.experts.3.w1"


def move_a_bit(tensors):
    mask = tensors[f"{NAME}.bitmask"][0]
    mask[0] = 0b01010011 if mask[0] != 0b01010011 else 0b01010101  # still 2 of 4, but others


@pytest.mark.parametrize("whole", [True, False])
def test_a_moved_bit_of_a_mask_is_noticed(artifact, tmp_path, whole):
    expected = logits(open_model(artifact))

    with pytest.raises(VerificationFailed, match="differ by up to"):
        check(tampered(artifact, tmp_path, move_a_bit), expected, whole=whole)


def flip_a_bit(tensors):
    tensors[f"{NAME}.bitmask"][0, 0] ^= 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_mask_that_does_not_fit_its_values_is_noticed(artifact, tmp_path, whole):
    copy = tampered(artifact, tmp_path, flip_a_bit)

    with pytest.raises(VerificationFailed, match=f"{NAME}.weight"):
        check(copy, torch.zeros(1), whole=whole)


def test_a_live_block_with_a_mask_that_does_not_fit_is_broken(artifact, tmp_path):
    reader = Reader(tampered(artifact, tmp_path, flip_a_bit))
    shell = Shell(reader.config, reader.outside())

    with pytest.raises(BrokenCheckpoint, match=f"{NAME}.weight"), shell.live(1, reader.block(1)):
        pass


# ----- experts as integers of several widths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_become_the_very_weights_that_the_library_and_the_stock_loader_compute(bits, dtype):
    """Rows of any length: integers of three bits straddle words, and the last word is seldom full."""
    generator = torch.Generator().manual_seed(bits)
    for inputs in (*range(1, 70), 96, 128, 192, 1000):
        for groups in {1, *(inputs // size for size in (32, 64) if inputs % size == 0)}:
            codes_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, inputs), dtype=torch.int8, generator=generator)
            scale_OG = torch.rand(5, groups, generator=generator).to(dtype)
            packed_OW, shape = pack(codes_OI, bits), torch.tensor([5, inputs])

            weight_OI = unpack_integers(bits, packed_OW, scale_OG, shape)

            assert weight_OI.dtype == dtype
            assert torch.equal(weight_OI, dequantize(codes_OI, scale_OG))
            scheme = scheme_of(bits, inputs // groups if groups > 1 else None)
            stock = PackedQuantizationCompressor.decompress(
                {"weight_packed": packed_OW, "weight_scale": scale_OG, "weight_shape": shape}, scheme
            )
            assert torch.equal(weight_OI, stock["weight"])


def scheme_of(bits, group_size):
    strategy = "channel" if group_size is None else "group"
    return QuantizationScheme(targets=["Linear"], weights={"num_bits": bits, "strategy": strategy, "group_size": group_size})


@pytest.mark.parametrize(
    ("words", "scales", "shape"), [((5, 7), (5, 2), (5, 64)), ((4, 8), (5, 2), (5, 64)), ((5, 8), (5, 3), (5, 64))]
)
def test_words_and_scales_that_do_not_fit_their_shape_are_refused(words, scales, shape):
    with pytest.raises(CannotUnpack, match="do not fit"):
        unpack_integers(4, torch.zeros(words, dtype=torch.int32), torch.ones(scales), torch.tensor(shape))


EXPERT, OTHER = "model.layers.3.mlp.experts.0.up_proj", "model.layers.3.self_attn.q_proj"
PACKED_BY_US = {"packed_experts": {"names": r"model\.layers\.(\d+)\.mlp\.experts\.", "bits": [4, None, None, 8]}}


@pytest.mark.parametrize(
    ("section", "ours"),
    [({}, []), (PACKED_BY_US, [EXPERT]), ({"packed_experts": {**PACKED_BY_US["packed_experts"], "bits": [4, 4, 4, None]}}, [])],
)
def test_only_experts_of_blocks_that_the_section_names_are_unpacked_here(section, ours):
    codes_OI = torch.full((2, 32), -100, dtype=torch.int8)
    parts = {"weight_packed": pack(codes_OI, 8), "weight_scale": torch.ones(2, 1), "weight_shape": torch.tensor([2, 32])}
    saved = {f"{stem}.{part}": tensor for stem in (EXPERT, OTHER) for part, tensor in parts.items()}

    tensors = with_weights(saved, section)

    untouched = {name for name in saved if name.rpartition(".")[0] not in ours}
    assert tensors.keys() == {f"{stem}.weight" for stem in ours} | untouched
    assert all(torch.equal(tensors[f"{stem}.weight"][...], codes_OI.float()) for stem in ours)
    assert all(tensors[name] is saved[name] for name in untouched)


def test_a_block_goes_by_the_name_under_which_it_is_loaded():
    saved = {f"{EXPERT}.weight_packed": torch.zeros(2, 4, dtype=torch.int32)}
    renamed = {r"model\.layers\.2\.": "model.layers.1.", r"model\.layers\.3\.": "model.layers.0."}

    tensors = with_weights(saved, {"packed_experts": {**PACKED_BY_US["packed_experts"], "bits": [4, None]}}, renamed)

    assert list(tensors) == [f"{EXPERT}.weight"]
