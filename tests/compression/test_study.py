"""The study's sums equal a slow reference, and do not care how the calibration set is split."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.observer import Observer, weigh
from compression.slimming.grid import Grid, dequantize
from compression.slimming.rtn import round_to_nearest
from compression.study import RATIO_BINS
from compression.sweep import Push, Stream, sweep
from tests.tiny_models import MODEL_TYPES

IDS_NS = torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(5))


def study(folder, model_type, ids_NS, domain_N=None, *, parts=("tokens",)):
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    domain_N = torch.zeros(len(ids_NS), dtype=torch.long) if domain_N is None else domain_N
    domains = tuple(f"domain {index}" for index in range(int(domain_N.max()) + 1))
    observer = Observer(ARCHITECTURES[model_type], domains, domain_N, parts)
    sweep(shell, reader, Stream(shell, ids_NS), observer, lambda *_: None)
    return observer.study


@torch.no_grad()
def slow_reference(folder, ids_NS):
    """Count tokens, sum routing weights and weighted output norms expert by expert, token by token, in the stock model."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    sums = {}

    def watch(index):
        def look(experts, args):
            x_TD, ids_TK, weights_TK = args
            count_E, weight_E, norm_E = torch.zeros(3, 8, dtype=torch.float64)
            for x_D, chosen, weights in zip(x_TD, ids_TK.tolist(), weights_TK.tolist(), strict=True):
                for expert, weight in zip(chosen, weights, strict=True):
                    alone = experts.forward(x_D[None], torch.tensor([[expert]]), torch.ones(1, 1, dtype=torch.float64))
                    count_E[expert] += 1
                    weight_E[expert] += weight
                    norm_E[expert] += weight * alone.norm().item()
            sums[index] = (count_E, weight_E, norm_E)

        return look

    for index, block in enumerate(model.get_decoder().layers):
        if hasattr(block.mlp, "experts"):
            block.mlp.experts.register_forward_pre_hook(watch(index))
    model(input_ids=ids_NS, use_cache=False)
    return sums


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_sum_equals_a_token_by_token_reference_in_float64(tiny_model_factory, model_type):
    folder = tiny_model_factory(model_type)

    ours, slow = study(folder, model_type, IDS_NS), slow_reference(folder, IDS_NS)

    assert ours.experts.keys() == slow.keys()
    for index, (count_E, weight_E, norm_E) in slow.items():
        statistics = ours.experts[index]
        assert torch.equal(statistics.total("count"), count_E)
        # The model runs in float32 here and in float64 there.
        torch.testing.assert_close(statistics.total("weight"), weight_E, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.total("weighted_norm"), norm_E, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_the_cosine_is_that_of_the_stock_models_hidden_states(tiny_model_factory, model_type):
    folder = tiny_model_factory(model_type)
    states = []
    model = AutoModelForCausalLM.from_pretrained(folder)
    for block in model.get_decoder().layers:
        block.register_forward_hook(lambda module, args, output: states.append((args[0], output)))
    model(input_ids=IDS_NS, use_cache=False)

    ours = study(folder, model_type, IDS_NS)

    for index, (before, after) in enumerate(states):
        cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1).mean().item()
        assert ours.cosine(index) == pytest.approx(cosine, rel=1e-6)  # products and norms are float32, sums float64


def test_splitting_the_calibration_set_changes_no_count_and_sums_by_rounding_only(tiny_model_factory):
    folder = tiny_model_factory("qwen3_moe")

    whole = study(folder, "qwen3_moe", IDS_NS)
    parts = [study(folder, "qwen3_moe", ids_NS) for ids_NS in IDS_NS.split([1, 2, 3])]

    for index, statistics in whole.experts.items():
        assert torch.equal(statistics.total("count"), sum(part.experts[index].total("count") for part in parts))
        # Batches of another shape round differently in float32; the sums themselves are float64.
        total = sum(part.experts[index].total("weighted_norm") for part in parts)
        torch.testing.assert_close(statistics.total("weighted_norm"), total, rtol=1e-5, atol=0)
        torch.testing.assert_close(whole.cosine_M[index], sum(part.cosine_M[index] for part in parts), rtol=1e-5, atol=0)


def test_domains_are_kept_apart_and_add_up(tiny_model_factory):
    folder = tiny_model_factory("deepseek_v3")
    domain_N = torch.tensor([0, 1, 0, 1, 1, 0])

    mixed = study(folder, "deepseek_v3", IDS_NS, domain_N)
    alone = study(folder, "deepseek_v3", IDS_NS[domain_N == 1])

    for index, statistics in mixed.experts.items():
        assert statistics.tokens_M.tolist() == [72.0, 72.0]
        assert torch.equal(statistics.count_ME[1], alone.experts[index].count_ME[0])
        torch.testing.assert_close(mixed.cosine_M[index][1], alone.cosine_M[index][0], rtol=1e-5, atol=0)


