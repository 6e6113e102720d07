"""Blocks that differ in their experts, have lost a layer or skip experts: every way to open them gives one model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from compression.architectures import ARCHITECTURES, find_architecture
from compression.block import language_model
from compression.checkpoint.reader import Reader
from compression.checkpoint.writer import RUNTIME, needs_runtime
from compression.evaluation.verification import in_windows, verify
from compression.recipe import Pattern, Prune, Quantize
from compression.runtime.slimtrim_runtime import open_model, skip_experts
from compression.trimming import Cuts
from compression.trimming.dense_layers import dense_blocks, stock_layer_drop, zero_dense_width
from compression.trimming.surgery import cut_config
from compression.trimming.view import TrimmedReader
from tests.compression.made_trims import (
    IDS_NS,
    logits,
    said_far_from_here,
    swept,
    trimmed,
    whole_cuts,
)

ALL = tuple(range(8))
# deepseek_v3 chooses among groups of experts, of which as many must stay in each; its first block and qwen3's second are dense.
UNEVEN = {
    "mixtral": Cuts((0, 1, 2, 3), {0: (1, 3, 5), 1: ALL, 2: (6,), 3: (0, 1, 2, 4, 7)}),
    "olmoe": Cuts((0, 1, 2, 3), {0: (1, 3, 5), 1: ALL, 2: (6,), 3: (0, 1, 2, 4, 7)}),
    "qwen2_moe": Cuts((0, 1, 2, 3), {0: (1, 3, 5), 1: ALL, 2: (6,), 3: (0, 1, 2, 4, 7)}),
    "qwen3_moe": Cuts((0, 1, 2, 3), {0: (1, 3, 5), 2: (6,), 3: (0, 1, 2, 4, 7)}),
    "deepseek_v3": Cuts((0, 1, 2, 3), {1: (0, 3, 5, 7), 2: ALL, 3: (0, 1, 2, 4, 5, 7)}),
    "gpt_oss": Cuts((0, 1, 2, 3), {0: (1, 3, 5), 1: ALL, 2: (6,), 3: (0, 1, 2, 4, 7)}),
}
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"]
GONE = {name: Cuts(c.blocks, {b: e for b, e in c.experts.items() if b != 2}, frozenset({2})) for name, c in UNEVEN.items()}
EMPTY = {name: Cuts(c.blocks, {**c.experts, 3: ()}) for name, c in UNEVEN.items()}
SKIPPING = {name: Cuts(c.blocks, c.experts, skip={3: 0.8}) for name, c in UNEVEN.items()}
KINDS = {"uneven": UNEVEN, "gone": GONE, "empty": EMPTY, "skipping": SKIPPING}


pytestmark = pytest.mark.usefixtures("code_that_travels_stays_here")


def remote(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


# ----- one model, however it is opened


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_open_an_artifact_gives_the_same_logits(tiny_model_factory, tmp_path, family, kind):
    source, cuts = tiny_model_factory(family), KINDS[kind][family]

    expected = trimmed(source, tmp_path / "out", cuts)

    architecture = ARCHITECTURES[family]
    assert torch.equal(logits(open_model(tmp_path / "out")), expected)
    assert torch.equal(logits(remote(tmp_path / "out")), expected)
    assert torch.equal(swept(Reader(tmp_path / "out")), expected)
    assert torch.equal(swept(TrimmedReader(Reader(source), architecture, cuts)), expected)
    assert torch.equal(in_windows(tmp_path / "out", architecture, ids_BS=IDS_NS, device=torch.device("cpu")), expected)
    with pytest.raises(ValueError, match=r"trust_remote_code=True, or open_model of slimtrim_runtime\.py"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# Corrections beside the router, initialisers that reach for experts, shared experts beside the layer, several towers.
@pytest.mark.parametrize("last", ["empty", "gone"])
@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_next", "granitemoeshared", "qwen3_5_moe", "qwen3_omni_moe"])
def test_families_that_keep_things_elsewhere_are_shaped_like_any_other(tiny_model_factory, tmp_path, family, last):
    source, architecture = tiny_model_factory(family), ARCHITECTURES[family]
    whole = whole_cuts(source)
    first, *others, final = whole.experts
    experts = {first: (1, 4, 5), **{block: whole.experts[block] for block in others}, **({final: ()} if last == "empty" else {})}
    cuts = Cuts(whole.blocks, experts, frozenset({final} if last == "gone" else ()), skip={first: 0.8})

    expected = trimmed(source, tmp_path / "out", cuts)

    opened = language_model(architecture, open_model(tmp_path / "out"))
    assert torch.equal(logits(opened), expected)
    assert torch.equal(swept(Reader(tmp_path / "out")), expected)


# ----- against a slow reference


def masked_router(family, router, kept):
    """A router that never chooses a dropped expert, written out per family from its paper."""
    dropped = [expert for expert in range(8) if expert not in kept]
    top_k = min(2, len(kept))

    def choose(x):
        logits_TE = linear(x.reshape(-1, x.shape[-1]), router.weight, getattr(router, "bias", None))
        if family == "deepseek_v3":
            scores_TE = logits_TE.sigmoid()
            wanted_TE = scores_TE + router.e_score_correction_bias
            wanted_TE[:, dropped] = -torch.inf
            group_T2 = wanted_TE.unflatten(1, (2, 4)).topk(2).values.sum(-1)
            loser_T1 = group_T2.argmin(-1, keepdim=True)
            wanted_TE = wanted_TE.masked_fill(torch.arange(8) // 4 == loser_T1, -torch.inf)
            ids_TK = wanted_TE.topk(top_k).indices
            weights_TK = scores_TE.gather(1, ids_TK)
            return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True) * router.routed_scaling_factor, ids_TK
        logits_TE[:, dropped] = -torch.inf
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(top_k)
        if family in ("mixtral", "qwen3_moe", "gpt_oss"):  # those that make the chosen experts' weights sum to one
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, ids_TK

    return choose


def reference(family, source, cuts):
    """The source, whole and in memory, kept from using what was dropped; blocks stay, so that none is renumbered."""
    model = AutoModelForCausalLM.from_pretrained(source)
    for index, block in enumerate(model.get_decoder().layers):
        if index in cuts.layers_dropped:
            block.mlp.forward = lambda x: (torch.zeros_like(x), None) if family == "gpt_oss" else torch.zeros_like(x)
        elif cuts.experts.get(index) == ():
            block.mlp.experts.forward = lambda x, *_: torch.zeros_like(x)
        elif index in cuts.experts:
            name = "router" if family == "gpt_oss" else "gate"
            router = getattr(block.mlp, name)
            router.forward = masked_router(family, router, cuts.experts[index])
    return model


@pytest.mark.parametrize("kind", ["uneven", "gone", "empty"])
@pytest.mark.parametrize("family", UNEVEN)
def test_what_stays_computes_what_the_source_would_without_the_rest(tiny_model_factory, tmp_path, family, kind):
    source, cuts = tiny_model_factory(family), KINDS[kind][family]

    ours = trimmed(source, tmp_path / "out", cuts)

    expected = logits(reference(family, source, cuts))
    # float32 through four blocks, in which the order of additions differs; a wrong expert is off by more than 0.1
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(AutoModelForCausalLM.from_pretrained(source)), atol=0.1)


def test_ids_are_those_of_the_source_after_a_layer_and_a_block_have_gone(tiny_model_factory, tmp_path):
    source = tiny_model_factory("mixtral")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()  # then leaving block 1 out changes nothing, and the reference need not renumber
    model.save_pretrained(tmp_path / "source")
    cuts = Cuts((0, 2, 3), {0: (2, 7), 3: (0, 1, 4, 5, 6)}, frozenset({2}))

    ours = trimmed(tmp_path / "source", tmp_path / "out", cuts)

    before, after = load_file(tmp_path / "source" / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    moved = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    assert torch.equal(after[moved], before["model.layers.3.block_sparse_moe.experts.5.w2.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["slimtrim"]["experts"] == [2, -1, 5]
    expected = logits(
        reference("mixtral", tmp_path / "source", Cuts((0, 1, 2, 3), {0: (2, 7), 3: (0, 1, 4, 5, 6)}, frozenset({2})))
    )
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)  # as above


# ----- a layer that adds nothing can go


def silenced(source, folder, blocks):
    """Copy a model whose MoE layers in these blocks answer zeros."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for block in blocks:
            for name, parameter in model.get_decoder().layers[block].mlp.named_parameters():
                if "down_proj" in name:
                    parameter.zero_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", [{2}, {2, 3}])
