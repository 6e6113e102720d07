"""Similarity of outputs, and what router rows say of experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compression.analysis import similarity as module
from compression.analysis.likeness import likeness
from compression.analysis.similarity import (
    matching,
    mean_of_pairs,
    mean_output_similarity,
    output_similarity,
    pairs_of,
    redundancy,
    router_follows,
)
from tests.compression.analysis.studies import a_router, a_study, counted, live, random_layer, sample_of, statistics


def test_output_similarity_equals_a_loop_over_tokens(monkeypatch):
    output_SED = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 18)  # chunks of two tokens, and one

    cosine_EE = output_similarity(sample_of(output_SED))

    for one in range(3):
        for other in range(3):
            slow = [torch.cosine_similarity(token_ED[one], token_ED[other], dim=0).item() for token_ED in output_SED]
            assert cosine_EE[one, other].item() == pytest.approx(sum(slow) / 7)


def test_an_output_of_zero_is_like_nothing():
    output_SED = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [2.0, 0.0]]])

    assert output_similarity(sample_of(output_SED))[0, 1].item() == 0.5


def test_mean_outputs_are_compared_whatever_their_number():
    layer = statistics(3, width=2, output_MED=torch.tensor([[[1.0, 0.0], [5.0, 5.0], [0.0, 0.0]]], dtype=torch.float64))

    cosine_EE = mean_output_similarity(layer)

    assert cosine_EE[0, 1].item() == pytest.approx(0.5**0.5)
    assert cosine_EE[0, 2].item() == 0.0


def test_a_line_through_pairs_explains_what_numpy_says():
    found = likeness(live(*random_layer(experts=6)), a_router(6, 32))

    table = router_follows(found)

    router = pairs_of(found.router_EE).numpy()
    for place, name in enumerate(("gate", "up", "down")):
        r = np.corrcoef(pairs_of(found.average_3EE[place]).numpy(), router)[0, 1]
        assert table[name]["r_squared"] == pytest.approx(r**2)
        assert table[name]["slope_sign"] == (1 if r >= 0 else -1)


def test_a_router_made_of_the_experts_average_neurons_follows_them():
    gate, up, down = random_layer(experts=6)
    router = a_router(6, 32)
    router.weight.data = gate.mean(1)

    table = router_follows(likeness(live(gate, up, down), router))

    # The averages are sums of 48 float32 numbers, taken here and there in another order.
    assert table["gate"]["r_squared"] == pytest.approx(1.0, abs=1e-6)
    assert table["up"]["r_squared"] < 0.6  # 15 pairs: r^2 of unrelated ones is 0.07 on average, above 0.6 once in a thousand


def test_two_experts_make_no_line():
    assert router_follows(likeness(live(*random_layer(experts=2)), a_router(2, 32)))["gate"] is None


def test_the_matching_is_summed_up_over_pairs():
    found = likeness(live(*random_layer(experts=3)), a_router(3, 32))

    table = matching(found)

    assert table["pairs"] == 3
    assert table["tau"] == pytest.approx(sum(found.tau_P.tolist()) / 3)
    assert table["lowest_tau"] == min(found.tau_P.tolist())
    assert matching(likeness(live(*random_layer(experts=1)), a_router(1, 32))) is None


def test_the_mean_of_pairs_leaves_the_diagonal_out():
    assert mean_of_pairs(torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 6.0], [2.0, 6.0, 9.0]])) == 3.0
    assert mean_of_pairs(torch.ones(1, 1)) is None


def test_what_was_not_seen_is_none():
    layer = counted(torch.tensor([[0, 1]] * 4), 2)
    study = a_study(layer, replace(layer, sample=sample_of(torch.ones(2, 2, 3))))

    assert redundancy(study, 0) == {
        "block_cosine": 0.5, "layer_cosine": 0.5, "output_similarity": None, "matrix_similarity": None,
    }  # fmt: skip
    assert redundancy(study, 1)["output_similarity"] == pytest.approx(1.0)