def test_each_token_is_counted_once_per_chosen_expert(tiny_model_factory):
    statistics = study(tiny_model_factory("olmoe"), "olmoe", IDS_NS).experts[0]

    assert statistics.tokens == IDS_NS.numel()
    assert statistics.total("count").sum() == 2 * IDS_NS.numel()


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_experts_own_run_gives_the_stock_layers_answer(tiny_model_factory, model_type):
    folder = tiny_model_factory(model_type)
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    ours, stock = Stream(shell, IDS_NS), Stream(shell, IDS_NS)
    observer = Observer(ARCHITECTURES[model_type], ("text",), torch.zeros(len(IDS_NS), dtype=torch.long))

    sweep(shell, reader, ours, observer, lambda *_: None)
    sweep(shell, reader, stock, Push(), lambda *_: None)

    # A token's experts are summed in another order, four blocks deep.
    torch.testing.assert_close(ours.hidden, stock.hidden, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_spans_are_cosines_between_what_enters_one_block_and_leaves_another(tiny_model_factory):
    folder = tiny_model_factory("mixtral")
    states = []
    model = AutoModelForCausalLM.from_pretrained(folder)
    for block in model.get_decoder().layers:
        block.register_forward_hook(lambda module, args, output: states.append((args[0], output)))
    model(input_ids=IDS_NS, use_cache=False)

    ours = study(folder, "mixtral", IDS_NS)

    for first, (before, _) in enumerate(states):
        for last, (_, after) in enumerate(states):
            cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1).mean().item() if last >= first else 0.0
            assert ours.span_cosine(first, last) == pytest.approx(cosine, rel=1e-4, abs=1e-6)  # the streams differ by rounding
        assert ours.span_cosine(first, first) == pytest.approx(ours.cosine(first), rel=1e-5)


def test_a_mixture_is_what_repeated_text_would_have_given(tiny_model_factory):
    folder = tiny_model_factory("qwen2_moe")
    domain_N = torch.tensor([0, 0, 0, 1, 1, 1])

    mixed = study(folder, "qwen2_moe", IDS_NS, domain_N).mixed({"domain 0": 1.0, "domain 1": 3.0})
    repeated = study(folder, "qwen2_moe", torch.cat([IDS_NS[:3], *[IDS_NS[3:]] * 3]))

    for index, statistics in repeated.experts.items():
        for entry in fields(statistics):
            ours, other = getattr(mixed.experts[index], entry.name), getattr(statistics, entry.name)
            if isinstance(other, torch.Tensor):
                # Micro-batches of another shape round differently in float32.
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4, msg=lambda m, n=entry.name: f"{n}: {m}")
        assert mixed.cosine(index) == pytest.approx(repeated.cosine(index), rel=1e-6)


def test_what_two_experts_share_is_counted_by_pairs(tiny_model_factory):
    statistics = study(tiny_model_factory("olmoe"), "olmoe", IDS_NS).experts[0]
    together_EE = statistics.total("together")

    assert torch.equal(together_EE.diagonal(), statistics.total("count"))
    assert torch.equal(together_EE, together_EE.mT)
    assert together_EE.sum() == 4 * IDS_NS.numel()  # top-2: each token has its two experts, and the pair both ways
    torch.testing.assert_close(
        statistics.total("together_norm").diagonal(), statistics.total("weighted_square"), rtol=1e-5, atol=0
    )  # products in float32


def test_ranks_and_ratios_count_every_token_once(tiny_model_factory):
    statistics = study(tiny_model_factory("mixtral"), "mixtral", IDS_NS).experts[0]

    assert statistics.total("rank").sum(1).tolist() == [IDS_NS.numel()] * 2
    assert statistics.total("ratio").sum() == IDS_NS.numel()
    torch.testing.assert_close(statistics.total("probability").sum(), torch.tensor(float(IDS_NS.numel())).double())