def test_dropping_layers_that_add_nothing_changes_no_logit(tiny_model_factory, tmp_path, family, gone):
    model = silenced(tiny_model_factory(family), tmp_path / "source", gone)
    whole = whole_cuts(tmp_path / "source")
    cuts = Cuts(whole.blocks, {b: e for b, e in whole.experts.items() if b not in gone}, frozenset(gone))

    trimmed(tmp_path / "source", tmp_path / "out", cuts)

    assert torch.equal(logits(open_model(tmp_path / "out")), logits(model))
    names = Reader(tmp_path / "out").checkpoint.tensors
    assert not [name for name in names if name.startswith("model.layers.2.") and ("mlp" in name or "post_attention" in name)]


STOCK = [("qwen2_moe", {0, 2}), ("qwen3_moe", {2}), ("qwen2_moe_sparse_step", {1}), ("deepseek_v3", {1, 2})]


@pytest.mark.parametrize(("family", "gone"), STOCK)
def test_stock_transformers_opens_a_dropped_layer_as_a_dense_one_of_zeros(tiny_model_factory, tmp_path, family, gone):
    model = silenced(tiny_model_factory(family), tmp_path / "source", gone)
    whole, config = whole_cuts(tmp_path / "source"), Reader(tmp_path / "source").config
    architecture = find_architecture(config)
    cuts = Cuts(whole.blocks, {b: e for b, e in whole.experts.items() if b not in gone}, frozenset(gone))
    width = zero_dense_width(architecture, config, cuts.blocks)

    ours = trimmed(tmp_path / "source", tmp_path / "out", cuts, zero_width=width)

    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(logits(opened), ours)
    assert torch.equal(ours, logits(model))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not needs_runtime(written)
    assert width == (16 if family == "qwen2_moe" else 192) == written["intermediate_size"]
    assert opened.get_decoder().layers[min(gone)].mlp.up_proj.weight.shape == (width, 64)
    assert torch.equal(in_windows(tmp_path / "out", architecture, ids_BS=IDS_NS, device=torch.device("cpu")), ours)


