"""One live block: down_proj on what the slimmed gate and up feed it, and the same codes whatever the chunk.

Shapes: E experts, O outputs, I inputs, D width, F expert width.
"""

from __future__ import annotations

import pytest
import torch

from compression.architectures import ARCHITECTURES
from compression.balance import balance_down
from compression.block import Shell
from compression.checkpoint.packing import unpack
from compression.checkpoint.reader import Reader
from compression.collect import collect
from compression.errors import NonFiniteWeights
from compression.moe import moe_layer
from compression.recipe import Prune, Quantize
from compression.slim import Slimming, slim_
from compression.slimming import gptq
from compression.slimming.grid import FloatGrid, Grid, dequantize
from compression.slimming.hessian import Gram
from compression.slimming.masks import NOfM, Unstructured
from compression.sweep import Stream
from tests.compression.test_collect import CPU, IDS_NS, first_mixture


def mixture_and_its_down_proj(tiny_model_factory):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
    prefix = ARCHITECTURES["mixtral"].experts_prefix(index)
    return shell, saved, stream, index, prefix, torch.stack([saved[f"{prefix}.{e}.w2.weight"] for e in range(8)])


@torch.no_grad()
def test_down_proj_is_solved_on_what_the_already_quantized_gate_and_up_feed_it(tiny_model_factory):
    slimming, architecture = Slimming(None, Quantize(scheme="W4A16", group_size=32)), ARCHITECTURES["mixtral"]
    shell, saved, stream, index, prefix, down_EDF = mixture_and_its_down_proj(tiny_model_factory)
    with shell.live(index, saved) as block:
        layer = moe_layer(architecture, block)
        routed = collect(index, block, stream, {}, new=Gram, architecture=architecture, advance=False).routed

        slim_(saved, block, slimming, stream=stream, architecture=architecture, index=index)

        packed = (saved[f"{prefix}.5.{part}.weight_packed"] for part in ("w1", "w3"))
        scales = (saved[f"{prefix}.5.{part}.weight_scale"] for part in ("w1", "w3"))
        served_OI = torch.cat([dequantize(unpack(p, 4, 64), s) for p, s in zip(packed, scales, strict=True)])
        assert torch.equal(layer.experts.gate_up_proj[5], served_OI)  # slim_ leaves the served gate and up in the live block
        gram = routed.inner_statistic(range(8), Gram, layer, CPU, weighted=False)
        expected, _ = gptq.quantize(down_EDF, gram.value, Grid(4, 32))
    for expert in range(8):
        packed = saved[f"{prefix}.{expert}.w2.weight_packed"]
        assert torch.equal(unpack(packed, 4, 128), expected.codes_EOI[expert])


@torch.no_grad()
def test_where_errors_do_not_propagate_down_proj_is_solved_on_the_untouched_gate_and_up(tiny_model_factory):
    step, architecture = Quantize(scheme="W4A16", group_size=32, propagate_error=False), ARCHITECTURES["mixtral"]
    slimming = Slimming(None, step)
    shell, saved, stream, index, prefix, down_EDF = mixture_and_its_down_proj(tiny_model_factory)
    with shell.live(index, saved) as block:
        layer = moe_layer(architecture, block)
        routed = collect(index, block, stream, {}, new=Gram, architecture=architecture, advance=False).routed
        gram = routed.inner_statistic(range(8), Gram, layer, CPU, weighted=False)

        slim_(saved, block, slimming, stream=stream, architecture=architecture, index=index)

    expected, _ = gptq.quantize(down_EDF, gram.value, Grid(4, 32))
    for expert in range(8):
        assert torch.equal(unpack(saved[f"{prefix}.{expert}.w2.weight_packed"], 4, 128), expected.codes_EOI[expert])


