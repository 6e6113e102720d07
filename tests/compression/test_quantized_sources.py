"""A quantized checkpoint is compressed as the dense model that stock transformers makes of it, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.core_model_loading import revert_weight_conversion

from compression.block import Shell, Unpacker
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.checkpoint.reader import Reader
from compression.checkpoint.source import open_source
from compression.errors import BrokenCheckpoint
from compression.pipeline import compress
from compression.plan import make_plan
from compression.sweep import Push, Stream, sweep
from tests.compression import quantized_checkpoints as quantized
from tests.compression.test_pipeline import GPTQ, TRIMS, a_request, tensor_bytes
from tests.compression.test_sweep import ignore

OURS = {"step": "quantize", "method": "rtn", "scheme": "W4A16", "group_size": 32}
SOURCES = {
    **{f"fp8 {family}": family for family in ("mixtral", "qwen3_moe", "deepseek_v3")},
    **{f"fp8_dynamic {family}": family for family in ("mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe")},
    **{f"W4A16 {family}": family for family in ("mixtral", "qwen3_moe", "deepseek_v3")},
    **{f"W8A16 {family}": family for family in ("mixtral", "qwen3_moe", "deepseek_v3")},
    "W4A16 beside W8A16 qwen2_moe": "qwen2_moe",
    "mxfp4 gpt_oss": "gpt_oss",
}


@pytest.fixture(scope="module")
def source(tiny_model_factory, tmp_path_factory):
    """``source("fp8 mixtral")`` -> the folder of that quantized checkpoint, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            dense = tiny_model_factory(SOURCES[name], dtype="bfloat16")
            made[name] = _quantized(name, dense, tmp_path_factory.mktemp("quantized") / "model")
        return made[name]

    return make


def _quantized(name: str, dense: Path, out: Path) -> Path:
    match name.split(" ")[0], name.split(" ")[1]:
        case "fp8", _:
            return quantized.fp8(dense, out)
        case "fp8_dynamic", _:
            return quantized.fp8_dynamic(dense, out)
        case "mxfp4", _:
            return quantized.mxfp4(dense, out)
        case "W4A16", "beside":
            compress(a_request(dense, [{**OURS, "attention": "W8A16", "shared_experts": "W4A16", "dense": "W8A16"}]), dense, out)
        case scheme, _:
            compress(a_request(dense, [{**OURS, "scheme": scheme}]), dense, out)
    return out


@torch.no_grad()
def stock_model(name, folder, monkeypatch):
    """Return the stock model with dense weights: dequantized at load, or by the hook that runs at the first forward."""
    # The stock hooks ask for accelerate before they look at what is to be done; unpacking does not need it.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    options = {
        "fp8": {"quantization_config": FineGrainedFP8Config(dequantize=True)},
        "fp8_dynamic": {"quantization_config": CompressedTensorsConfig(dequantize=True)},  # or activations are rounded too
        "mxfp4": {"quantization_config": Mxfp4Config(dequantize=True)},
    }
    model = AutoModelForCausalLM.from_pretrained(folder, **options.get(name.split(" ")[0], {})).eval()
    model(input_ids=torch.tensor([[5]]), use_cache=False)
    return model


def swept_logits(folder, ids_NS):
    reader = open_source(folder)
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, ids_NS)
    sweep(shell, reader, stream, Push(), ignore)
    return torch.cat(list(stream.logits(shell)))


def read_whole(reader):
    blocks = range(reader.config["num_hidden_layers"])
    return {**reader.outside(), **{name: tensor for index in blocks for name, tensor in reader.block(index).items()}}


@pytest.mark.parametrize("name", SOURCES)
def test_dense_blocks_are_the_weights_that_the_stock_loader_unpacks_bit_for_bit(source, monkeypatch, name):
    folder = source(name)

    read = read_whole(open_source(folder))

    stock = stock_model(name, folder, monkeypatch)
    vars(stock).pop("_weight_conversions")
    expected = revert_weight_conversion(stock, stock.state_dict())
    assert read.keys() <= expected.keys()
    assert all(torch.equal(read[key], expected[key]) and read[key].dtype == expected[key].dtype for key in read)