def test_the_narrowest_layer_of_zeros_can_be_split_over_the_devices(tiny_model_factory):
    config = Reader(tiny_model_factory("qwen2_moe")).config

    assert zero_dense_width(ARCHITECTURES["qwen2_moe"], config, (0, 1, 2, 3), tensor_parallel=8) == 128


def test_where_no_dense_block_is_left_zeros_are_narrow_again(tiny_model_factory):
    config = Reader(tiny_model_factory("qwen3_moe")).config

    assert zero_dense_width(ARCHITECTURES["qwen3_moe"], config, (0, 2, 3)) == 16


def test_families_say_how_they_spell_a_dropped_layer():
    spelled = {name: stock_layer_drop(row, {"num_hidden_layers": 4}) for name, row in ARCHITECTURES.items()}

    assert {name: spelled[name] for name in FAMILIES} == {
        "mixtral": None,
        "qwen2_moe": "list",
        "qwen3_moe": "list",
        "deepseek_v3": "prefix",
        "gpt_oss": None,
    }
    typed = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "dense"]}
    assert stock_layer_drop(ARCHITECTURES["mellum"], typed) == "types"
    assert dense_blocks(ARCHITECTURES["mellum"], typed) == {0, 2}


def test_a_family_with_a_prefix_of_dense_blocks_drops_no_layer_behind_one_that_stays(tiny_model_factory):
    config = Reader(tiny_model_factory("deepseek_v3")).config

    with pytest.raises(AssertionError, match="at the start alone"):
        cut_config(config, ARCHITECTURES["deepseek_v3"], Cuts((0, 1, 2, 3), {1: ALL, 3: ALL}, frozenset({2})), zero_width=192)


