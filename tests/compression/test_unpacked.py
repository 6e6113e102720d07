"""From the headers of a quantized checkpoint to those of the dense one that it stands for, or a refusal by name."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compression.errors import BrokenCheckpoint, QuantizedSource, SlimtrimError
from compression.plan import make_plan
from compression.planner.inventory import dense_checkpoint, take_inventory
from tests.compression.made_checkpoints import Config, Tensors, checkpoint, deepseek, gpt_oss, mixtral, request

Made = tuple[Config, Tensors]
W1 = "model.layers.2.block_sparse_moe.experts.5.w1"
Q = "model.layers.1.self_attn.q_proj"
FUSED = "model.layers.1.mlp.experts.down_proj"


def fp8(family: Made, *, block: int = 32, **quantization: Any) -> Made:
    def stored(name: str, shape: tuple[int, ...]) -> Tensors:
        grid = tuple(-(-size // block) for size in shape)
        return {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", grid)}

    config = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return _stored(family, stored, {**config, **quantization})


def packed(family: Made, *, bits: int = 4, group_size: int | None = 32, experts_only: bool = False, **quantization: Any) -> Made:
    def stored(name: str, shape: tuple[int, ...]) -> Tensors:
        if experts_only and ".experts." not in name:
            return {name: ("BF16", shape)}
        rows, columns = shape
        module = name.removesuffix(".weight")
        return {
            f"{module}.weight_packed": ("I32", (rows, columns * bits // 32)),
            f"{module}.weight_scale": ("BF16", (rows, columns // group_size if group_size else 1)),
            f"{module}.weight_shape": ("I64", (2,)),
        }

    return _stored(family, stored, {**compressed(group(bits=bits, group_size=group_size)), **quantization})


def float8(family: Made, *, strategy: str = "channel", **quantization: Any) -> Made:
    def stored(name: str, shape: tuple[int, ...]) -> Tensors:
        scale = (shape[0], 1) if strategy == "channel" else (1,)
        return {name: ("F8_E4M3", shape), f"{name}_scale": ("BF16", scale)}

    scheme = group(bits=8, type="float", strategy=strategy, group_size=None, format="float-quantized")
    return _stored(family, stored, {**compressed(scheme), **quantization})


def mxfp4(**quantization: Any) -> Made:
    config, tensors = gpt_oss()
    made: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = shape
            made[f"{name}_blocks"] = ("U8", (experts, rows, columns // 32, 16))
            made[f"{name}_scales"] = ("U8", (experts, rows, columns // 32))
        else:
            made[name] = (dtype, shape)
    return {**config, "quantization_config": {"quant_method": "mxfp4", **quantization}}, made


def compressed(*groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }  # fmt: skip


def group(*, bits: int, group_size: int | None, targets: tuple[str, ...] = ("Linear",), **weights: Any) -> dict[str, Any]:
    layout = weights.pop("format", None)
    strategy = "channel" if group_size is None else "group"
    settings = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size, **weights}
    return {"targets": list(targets), "weights": settings, **({"format": layout} if layout else {})}


def _stored(family: Made, stored: Any, quantization: dict[str, Any]) -> Made:
    config, tensors = family
    made: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        is_linear = ".layers." in name and len(shape) == 2 and not name.endswith(".gate.weight")
        made |= stored(name, shape) if is_linear else {name: (dtype, shape)}
    return {**config, "dtype": "bfloat16", "quantization_config": quantization}, made


SOURCES: dict[str, tuple[Made, Made]] = {
    "fp8 mixtral": (fp8(mixtral()), mixtral()),
    "fp8 deepseek, blocks that do not divide": (fp8(deepseek(), block=48), deepseek()),
    "W4 mixtral": (packed(mixtral()), mixtral()),
    "W8 by row": (packed(mixtral(), bits=8, group_size=None), mixtral()),
    "W4 experts alone": (packed(deepseek(), experts_only=True), deepseek()),
    "float8 by row": (float8(mixtral()), mixtral()),
    "float8 by matrix": (float8(mixtral(), strategy="tensor"), mixtral()),
    "mxfp4": (mxfp4(), gpt_oss()),
}


@pytest.mark.parametrize("source", SOURCES)
def test_headers_unpack_to_those_of_the_checkpoint_that_was_quantized(source: str):
    stored, original = SOURCES[source]

    dense, unpacked = dense_checkpoint(checkpoint(*stored))

    expected = {name: header for name, header in checkpoint(*original).tensors.items() if ".layers.4." not in name}
    found = {name: header for name, header in dense.tensors.items() if ".layers.4." not in name}
    assert unpacked is not None
    assert {n: (h.dtype, h.shape, h.bytes) for n, h in found.items()} == {
        n: (h.dtype, h.shape, h.bytes) for n, h in expected.items()
    }
    assert "quantization_config" not in dense.config


@pytest.mark.parametrize("source", SOURCES)
def test_bytes_before_are_those_on_disk_and_bytes_after_those_of_the_dense_model(source: str):
    stored, original = SOURCES[source]
    steps = ({"step": "block_drop", "blocks_dropped": 1},)

    plan = make_plan(request(*steps), checkpoint(*stored))

    left_behind = sum(header.bytes for header in take_inventory(checkpoint(*stored)).left_behind)
    assert plan.bytes_before == sum(header.bytes for header in checkpoint(*stored).tensors.values()) - left_behind
    assert plan.bytes_after == make_plan(request(*steps), checkpoint(*original)).bytes_after


def test_a_plan_says_that_the_source_is_unpacked_and_how_big_it_is_then():
    stored, original = SOURCES["W4 mixtral"]

    plan = make_plan(request({"step": "block_drop", "blocks_dropped": 1}), checkpoint(*stored))

    (warning,) = [warning for warning in plan.warnings if warning.code == "source_unpacked"]
    assert str(plan.bytes_before) in warning.message
    assert str(take_inventory(checkpoint(*original)).bytes) in warning.message
    dense = make_plan(request({"step": "block_drop", "blocks_dropped": 1}), checkpoint(*original))
    assert "source_unpacked" not in {warning.code for warning in dense.warnings}


def test_schemes_are_told_apart_by_the_shapes_they_leave():
    """Experts in 4 bits and the rest in 8, as their group sizes and words say; no pattern is run."""
    config, tensors = packed(mixtral())
    _, eight = packed(mixtral(), bits=8)
    tensors = {name: eight[name] if "self_attn" in name else entry for name, entry in tensors.items()}
    schemes = (group(bits=8, group_size=32), group(bits=4, group_size=32, targets=(r"re:.*(\.experts\.|a))+$",)))

    dense, unpacked = dense_checkpoint(checkpoint(config | {"quantization_config": compressed(*schemes)}, tensors))

    assert dense.tensors[f"{Q}.weight"].shape == (64, 64)
    assert dense.tensors[f"{W1}.weight"].shape == (128, 64)
    assert unpacked is not None
    groups = unpacked.loading["config_groups"].values()
    assert [(group["weights"]["num_bits"], Q in group["targets"]) for group in groups] == [(4, False), (8, True)]


def test_two_schemes_that_both_fit_a_shape_are_refused_rather_than_guessed():
    config, tensors = packed(mixtral(), group_size=None)
    schemes = (group(bits=4, group_size=None), group(bits=8, group_size=None))

    with pytest.raises(QuantizedSource, match="does not say which"):
        take_inventory(checkpoint(config | {"quantization_config": compressed(*schemes)}, tensors))


def without(made: Made, name: str) -> Made:
    return made[0], {other: entry for other, entry in made[1].items() if other != name}


def changed(made: Made, name: str, dtype: str, shape: tuple[int, ...]) -> Made:
    return made[0], made[1] | {name: (dtype, shape)}


BROKEN: dict[str, tuple[Made, str]] = {
    "fp8 without a scale": (without(fp8(mixtral()), f"{W1}.weight_scale_inv"), f"{W1}.weight_scale_inv"),
    "fp8 scale of another grid": (changed(fp8(mixtral()), f"{W1}.weight_scale_inv", "F32", (4, 3)), "[4, 2]"),
    "fp8 scale without a weight": (without(fp8(mixtral()), f"{Q}.weight"), f"{Q}.weight"),
    "fp8 scale of a dense weight": (changed(fp8(mixtral()), f"{Q}.weight", "BF16", (64, 64)), "nothing to scale"),
    "fp8 vector": (changed(fp8(mixtral()), "model.norm.weight", "F8_E4M3", (64,)), "model.norm.weight"),
    "fp8 matrix of no rows": (changed(fp8(mixtral()), f"{Q}.weight", "F8_E4M3", (0, 64)), Q),
    "fp8 of a wrong expert": (changed(fp8(mixtral()), f"{W1}.weight", "F8_E4M3", (96, 64)), W1),
    "fp8 in name only": ((fp8(mixtral())[0], mixtral()[1]), "no tensor is stored that way"),
    "one expert dense, the others fp8": (
        without(changed(fp8(mixtral()), f"{W1}.weight", "BF16", (128, 64)), f"{W1}.weight_scale_inv"),
        W1,
    ),
    "packed without a scale": (without(packed(mixtral()), f"{W1}.weight_scale"), f"{W1}.weight_scale"),
    "packed without a shape": (without(packed(mixtral()), f"{W1}.weight_shape"), f"{W1}.weight_shape"),
    "packed scale of other groups": (changed(packed(mixtral()), f"{W1}.weight_scale", "BF16", (128, 3)), "fit no scheme"),
    "packed of another width": (changed(packed(mixtral()), f"{Q}.weight_packed", "I32", (64, 9)), "fit no scheme"),
    "packed of another dtype": (changed(packed(mixtral()), f"{Q}.weight_packed", "U8", (64, 8)), "not I32"),
    "packed and dense": (changed(packed(mixtral()), f"{Q}.weight", "BF16", (64, 64)), "there twice"),
    "packed shape without a matrix": (without(packed(mixtral()), f"{Q}.weight_packed"), f"{Q}.weight"),
    "float8 without a scale": (without(float8(mixtral()), f"{Q}.weight_scale"), f"{Q}.weight_scale"),
    "mxfp4 without scales": (without(mxfp4(), f"{FUSED}_scales"), f"{FUSED}_scales"),
    "mxfp4 without blocks": (without(mxfp4(), f"{FUSED}_blocks"), f"{FUSED}_blocks"),
    "mxfp4 of half the groups": (changed(mxfp4(), f"{FUSED}_scales", "U8", (8, 64, 2)), f"{FUSED}_scales"),
    "mxfp4 of 8 bytes a group": (changed(mxfp4(), f"{FUSED}_blocks", "U8", (8, 64, 4, 8)), f"{FUSED}_blocks"),
    "mxfp4 and dense": (changed(mxfp4(), FUSED, "BF16", (8, 128, 64)), "there twice"),
    "mxfp4 of another expert count": (
        changed(changed(mxfp4(), f"{FUSED}_blocks", "U8", (7, 64, 4, 16)), f"{FUSED}_scales", "U8", (7, 64, 4)),
        FUSED,
    ),
    "a dtype that is none": ((fp8(mixtral())[0] | {"dtype": "float8_e4m3fn"}, fp8(mixtral())[1]), "dtype"),
    "no blocks": ((fp8(mixtral())[0] | {"num_hidden_layers": None}, fp8(mixtral())[1]), "num_hidden_layers"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_quantized_checkpoint_that_contradicts_itself_is_refused_by_name(fault: str):
    (config, tensors), word = BROKEN[fault]

    with pytest.raises(BrokenCheckpoint) as refusal:
        take_inventory(checkpoint(config, tensors))

    assert word in refusal.value.message
    assert len(refusal.value.message) < 500


def configured(made: Made, **changes: Any) -> Made:
    return made[0] | {"quantization_config": {**made[0]["quantization_config"], **changes}}, made[1]


def grouped(**weights: Any) -> Made:
    return configured(packed(mixtral()), config_groups={"one": group(bits=4, group_size=32, **weights)})


REFUSED: dict[str, tuple[Made, str]] = {
    **{
        method: (configured(fp8(mixtral()), quant_method=method), method)
        for method in ("gptq", "awq", "bitsandbytes", "modelopt", "quark", "hqq", "fbgemm_fp8")
    },
    "no method": (configured(fp8(mixtral()), quant_method=None), "None"),
    "a method that is a list": (configured(fp8(mixtral()), quant_method=["fp8"]), "fp8"),
    "a very long method": (configured(fp8(mixtral()), quant_method="x" * 10**6), "xxx"),
    "bitsandbytes by flag": (configured(fp8(mixtral()), load_in_4bit=True), "load_in_4bit"),
    "fp8 by matrix": (configured(fp8(mixtral()), weight_block_size=None), "weight_block_size"),
    "fp8 in blocks of no size": (configured(fp8(mixtral()), weight_block_size=[0, 32]), "weight_block_size"),
    "fp8 in blocks of true": (configured(fp8(mixtral()), weight_block_size=[True, 32]), "weight_block_size"),
    "fp8 static": (configured(fp8(mixtral()), activation_scheme="static"), "static"),
    "fp8 with exponents for scales": (changed(fp8(mixtral()), f"{Q}.weight_scale_inv", "F8_E8M0", (2, 2)), "F8_E8M0"),
    "fp8 embeddings": (configured(fp8(mixtral()), modules_to_convert=["model.embed_tokens"]), "modules_to_convert"),
    "asymmetric": (grouped(symmetric=False), "asymmetric"),
    "asymmetric by its tensors": (changed(packed(mixtral()), f"{Q}.weight_zero_point", "I32", (8, 2)), "zero_point"),
    "reordered": (grouped(actorder="group"), "reordered"),
    "3 bits": (grouped(num_bits=3), "of 3 bits"),
    "bits that are true": (grouped(num_bits=True), "True"),
    "nvfp4": (grouped(format="nvfp4-pack-quantized", type="float", strategy="tensor_group"), "nvfp4"),
    "int8 unpacked": (grouped(format="int-quantized", num_bits=8), "int-quantized"),
    "float8 in blocks": (grouped(format="float-quantized", type="float", num_bits=8, strategy="block"), "block"),
    "sparse": (configured(packed(mixtral()), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "rotated": (configured(packed(mixtral()), transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    "key-value cache": (configured(packed(mixtral()), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "not compressed": (configured(packed(mixtral()), quantization_status="frozen"), "quantization_status"),
    "no groups": (configured(packed(mixtral()), config_groups={}), "config_groups"),
    "groups that are a list": (configured(packed(mixtral()), config_groups=[1]), "config_groups"),
    "a group that is a number": (configured(packed(mixtral()), config_groups={"one": 7}), "lacks weights"),
    "a packed router": (
        changed(packed(mixtral()), "model.layers.0.block_sparse_moe.gate.weight_packed", "I32", (8, 8)),
        "gate.weight_packed",
    ),
    "mxfp4 outside the experts": (changed(mxfp4(), f"{Q}_blocks", "U8", (1, 64, 2, 16)), "fused experts"),
    "static activations by their tensors": (changed(float8(mixtral()), f"{Q}.input_scale", "BF16", (1,)), "input_scale"),
    "a list": ((mixtral()[0] | {"quantization_config": [1]}, mixtral()[1]), "no object"),
    "a word": ((mixtral()[0] | {"quantization_config": "fp8"}, mixtral()[1]), "no object"),
    "a compression_config alone": ((mixtral()[0] | {"compression_config": {"a": 1}}, mixtral()[1]), "compression_config"),
}  # fmt: skip


@pytest.mark.parametrize("found", REFUSED)
def test_a_way_of_quantizing_that_is_not_read_is_refused_with_its_name(found: str):
    (config, tensors), word = REFUSED[found]

    with pytest.raises(QuantizedSource) as refusal:
        take_inventory(checkpoint(config, tensors))

    assert word in refusal.value.message
    assert len(refusal.value.message) < 500


def test_the_ways_of_quantizing_that_are_read_are_named_in_the_refusal():
    with pytest.raises(QuantizedSource, match=r"fp8 .*mxfp4.*compressed-tensors.*pack-quantized.*float-quantized"):
        take_inventory(checkpoint(*REFUSED["gptq"][0]))


def test_a_config_without_a_dtype_takes_that_of_the_embedding():
    config, tensors = mxfp4()

    dense, _ = dense_checkpoint(checkpoint(config, tensors))

    assert "dtype" not in config
    assert dense.config["dtype"] == "bfloat16"


def test_of_the_sources_config_only_checked_values_reach_the_stock_hooks():
    made = configured(fp8(mixtral()), modules_to_not_convert=[7], scale_fmt=None, dequantize="no")

    _, unpacked = dense_checkpoint(checkpoint(*made))

    assert unpacked is not None
    assert unpacked.loading == {"quant_method": "fp8", "weight_block_size": [32, 32], "dequantize": True}


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 130), st.text(max_size=4), st.sampled_from(["group", "int", "float"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
keys = st.sampled_from(
    [
        "quant_method", "weight_block_size", "activation_scheme", "format", "quantization_status", "config_groups", "ignore",
        "sparsity_config", "kv_cache_scheme", "load_in_8bit",
    ]
)  # fmt: skip
weight_keys = st.sampled_from(["num_bits", "type", "symmetric", "strategy", "group_size", "actorder"])
endings = st.sampled_from(
    [
        ".weight",
        ".weight_packed",
        ".weight_scale",
        ".weight_shape",
        ".weight_scale_inv",
        "_blocks",
        "_scales",
        ".weight_zero_point",
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    source=st.sampled_from(sorted(SOURCES)),
    changes=st.dictionaries(keys, junk, max_size=2),
    weights=st.dictionaries(weight_keys, junk, max_size=2),
    added=st.lists(
        st.tuples(
            st.sampled_from([Q, W1, FUSED, "lm_head"]), endings, st.sampled_from(["F8_E4M3", "U8", "I32", "I64", "BF16"]),
            st.lists(st.sampled_from([0, 1, 2, 8, 64, 10**9]), max_size=4).map(tuple),
        ),
        max_size=2,
    ),
)  # fmt: skip
def test_no_quantization_config_and_no_headers_make_the_plan_fail_otherwise_than_by_name(
    source: str, changes: Config, weights: Config, added: list[tuple[str, str, str, tuple[int, ...]]]
):
    (config, tensors), _ = SOURCES[source]
    quantization = dict(config["quantization_config"])
    if weights and "config_groups" in quantization:
        (only,) = quantization["config_groups"].values()
        quantization["config_groups"] = {"one": {**only, "weights": {**only["weights"], **weights}}}
    more = {f"{module}{ending}": (dtype, shape) for module, ending, dtype, shape in added}
    whole = checkpoint(config | {"quantization_config": {**quantization, **changes}}, tensors | more)

    with suppress(SlimtrimError):
        plan = make_plan(request({"step": "block_drop", "blocks_dropped": 1}), whole)
        assert 0 < plan.smallest_possible_bytes <= plan.bytes_after