@pytest.mark.parametrize("name", SOURCES)
def test_dense_blocks_have_the_names_and_shapes_of_the_checkpoint_that_was_quantized(source, tiny_model_factory, name):
    original = load_file(tiny_model_factory(SOURCES[name], dtype="bfloat16") / "model.safetensors")

    read = read_whole(open_source(source(name)))

    assert {key: (t.shape, t.dtype) for key, t in read.items()} == {key: (t.shape, t.dtype) for key, t in original.items()}
    for key, tensor in read.items():
        bound = 0.3 if "4" in name.split(" ")[0] else 0.07  # four bits: half a step of 1/6 in e2m1; e4m3: 1/16 of a value
        assert (tensor.float() - original[key].float()).norm() <= bound * original[key].float().norm()


@pytest.mark.parametrize("name", SOURCES)
def test_sweep_logits_equal_stock_logits_bit_for_bit(source, monkeypatch, name):
    folder = source(name)
    ids_NS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(1))

    swept_NSV = swept_logits(folder, ids_NS)

    with torch.no_grad():
        stock_NSV = stock_model(name, folder, monkeypatch)(input_ids=ids_NS, use_cache=False).logits
    assert torch.equal(swept_NSV, stock_NSV)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "mxfp4 gpt_oss"])
def test_a_quantized_source_is_quantized_anew_and_the_artifact_is_as_planned(source, tmp_path, name):
    folder = source(name)
    request = a_request(folder, [*TRIMS["expert_drop"], GPTQ])
    plan = make_plan(request, read_checkpoint(FolderFiles(folder)))

    report = compress(request, folder, tmp_path / "out")

    assert tensor_bytes(tmp_path / "out") == report.bytes_after == plan.bytes_after
    assert report.bytes_before == plan.bytes_before == tensor_bytes(folder)
    assert report.verification.largest_logit_difference == 0.0
    assert "source_unpacked" in {warning["code"] for warning in report.warnings}


@pytest.mark.parametrize("name", ["mxfp4 gpt_oss", "fp8 deepseek_v3", "W4A16 mixtral"])
def test_trims_alone_leave_a_dense_artifact_whose_config_speaks_of_no_quantization(source, tmp_path, name):
    folder = source(name)
    request = a_request(folder, TRIMS["block_drop"])

    report = compress(request, folder, tmp_path / "out")

    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {tensor.dtype for tensor in read_whole(Reader(tmp_path / "out")).values()} <= {torch.bfloat16, torch.float32}
    assert report.bytes_before == tensor_bytes(folder)
    assert tensor_bytes(tmp_path / "out") == report.bytes_planned > report.bytes_before
    assert report.verification.largest_logit_difference == 0.0


def test_the_quality_before_is_that_of_the_unpacked_original(source, tmp_path, monkeypatch):
    name = "fp8 qwen3_moe"
    request = a_request(source(name), TRIMS["block_drop"])
    # As the stock model computes it: on some processors losses are measured in float32.
    monkeypatch.setattr("compression.evaluation.perplexity.working_dtype", lambda device, stored: stored)
    report = compress(request, source(name), tmp_path / "out")

    from tests.compression.test_pipeline import held_out_tokens

    ids_NS = held_out_tokens(request, source(name))
    with torch.no_grad():
        logits = stock_model(name, source(name), monkeypatch)(input_ids=ids_NS, use_cache=False).logits
    loss = -logits.double().log_softmax(-1)[:, :-1].gather(2, ids_NS[:, 1:, None]).mean().item()
    assert report.quality.loss_before == pytest.approx(loss, rel=1e-5)  # losses are summed from float32 log-probabilities


@pytest.mark.parametrize("name", ["fp8 mixtral", "W4A16 mixtral", "mxfp4 gpt_oss"])
def test_a_quantized_source_is_unpacked_a_block_at_a_time(source, tmp_path, monkeypatch, name):
    asked: list[set[str]] = []
    original = Unpacker.dense

    def watched(self, packed):
        asked.append({".".join(key.split(".")[:3]) for key in packed})
        dense = original(self, packed)
        assert all(tensor.is_meta for tensor in self.model.state_dict().values())  # nothing stays behind
        return dense

    monkeypatch.setattr(Unpacker, "dense", watched)
    compress(a_request(source(name), TRIMS["block_drop"]), source(name), tmp_path / "out")

    assert all(len(blocks) == 1 for blocks in asked)
    # The study sees four blocks, compressing three, evaluating four.
    assert [min(blocks)[-1] for blocks in asked][:4] == ["0", "1", "2", "3"]
    assert len(asked) == 11