# ----- skipping


def skipped_by_hand(weights, beta):
    """The kept places of one token, and their weights: NAEE's rule for any number of experts."""
    order = sorted(range(len(weights)), key=lambda place: -weights[place])
    for count in range(1, len(order) + 1):
        first, rest = sum(weights[p] for p in order[:count]), sum(weights[p] for p in order[count:])
        if rest < beta * first or count == len(order):
            return {place: weights[place] * sum(weights) / first for place in order[:count]}
    raise AssertionError


def an_experts_module(implementation="grouped_mm"):
    return SimpleNamespace(num_experts=9, config=SimpleNamespace(_experts_implementation=implementation))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0, 5.0])
def test_skipping_keeps_for_each_token_what_a_loop_over_tokens_keeps(beta):
    generator = torch.Generator().manual_seed(3)
    weights_TC = torch.rand(64, 4, generator=generator)
    ids_TC = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(64)])

    _, left_TC, scaled_TC = skip_experts(beta, an_experts_module(), (torch.zeros(64, 2), ids_TC, weights_TC))

    for ids, left, scaled, weights in zip(ids_TC, left_TC, scaled_TC, weights_TC.tolist(), strict=True):
        kept = skipped_by_hand(weights, beta)
        assert left.tolist() == [int(ids[place]) if place in kept else 9 for place in range(4)]
        assert scaled.tolist() == pytest.approx([kept.get(place, 0.0) for place in range(4)], rel=1e-5)  # float32 sums


def test_of_two_experts_the_second_goes_if_it_weighs_less_than_beta_times_the_first():
    weights_TC = torch.tensor([[0.375, 0.625], [0.75, 0.25], [0.5, 0.25]])
    ids_TC = torch.tensor([[7, 2], [1, 8], [3, 4]])

    _, left_TC, scaled_TC = skip_experts(0.5, an_experts_module(), (torch.zeros(3, 2), ids_TC, weights_TC))

    assert left_TC.tolist() == [[7, 2], [1, 9], [3, 4]]
    assert scaled_TC.tolist() == [[0.375, 0.625], [1.0, 0.0], [0.5, 0.25]]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_beta_of_zero_skips_nothing_in_any_implementation(tiny_model_factory, tmp_path, family, implementation):
    source = tiny_model_factory(family)
    whole = whole_cuts(source)

    trimmed(source, tmp_path / "out", Cuts(whole.blocks, whole.experts, skip=dict.fromkeys(whole.experts, 0.0)))

    stock = AutoModelForCausalLM.from_pretrained(source, experts_implementation=implementation)
    ours = open_model(tmp_path / "out", experts_implementation=implementation)
    assert torch.equal(logits(ours), logits(stock))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_model_that_skips_computes_what_fewer_experts_compute(tiny_model_factory, tmp_path, family, implementation):
    source = tiny_model_factory(family)
    whole = whole_cuts(source)
    trimmed(source, tmp_path / "out", Cuts(whole.blocks, whole.experts, skip=dict.fromkeys(whole.experts, 0.6)))

    ours = open_model(tmp_path / "out", experts_implementation=implementation)

    stock = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    skipped = []
    for index in whole.experts:
        experts = stock.get_decoder().layers[index].mlp.experts

        def by_hand(x_TD, ids_TC, weights_TC, run=experts.forward):
            rows = []
            for x_D, ids_C, weights_C in zip(x_TD, ids_TC, weights_TC, strict=True):
                kept = skipped_by_hand(weights_C.tolist(), 0.6)
                skipped.append(len(weights_C) - len(kept))
                places = list(kept)
                rows.append(run(x_D[None], ids_C[None, places], torch.tensor([list(kept.values())])))
            return torch.cat(rows)

        experts.forward = by_hand
    expected = logits(stock)
    assert 0 < sum(skipped) < len(skipped)  # some tokens skip and some do not
    assert torch.allclose(logits(ours), expected, rtol=1e-4, atol=1e-4)  # float32, other order of additions