CHUNKED = {
    "gptq": Slimming(None, Quantize(group_size=32, attention="W8A16")),
    "awq": Slimming(None, Quantize(method="awq", group_size=32, attention="W8A16")),
    "sparsegpt": Slimming(Prune(pattern="2:4"), None),
    "wanda and gptq": Slimming(Prune(method="wanda", sparsity=0.5), Quantize(group_size=32)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_experts_give_the_bits_of_the_whole_stack(tiny_model_factory, monkeypatch, name):
    results = []
    for size in (8, 3, 1):
        shell, saved, stream, index = first_mixture(tiny_model_factory("olmoe"), "olmoe")
        monkeypatch.setattr("compression.slim.experts_at_once", lambda layer, size=size: size)
        monkeypatch.setattr("compression.balance.experts_at_once", lambda layer, size=size: size)
        with shell.live(index, saved) as block:
            rows = slim_(saved, block, CHUNKED[name], stream=stream, architecture=ARCHITECTURES["olmoe"], index=index)
        results.append((saved, {row.tensor: row for row in rows}))

    for other, rows in results[1:]:
        assert other.keys() == results[0][0].keys()
        assert all(torch.equal(other[key], results[0][0][key]) for key in other)
        assert rows == results[0][1]


@torch.no_grad()
def test_a_fused_family_is_pruned_along_its_inputs_and_alike_in_any_chunk(tiny_model_factory, monkeypatch):
    results = []
    for size in (8, 3):
        shell, saved, stream, index = first_mixture(tiny_model_factory("gpt_oss"), "gpt_oss")
        name = f"model.layers.{index}.mlp.experts.gate_up_proj"
        monkeypatch.setattr("compression.slim.experts_at_once", lambda layer, size=size: size)
        with shell.live(index, saved) as block:
            slim_(saved, block, CHUNKED["sparsegpt"], stream=stream, architecture=ARCHITECTURES["gpt_oss"], index=index)
        assert ((saved[name].unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()  # 2 of every 4 inputs, which lie second here
        results.append(saved)

    assert all(torch.equal(results[1][key], results[0][key]) for key in results[0])


@torch.no_grad()
def test_an_expert_that_computes_an_infinity_is_refused_by_name(tiny_model_factory):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
    for part in ("w1", "w3"):
        name = f"model.layers.{index}.block_sparse_moe.experts.6.{part}.weight"
        saved[name] = torch.full_like(saved[name], 1e18)  # finite, and so are its outputs; their product is not

    with shell.live(index, saved) as block, pytest.raises(NonFiniteWeights, match=r"the down_proj of .*experts 0 to 7"):
        slim_(saved, block, CHUNKED["sparsegpt"], stream=stream, architecture=ARCHITECTURES["mixtral"], index=index)


def test_each_component_gets_its_own_treatment():
    slimming = Slimming(
        Prune(method="wanda", pattern="2:4", shared_experts=True),
        Quantize(scheme="W4A16", group_size=64, attention="FP8_DYNAMIC", dense="W8A16"),
    )

    experts, shared = slimming.treatment("experts"), slimming.treatment("shared_experts")
    attention, dense = slimming.treatment("attention"), slimming.treatment("dense")

    assert (experts.methods, experts.pattern, experts.grid) == (("wanda", "gptq"), NOfM(2, 4), Grid(4, 64))
    assert (shared.methods, shared.scheme, shared.grid) == (("wanda",), "keep", None)
    assert (attention.methods, attention.grid) == (("gptq",), FloatGrid())
    assert (dense.methods, dense.grid) == (("gptq",), Grid(8, 64))
    assert slimming.treatment("router") is None
    assert slimming.treatment("embeddings") is None


def test_without_a_word_about_shared_experts_they_are_not_pruned():
    slimming = Slimming(Prune(sparsity=0.5), None)

    assert slimming.treatment("experts").pattern == Unstructured(0.5)
    assert slimming.treatment("shared_experts") is None
    assert slimming.treatment("attention") is None


@pytest.mark.parametrize(
    ("prune", "quantize", "needs"),
    [
        ("magnitude", None, "nothing"),
        ("wanda", None, "input_norm"),
        ("sparsegpt", None, "gram"),
        (None, "rtn", "nothing"),
        (None, "awq", "gram"),
        ("wanda", "rtn", "input_norm"),
        ("wanda", "gptq", "gram"),
        ("magnitude", "rtn", "nothing"),
    ],
)
def test_calibration_is_as_much_as_the_neediest_method_needs(prune, quantize, needs):
    slimming = Slimming(
        None if prune is None else Prune(method=prune, sparsity=0.5), None if quantize is None else Quantize(method=quantize)
    )

    assert slimming.needs == needs


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_the_tensors_that_the_reader_handed_out_stay_as_they_were(tiny_model_factory, model_type):
    shell, saved, stream, index = first_mixture(tiny_model_factory(model_type), model_type)
    given, before = dict(saved), {name: tensor.clone() for name, tensor in saved.items()}
    architecture, slimming = ARCHITECTURES[model_type], CHUNKED["awq" if model_type == "mixtral" else "sparsegpt"]

    with shell.live(index, saved) as block:
        slim_(saved, block, slimming, stream=stream, architecture=architecture, index=index)

    assert [name for name in given if not torch.equal(given[name], before[name])] == []


def slimmed_first_mixture(folder, model_type, slimming):
    """What becomes of a family's first mixture when some of its channels are loud: the ledger by name, and what is saved."""
    shell, saved, stream, index = first_mixture(folder, model_type)
    for hidden_BSD in stream.hidden:
        hidden_BSD[..., 5:9] *= 23
    norm = saved[f"model.layers.{index}.post_attention_layernorm.weight"]
    with shell.live(index, saved) as block:
        rows = slim_(saved, block, slimming, stream=stream, architecture=ARCHITECTURES[model_type], index=index)
    moved = not torch.equal(saved[f"model.layers.{index}.post_attention_layernorm.weight"], norm)
    return {row.tensor: row for row in rows}, saved, moved


@torch.no_grad()
def test_what_rounding_alone_would_have_lost_is_told_of_the_weights_as_they_came(tiny_model_factory):
    # Where errors do not propagate, both methods see the very same inputs.
    settings = {"group_size": 32, "attention": "W8A16", "propagate_error": False}
    folder = tiny_model_factory("mixtral", dtype="bfloat16")

    by_gptq, _, _ = slimmed_first_mixture(folder, "mixtral", Slimming(None, Quantize(method="gptq", **settings)))
    by_awq, _, moved = slimmed_first_mixture(folder, "mixtral", Slimming(None, Quantize(method="awq", **settings)))

    assert moved
    assert by_gptq.keys() == by_awq.keys()
    # The rows of up_proj are scaled too, each by itself: they count otherwise among themselves.
    names = [name for name in by_awq if ".w3." not in name]
    assert {name: by_awq[name].error_before for name in names} == {name: by_gptq[name].error_before for name in names}
    assert by_awq["model.layers.0.block_sparse_moe.experts.2.w1.weight"].error_before > 0


@torch.no_grad()
def test_moving_scales_does_not_change_which_weights_are_small(tiny_model_factory):
    folder, prune = tiny_model_factory("mixtral", dtype="bfloat16"), Prune(method="magnitude", sparsity=0.5)

    _, pruned, _ = slimmed_first_mixture(folder, "mixtral", Slimming(prune, None))
    _, stored, moved = slimmed_first_mixture(
        folder, "mixtral", Slimming(prune, Quantize(method="awq", scheme="W8A16", group_size=32))
    )

    assert moved
    for expert in range(8):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
        assert not unpack(stored[f"{name}_packed"], 8, 64)[pruned[name] == 0].any()


@torch.no_grad()
def test_a_shared_expert_that_is_pruned_and_kept_has_no_say_in_the_scales_it_is_given(tiny_model_factory):
    slimming = Slimming(
        Prune(method="wanda", sparsity=0.5, shared_experts=True), Quantize(method="awq", group_size=32, attention="W8A16")
    )

    rows, saved, moved = slimmed_first_mixture(tiny_model_factory("qwen2_moe", dtype="bfloat16"), "qwen2_moe", slimming)

    assert moved
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    assert (rows[name].method_used, rows[name].scheme, rows[name].zeros) == ("wanda", "keep", 0.5)
    assert (saved[name] == 0).double().mean() == 0.5


@pytest.mark.parametrize(("model_type", "index", "setting"), [("qwen2_moe", 0, "shared_experts"), ("deepseek_v3", 0, "dense")])
def test_what_enters_down_proj_is_scaled_by_way_of_up_proj_outside_the_experts_too(
    tiny_model_factory, monkeypatch, model_type, index, setting
):
    scaled = []

    def noted(weight_EOI, *rest):
        scaled.append(tuple(weight_EOI.shape))
        return balance_down(weight_EOI, *rest)

    monkeypatch.setattr("compression.slim.balance_down", noted)
    reader, architecture = Reader(tiny_model_factory(model_type)), ARCHITECTURES[model_type]
    shell, saved = Shell(reader.config, reader.outside()), reader.block(index)
    stream = Stream(shell, IDS_NS)
    part = next(name for name in saved if name.endswith("down_proj.weight") and ".experts." not in name)
    shape = tuple(saved[part].shape)
    with shell.live(index, saved) as block:
        slimming = Slimming(None, Quantize(method="awq", scheme="W4A16", group_size=32, **{setting: "W4A16"}))
        slim_(saved, block, slimming, stream=stream, architecture=architecture, index=index)

    assert (1, *shape) in scaled