def test_unpacking_holds_the_tensors_of_no_other_block(source):
    reader = open_source(source("fp8 deepseek_v3"))

    assert {name.split(".")[2] for name in reader.block(2)} == {"2"}


@pytest.mark.parametrize("block", [(32, 32), (48, 24), (128, 128), (16, 128)])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_a_last_block_that_is_cut_off_takes_its_own_scale(tiny_model_factory, tmp_path, block, scale):
    """The stock hook alone refuses such a matrix, or spreads its scales evenly: in DeepSeek-V3 it is kv_a_proj_with_mqa."""
    folder = quantized.fp8(tiny_model_factory("deepseek_v3", dtype="bfloat16"), tmp_path / "fp8", block=block, scale=scale)
    stored = load_file(folder / "model.safetensors")

    read = read_whole(open_source(folder))

    for name, scale_ab in stored.items():
        if name.endswith("_scale_inv"):
            weight = name.removesuffix("_scale_inv")
            rows, columns = stored[weight].shape
            spread_OI = scale_ab.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
            assert torch.equal(read[weight], (stored[weight].float() * spread_OI).bfloat16()), name


def test_a_scale_per_matrix_is_read_too(tiny_model_factory, tmp_path, monkeypatch):
    dense = tiny_model_factory("mixtral", dtype="bfloat16")
    folder = quantized.fp8_dynamic(dense, tmp_path / "tensor", strategy="tensor")

    read = read_whole(open_source(folder))

    stored = load_file(folder / "model.safetensors")
    for name, scale in stored.items():
        if name.endswith("_scale"):
            weight = name.removesuffix("_scale")
            assert torch.equal(read[weight], (stored[weight].float() * scale.float()).bfloat16()), weight


def test_a_config_without_a_dtype_unpacks_to_that_of_the_embedding(source, tmp_path):
    folder = quantized_copy(source("mxfp4 gpt_oss"), tmp_path / "copy", dtype=None)

    assert read_whole(open_source(folder))["model.layers.1.mlp.experts.down_proj"].dtype == torch.bfloat16
    assert open_source(folder).config["dtype"] == "bfloat16"


def test_an_empty_quantization_config_says_nothing(tiny_model_factory, tmp_path):
    folder = quantized_copy(tiny_model_factory("olmoe", dtype="bfloat16"), tmp_path / "copy", quantization_config={})

    report = compress(a_request(folder, [{**GPTQ, "method": "rtn"}]), folder, tmp_path / "out")

    assert report.verification.largest_logit_difference == 0.0


def test_settings_of_the_source_that_unpacking_does_not_need_reach_no_stock_hook(source, tmp_path):
    """Patterns and names in a config are not trusted: which tensors are packed is taken from the headers."""
    config = json.loads((source("W4A16 mixtral") / "config.json").read_text())["quantization_config"]
    group = {**config["config_groups"]["group_0"], "input_activations": "nonsense"}
    hostile = {**config, "config_groups": {"one": group}, "ignore": ["re:((a+)+)+$(", 7], "global_compression_ratio": "x"}
    folder = quantized_copy(source("W4A16 mixtral"), tmp_path / "copy", quantization_config=hostile)

    expected = read_whole(open_source(source("W4A16 mixtral")))

    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_whole(open_source(folder)).items())


def test_tensors_that_unpack_to_something_else_than_their_headers_mean_are_refused_by_name(source, monkeypatch):
    reader = open_source(source("fp8 mixtral"))
    original = Unpacker.dense
    monkeypatch.setattr(Unpacker, "dense", lambda self, packed: {k: t[:1] for k, t in original(self, packed).items()})

    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.0.*headers mean BF16"):
        reader.block(0)


def quantized_copy(folder: Path, out: Path, **changes) -> Path:
    """Return a copy of the checkpoint with other settings in its config; None takes a setting out."""
    shutil.copytree(folder, out)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return out