# ----- what a file says, and who reads it


def test_config_says_in_every_dialect_what_is_left(tiny_model_factory, tmp_path):
    source = tiny_model_factory("qwen3_moe")

    trimmed(source, tmp_path / "out", Cuts((0, 1, 2, 3), {0: (1, 3, 5), 3: (2, 4)}, frozenset({2}), skip={3: 0.25}))

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 3
    assert config["pruned_from_num_experts"] == 8
    assert config["per_layer_num_experts"] == [3, None, 0, 2]
    assert config["slimtrim"] == {
        "profile": "custom",
        "experts": [3, None, -1, 2],
        "skip": [None, None, None, 0.25],
        "language_model": "",
        "layer": "mlp",
        "experts_module": "mlp.experts",
        "router": "mlp.gate",
        "norm": "post_attention_layernorm",
        "beside": [],
        "count_keys": ["num_experts", "num_local_experts"],
        "top_k_key": "num_experts_per_tok",
        "layer_returns": 1,
    }
    assert AutoConfig.from_pretrained(tmp_path / "out").num_experts_per_tok == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_counts_stay_a_stock_model_that_says_where_it_comes_from(tiny_model_factory, tmp_path, family):
    source = tiny_model_factory(family)
    cuts = Cuts((0, 1, 2, 3), dict.fromkeys(whole_cuts(source).experts, (0, 1, 4, 5)))

    ours = trimmed(source, tmp_path / "out", cuts)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pruned_from_num_experts"] == 8
    assert not {"slimtrim", "auto_map", "transformers_weights", "per_layer_num_experts"} & config.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), ours)


def test_keeping_everything_says_nothing(tiny_model_factory):
    config = Reader(tiny_model_factory("mixtral")).config

    assert cut_config(config, ARCHITECTURES["mixtral"], whole_cuts(tiny_model_factory("mixtral"))) == config


