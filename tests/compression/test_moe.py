"""One expert formula and one hook serve every family of the table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.architectures import ARCHITECTURES
from compression.moe import by_expert, moe_layer
from tests.tiny_models import MODEL_TYPES


def live_layers(folder, model_type):
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = [moe_layer(ARCHITECTURES[model_type], block) for block in model.get_decoder().layers]
    return model, layers


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_sum_of_weighted_expert_outputs_is_what_the_stock_experts_module_returns(tiny_model_factory, model_type):
    _, layers = live_layers(tiny_model_factory(model_type, dtype="float32"), model_type)
    layer = next(layer for layer in layers if layer is not None)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(20, 64, generator=generator)
    ids_TK = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(20)])
    weights_TK = torch.rand(20, 2, generator=generator)

    summed_TD = torch.zeros_like(x_TD)
    for expert, tokens, places in by_expert(ids_TK, layer.count):
        summed_TD[tokens] += weights_TK[tokens, places, None] * layer.output(expert, x_TD[tokens])

    # float32 sums of two terms in another order, on outputs of size ~30: a few units in the last place.
    torch.testing.assert_close(summed_TD, layer.experts(x_TD, ids_TK, weights_TK), rtol=2e-6, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_hook_sees_top_k_choices_of_every_token_in_every_moe_layer(tiny_model_factory, model_type):
    model, layers = live_layers(tiny_model_factory(model_type), model_type)
    ids_NS = torch.arange(3, 51).view(2, 24)
    seen = []

    for layer in [layer for layer in layers if layer is not None]:
        with layer.watched(seen.append):
            model(input_ids=ids_NS, use_cache=False)

    assert seen
    for routed in seen:
        assert routed.x_TD.shape == (48, 64)
        assert routed.ids_TK.shape == routed.weights_TK.shape == (48, 2)
        assert (routed.ids_TK[:, 0] != routed.ids_TK[:, 1]).all()


@torch.no_grad()
def test_a_skipped_mixture_answers_zeros_and_is_whole_again_afterwards(tiny_model_factory):
    _, layers = live_layers(tiny_model_factory("mixtral"), "mixtral")
    layer = layers[0]
    call = (torch.randn(4, 64), torch.tensor([[0, 1]] * 4), torch.ones(4, 2))
    before = layer.experts(*call)

    with layer.watched(lambda routed: None, skip=True):
        skipped = layer.experts(*call)

    assert not skipped.any()
    assert torch.equal(layer.experts(*call), before)


def test_dense_blocks_have_no_moe_layer(tiny_model_factory):
    _, layers = live_layers(tiny_model_factory("deepseek_v3"), "deepseek_v3")

    assert layers[0] is None
    assert layers[-1] is not None


def test_by_expert_lists_every_choice_once_and_skips_idle_experts():
    ids_TK = torch.tensor([[2, 0], [0, 2], [2, 5]])

    listed = {expert: (tokens.tolist(), places.tolist()) for expert, tokens, places in by_expert(ids_TK, 6)}

    assert listed == {0: ([0, 1], [1, 0]), 2: ([0, 1, 2], [0, 1, 0]), 5: ([2], [1])}
