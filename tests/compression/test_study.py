"""The study's sums equal a slow reference, and do not care how the calibration set is split."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.study import Observer
from compression.sweep import Stream, sweep
from tests.tiny_models import MODEL_TYPES

IDS_NS = torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(5))


def study(folder, model_type, ids_NS, domain_N=None, *, output_norms=True):
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    domains = torch.zeros(len(ids_NS), dtype=torch.long) if domain_N is None else domain_N
    observer = Observer(ARCHITECTURES[model_type], domains, output_norms=output_norms)
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
        assert torch.equal(statistics.count_E, count_E)
        # The model runs in float32 here and in float64 there.
        torch.testing.assert_close(statistics.weight_E, weight_E, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.weighted_norm_E, norm_E, rtol=1e-4, atol=1e-6)


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
        assert ours.cosine(index) == pytest.approx(cosine, rel=1e-12)


def test_splitting_the_calibration_set_changes_no_count_and_sums_by_rounding_only(tiny_model_factory):
    folder = tiny_model_factory("qwen3_moe")

    whole = study(folder, "qwen3_moe", IDS_NS)
    parts = [study(folder, "qwen3_moe", ids_NS) for ids_NS in IDS_NS.split([1, 2, 3])]

    for index, statistics in whole.experts.items():
        assert torch.equal(statistics.count_E, sum(part.experts[index].count_E for part in parts))
        # Batches of another shape round differently in float32; the sums themselves are float64.
        total = sum(part.experts[index].weighted_norm_E for part in parts)
        torch.testing.assert_close(statistics.weighted_norm_E, total, rtol=1e-5, atol=0)
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
    assert statistics.count_E.sum() == 2 * IDS_NS.numel()


def test_output_norms_are_nan_where_nobody_asked_for_them(tiny_model_factory):
    statistics = study(tiny_model_factory("mixtral"), "mixtral", IDS_NS, output_norms=False).experts[0]

    assert statistics.weighted_norm_E.isnan().all()
    assert not statistics.weight_E.isnan().any()