@torch.no_grad()
def test_the_median_ratio_is_that_of_the_stock_routers_weights(tiny_model_factory):
    folder, ratios = tiny_model_factory("mixtral"), []
    model = AutoModelForCausalLM.from_pretrained(folder)

    def look(module, args):
        ratios.append(args[2].amin(1) / args[2].amax(1))

    model.get_decoder().layers[0].mlp.experts.register_forward_pre_hook(look)
    model(input_ids=IDS_NS, use_cache=False)

    ours = study(folder, "mixtral", IDS_NS).experts[0].median_ratio()

    assert ours == pytest.approx(ratios[0].median().item(), abs=1 / RATIO_BINS)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_sample_shows_its_tokens_to_every_expert(tiny_model_factory, model_type):
    folder = tiny_model_factory(model_type)
    model, inputs = AutoModelForCausalLM.from_pretrained(folder), {}
    for index, block in enumerate(model.get_decoder().layers):
        if hasattr(block.mlp, "experts"):
            block.mlp.experts.register_forward_pre_hook(lambda m, args, i=index: inputs.update({i: (m, *args)}))
    model(input_ids=IDS_NS, use_cache=False)

    ours = study(folder, model_type, IDS_NS, parts=("tokens", "sample"))

    for index, (experts, x_TD, ids_TK, weights_TK) in inputs.items():
        sample, tokens = ours.experts[index].sample, len(x_TD)
        ones = torch.ones(tokens, 1)
        outputs_TED = torch.stack([experts(x_TD, torch.full((tokens, 1), e), ones) for e in range(8)], dim=1)
        gram_TEE = outputs_TED @ outputs_TED.mT
        weights_TE = torch.zeros(tokens, 8).scatter(1, ids_TK, weights_TK)
        assert len(sample.domain_S) == tokens  # few enough to be taken whole
        # float32 at the end of up to four blocks, against the stock order of sums
        torch.testing.assert_close(sample.gram_SEE, gram_TEE, rtol=2e-3, atol=2e-3 * gram_TEE.abs().max().item())
        torch.testing.assert_close(sample.weights_SE.float(), weights_TE, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_outputs_their_largest_numbers_and_their_ranks_are_those_of_single_tokens(tiny_model_factory, model_type):
    folder = tiny_model_factory(model_type)
    model, inputs = AutoModelForCausalLM.from_pretrained(folder), {}
    for index, block in enumerate(model.get_decoder().layers):
        if hasattr(block.mlp, "experts"):
            block.mlp.experts.register_forward_pre_hook(lambda m, args, i=index: inputs.update({i: (m, *args)}))
    model(input_ids=IDS_NS, use_cache=False)

    ours = study(folder, model_type, IDS_NS)

    for index, (experts, x_TD, ids_TK, weights_TK) in inputs.items():
        sums_ED, largest_E, ranks_KK = torch.zeros(8, x_TD.shape[1]), torch.zeros(8), torch.zeros(2, 2)
        for x_D, chosen, weights in zip(x_TD, ids_TK.tolist(), weights_TK.tolist(), strict=True):
            outputs = [experts.forward(x_D[None], torch.tensor([[e]]), torch.ones(1, 1))[0] for e in chosen]
            for expert, output_D in zip(chosen, outputs, strict=True):
                sums_ED[expert] += output_D
                largest_E[expert] = max(largest_E[expert], output_D.abs().max())
            louder = int(outputs[1].norm() > outputs[0].norm())
            heavier = int(weights[1] > weights[0])
            ranks_KK += torch.eye(2) if louder == heavier else 1 - torch.eye(2)
        statistics = ours.experts[index]
        scale = sums_ED.abs().max().item()  # the streams differ by the rounding of float32 sums
        torch.testing.assert_close(statistics.total("output").float(), sums_ED, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(statistics.largest_ME[0].float(), largest_E, rtol=1e-3, atol=1e-5)
        assert torch.equal(statistics.total("rank").float(), ranks_KK)


def test_weights_alone_need_no_token(tiny_model_factory):
    reader = Reader(tiny_model_factory("mixtral"))
    shell = Shell(reader.config, reader.outside())

    alone = weigh(shell, reader, ARCHITECTURES["mixtral"], lambda *_: None)
    whole = study(tiny_model_factory("mixtral"), "mixtral", IDS_NS)

    for index, statistics in whole.experts.items():
        assert torch.equal(alone.experts[index].absolute_E, statistics.absolute_E)
        assert alone.experts[index].tokens == 0


def test_trial_errors_fall_with_bits_and_are_those_of_the_outputs(tiny_model_factory):
    trials = study(tiny_model_factory("qwen2_moe"), "qwen2_moe", IDS_NS, parts=("tokens", "trials")).trials[0]
    error = {name: dict(zip(trials.settings, value, strict=True)) for name, value in trials.error.items()}

    assert {"self_attn.q_proj", "mlp.shared_expert.up_proj", "experts.*.gate_up_proj", "experts.*.down_proj"} <= set(error)
    for name, by_setting in error.items():
        assert (by_setting["W8A16"] < by_setting["W4A16"]).all(), name
        assert (by_setting["W4A16"] < by_setting["W3A16"]).all(), name
        assert (by_setting["W3A16"] < by_setting["W2A16"]).all(), name
        assert (by_setting["wanda 50 %"] <= by_setting["wanda 2:4"]).all(), name
        assert (by_setting["W2A16"] < trials.energy[name]).all(), name
    assert error["experts.*.down_proj"]["W4A16"].shape == (8,)


def test_a_trial_is_what_rounding_does_to_the_outputs(tiny_model_factory):
    folder = tiny_model_factory("mixtral")
    reader, fed = Reader(folder), []
    model = AutoModelForCausalLM.from_pretrained(folder)
    projection = model.get_decoder().layers[0].self_attn.q_proj
    projection.register_forward_pre_hook(lambda _m, args: fed.append(args[0].flatten(0, -2)))
    model(input_ids=IDS_NS, use_cache=False)
    weight_OI = reader.block(0)["model.layers.0.self_attn.q_proj.weight"]
    rounded = round_to_nearest(weight_OI[None], Grid(3, 64))
    lost_OI = weight_OI - dequantize(rounded.codes_EOI, rounded.scale_EOG)[0]

    trials = study(folder, "mixtral", IDS_NS, parts=("tokens", "trials")).trials[0]

    place = trials.settings.index("W3A16")
    mean_square = (fed[0] @ lost_OI.T).square().sum(1).mean().item()
    # Gram matrices are sums of float32 products.
    assert trials.error["self_attn.q_proj"][place].item() == pytest.approx(mean_square, rel=1e-4)
