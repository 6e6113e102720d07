"""Likeness of experts by their weights, against loops and against matrices made alike on purpose."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM

from compression.analysis import likeness as module
from compression.analysis.likeness import PAIRS, kendall_tau, likeness, pairs
from compression.architectures import ARCHITECTURES
from compression.moe import moe_layer
from compression.neurons import best_order, cosines
from tests.compression.analysis.studies import a_router, live, random_layer
from tests.tiny_models import MODEL_TYPES


def cosine(one, other):
    one, other = one.double().flatten(), other.double().flatten()
    return float(one @ other / one.norm() / other.norm())


def saved_experts(folder, model_type, block):
    """Return gate, up and down of every expert [F, D], read from the file by hand."""
    tensors, row = load_file(folder / "model.safetensors"), ARCHITECTURES[model_type]
    prefix = row.experts_prefix(block)
    if model_type == "gpt_oss":
        both, down = tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.down_proj"]
        return [(both[e, :, ::2].T, both[e, :, 1::2].T, down[e]) for e in range(8)]
    names = [[f"{prefix}.{e}.{matrix}.weight" for matrix in row.gate_up_down] for e in range(8)]
    return [(tensors[gate], tensors[up], tensors[down].T) for gate, up, down in names]


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_compared_matrix_by_matrix_as_its_file_has_them(tiny_model_factory, model_type):
    folder, row = tiny_model_factory(model_type), ARCHITECTURES[model_type]
    block = AutoModelForCausalLM.from_pretrained(folder).get_decoder().layers[2]
    experts = saved_experts(folder, model_type, 2)
    router_ED = load_file(folder / "model.safetensors")[row.router_name(2)]

    found = likeness(moe_layer(row, block), block.get_submodule(row.running_router))

    for one, other in combinations(range(8), 2):
        for matrix in range(3):
            a_FD, b_FD = experts[one][matrix], experts[other][matrix]
            # float32 sums over 8192 products, accumulated in another order than in float64: 1e-5 of the norms' product.
            assert found.matrix_3EE[matrix, one, other] == pytest.approx(cosine(a_FD, b_FD), abs=1e-5)
            # The mean over 128 neurons is eleven times smaller than a neuron, and its rounding is relative to the neurons.
            assert found.average_3EE[matrix, one, other] == pytest.approx(cosine(a_FD.mean(0), b_FD.mean(0)), abs=1e-5)
        assert found.router_EE[one, other] == pytest.approx(cosine(router_ED[one], router_ED[other]), abs=1e-5)
    assert found.pairs_P2.tolist() == [list(pair) for pair in combinations(range(8), 2)]
    for place, (one, other) in enumerate(found.pairs_P2.tolist()):
        rows = [cosine(a_D, b_D) for a_D, b_D in zip(experts[one][0], experts[other][0], strict=True)]
        assert found.aligned_P[place] == pytest.approx(sum(rows) / len(rows), abs=1e-5)


def test_identical_experts_are_alike_in_every_way():
    gate, up, down = (stack[:1].expand(3, -1, -1) for stack in random_layer())
    router = a_router(1, 32)
    router.weight.data = router.weight.data.expand(3, -1)

    found = likeness(live(gate, up, down), router)

    ones = torch.ones(3, 3, dtype=torch.float64)
    for value in (*found.matrix_3EE, *found.average_3EE, found.router_EE):
        torch.testing.assert_close(value, ones)
    assert found.tau_P.tolist() == [1.0] * 3
    # Cosines of float32 rows of 32 numbers: a few units in the last place.
    assert found.aligned_P.tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert found.matched_P.tolist() == found.aligned_P.tolist()


def test_a_shuffled_copy_is_matched_neuron_by_neuron_and_tau_is_that_of_the_shuffle():
    gate, up, down = (stack[:1].expand(2, -1, -1).clone() for stack in random_layer())
    shuffle_F = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    gate[1], up[1], down[1] = gate[0][shuffle_F], up[0][shuffle_F], down[0][:, shuffle_F]

    found = likeness(live(gate, up, down), a_router(2, 32))

    assert float(found.matched_P) == pytest.approx(1.0, abs=1e-6)
    assert float(found.aligned_P) < 0.2
    assert float(found.tau_P) == pytest.approx(kendalltau(range(48), shuffle_F.argsort().tolist()).statistic)
    # The average over neurons does not see their order.
    torch.testing.assert_close(found.average_3EE, torch.ones(3, 2, 2, dtype=torch.float64), rtol=0, atol=1e-5)
    assert found.matrix_3EE[:, 0, 1].abs().max() < 0.2


def test_unrelated_experts_have_a_tau_near_zero():
    found = likeness(live(*random_layer(experts=8, width=64)), a_router(8, 32))

    # Of a random permutation of n: deviation sqrt(2 (2 n + 5) / (9 n (n - 1))) = 0.0857 for 64; five of these for each pair.
    assert found.tau_P.abs().max() < 5 * 0.0857
    # Pairs that share an expert are not independent, so the mean of 28 is given the deviation of 4 disjoint ones, five times.
    assert abs(found.tau_P.mean()) < 5 * 0.0857 / 2
    assert found.matched_P.min() > found.aligned_P.max() + 0.1  # growth by chance alone


def test_taus_by_hand():
    assert kendall_tau(torch.tensor([0, 1, 2])) == 1.0
    assert kendall_tau(torch.tensor([2, 1, 0])) == -1.0
    assert kendall_tau(torch.tensor([0, 2, 1])) == pytest.approx(1 / 3)


def test_no_other_order_has_a_larger_sum_of_cosines():
    generator = torch.Generator().manual_seed(1)
    cosine_FF = cosines(torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator))

    order_F = best_order(cosine_FF)

    best = max(sum(float(cosine_FF[row, column]) for row, column in enumerate(order)) for order in permutations(range(6)))
    assert float(cosine_FF[torch.arange(6), order_F].sum()) == pytest.approx(best, rel=1e-6)


def test_gate_and_up_are_never_compared_with_each_other():
    gate, up, down = random_layer(experts=2)
    gate[1] = gate[0]
    alternating = torch.stack([gate, up], dim=2).flatten(1, 2)
    layer = live(gate, up, down)
    layer.experts.gate_up_proj, layer.experts.is_concatenated = alternating, False

    found = likeness(layer, a_router(2, 32))

    assert float(found.matrix_3EE[0, 0, 1]) == pytest.approx(1.0)
    assert abs(float(found.matrix_3EE[1, 0, 1])) < 0.2


def test_chunks_change_nothing(monkeypatch):
    layer, router = live(*random_layer()), a_router(4, 32)
    whole = likeness(layer, router)
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 5 * 4 * 32)

    parts = likeness(layer, router)

    # Sums of float32 products, split at other places.
    torch.testing.assert_close(parts.matrix_3EE, whole.matrix_3EE, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.average_3EE, whole.average_3EE, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("experts", "width", "count"), [(2, 64, 1), (8, 64, 28), (128, 768, 28), (128, 1536, 8), (8, 14336, 1)])
def test_the_pairs_that_are_matched_are_few_different_and_spread_out(experts, width, count):
    chosen = [tuple(pair) for pair in pairs(experts, width).tolist()]

    assert len(set(chosen)) == len(chosen) == count <= PAIRS
    assert all(0 <= one < other < experts for one, other in chosen)
    firsts = [one for one, _ in chosen]
    assert firsts == sorted(firsts)
    if count == PAIRS and experts == 128:
        assert firsts[-1] - firsts[0] > 64
        assert len(set(firsts)) > 20


def test_a_lone_expert_has_no_pairs():
    found = likeness(live(*random_layer(experts=1)), a_router(1, 32))

    assert found.pairs_P2.shape == (0, 2)
    assert found.tau_P.shape == found.aligned_P.shape == found.matched_P.shape == (0,)