QUANTIZE = Quantize(method="rtn", scheme="W4A16", group_size=32)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_quantized_experts_open_in_blocks_that_differ(tiny_model_factory, tmp_path, family):
    cuts = Cuts((0, 1, 2, 3), {**GONE[family].experts, 1: EMPTY[family].experts[3]}, frozenset({2}), skip={3: 0.7})

    expected = trimmed(tiny_model_factory(family, dtype="bfloat16"), tmp_path / "out", cuts, quantize=QUANTIZE)

    assert torch.equal(logits(open_model(tmp_path / "out")), expected)
    assert torch.equal(logits(remote(tmp_path / "out")), expected)
    assert torch.equal(in_windows(tmp_path / "out", ARCHITECTURES[family], ids_BS=IDS_NS, device=torch.device("cpu")), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    declared = {"method": "prune", "num_experts": config["per_layer_num_experts"]}
    assert config["quantization_config"]["moe_sparsity_config"] == declared


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_methods_work_in_blocks_without_experts_or_layer(tiny_model_factory, tmp_path, method):
    step = Quantize(method=method, scheme="W4A16", group_size=32, attention="W4A16", shared_experts="W4A16")
    cuts = Cuts((0, 1, 2, 3), {0: (1, 3, 5), 1: (), 3: ALL}, frozenset({2}), skip={3: 0.7})

    expected = trimmed(tiny_model_factory("qwen2_moe", dtype="bfloat16"), tmp_path / "out", cuts, quantize=step)

    assert torch.equal(logits(open_model(tmp_path / "out")), expected)


@pytest.mark.parametrize(("method", "dense"), [("rtn", "W4A16"), ("gptq", "W4A16"), ("awq", "W4A16"), ("rtn", "keep")])
def test_a_layer_of_zeros_can_be_quantized_like_any_dense_layer(tiny_model_factory, tmp_path, method, dense):
    cuts = Cuts((0, 1, 2, 3), dict.fromkeys((0, 3), (1, 3, 5)), frozenset({2}))
    step = Quantize(method=method, scheme="W4A16", group_size=32, dense=dense)

    source = tiny_model_factory("qwen3_moe", dtype="bfloat16")
    expected = trimmed(source, tmp_path / "out", cuts, zero_width=192, quantize=step)

    verify(tmp_path / "out", ARCHITECTURES["qwen3_moe"], ids_BS=IDS_NS, logits_BSV=expected, whole=True, on_block=lambda *_: None)


def test_packed_zeros_open_in_blocks_that_differ(tiny_model_factory, tmp_path):
    cuts = Cuts((0, 1, 2, 3), {0: (1, 3, 5), 1: (), 3: ALL}, frozenset({2}), skip={3: 0.7})
    prune = Prune(method="magnitude", pattern="2:4")

    expected = trimmed(tiny_model_factory("mixtral", dtype="bfloat16"), tmp_path / "out", cuts, prune=prune, packed=Pattern(2, 4))

    section = json.loads((tmp_path / "out" / "config.json").read_text())["slimtrim"]
    assert section["sparse"] == {"pattern": "2:4"}
    assert section["experts"] == [3, 0, -1, 8]
    assert torch.equal(logits(open_model(tmp_path / "out")), expected)
    assert torch.equal(logits(remote(tmp_path / "out")), expected)
    assert torch.equal(swept(Reader(tmp_path / "out")), expected)


# ----- the life of an opened model


@pytest.fixture(scope="module")
def artifact(tiny_model_factory, tmp_path_factory):
    out = tmp_path_factory.mktemp("shaped") / "out"
    trimmed(tiny_model_factory("mixtral"), out, Cuts((0, 1, 2, 3), {0: (1, 3, 5), 1: (), 3: ALL}, frozenset({2}), skip={3: 0.7}))
    return out


@pytest.mark.parametrize("whole", [True, False])
def test_verification_opens_it_with_its_own_loader_and_says_so(artifact, whole):
    logits_BSV = logits(open_model(artifact))

    verified = verify(
        artifact, ARCHITECTURES["mixtral"], ids_BS=IDS_NS, logits_BSV=logits_BSV, whole=whole, on_block=lambda *_: None
    )

    assert verified.opened_with.startswith(f"{RUNTIME.name} on transformers ")


def test_a_model_saved_again_opens_again(artifact, tmp_path):
    model = open_model(artifact)

    model.save_pretrained(tmp_path / "again")

    assert torch.equal(logits(open_model(tmp_path / "again")), logits(model))
    assert torch.equal(logits(remote(tmp_path / "again")), logits(model))
    with pytest.raises(ValueError, match="open_model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_the_opened_model_is_of_stock_classes_and_generates(artifact):
    model = open_model(artifact)

    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", num_hidden_layers=1, hidden_size=64))
    assert type(model) is type(stock)
    assert {type(block) for block in model.model.layers} == {type(stock.model.layers[0])}
    text = model.generate(IDS_NS[:1], max_new_tokens=4, do_sample=False, pad_token_id=2, eos_token_id=None)
    uncached = IDS_NS[:1]
    for _ in range(4):
        uncached = torch.cat([uncached, model(uncached, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert text.tolist() == uncached.tolist()


def test_settings_made_later_reach_every_block(artifact):
    model = open_model(artifact)

    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")

    seen = {module.config._experts_implementation for module in model.modules() if hasattr(module, "config")}
    seen |= {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert seen == {"eager"}


def test_a_new_model_of_that_shape_can_be_made_from_its_config(artifact):
    config = AutoConfig.from_pretrained(artifact)

    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)

    assert model.model.layers[0].mlp.gate.weight.shape[0] == 3
    assert torch.isfinite(logits(model)).all()


def test_the_remote_code_needs_nothing_of_ours(artifact, tmp_path):
    opening = "from transformers import AutoModelForCausalLM as A; model = A.from_pretrained('.', trust_remote_code=True)"
    saying = "type(model).__name__, [len(list(block.parameters())) for block in model.model.layers]"

    assert said_far_from_here(artifact, tmp_path, opening, saying) == "MixtralForCausalLM [9, 6, 5, 9]"
