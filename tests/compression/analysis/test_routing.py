"""Routing tables on hand-written counts and on routers that draw at random."""

from __future__ import annotations

import pytest
import torch

from compression.analysis.routing import balance, expected, lift, loudness, routing
from tests.compression.analysis.studies import counted, statistics


def drawn(weight_E, used, tokens, seed=0):
    """Draw experts without replacement, independently for each token."""
    return torch.multinomial(weight_E.expand(tokens, -1), used, generator=torch.Generator().manual_seed(seed))


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_table_by_hand():
    layer = statistics(
        2, domains=2, tokens_M=rows(10, 30), count_ME=rows([10, 10], [30, 0]), weight_ME=rows([8, 2], [30, 0]),
        norm_ME=rows([20, 5], [30, 0]), probability_ME=rows([8, 2], [27, 3]),
    )  # fmt: skip

    table = routing(layer, ("code", "prose"))

    assert table["mixed"]["usage"] == [1.0, 0.25]
    assert table["mixed"]["mean_weight"] == [0.95, 0.2]
    assert table["domains"]["code"]["mean_norm"] == [2.0, 0.5]
    assert table["domains"]["prose"]["mean_probability"] == [0.9, 0.1]
    assert table["domains"]["prose"]["balance"]["unused"] == [1]
    assert table["domains"]["prose"]["mean_weight"] == [1.0, 0.0]  # never NaN


def test_a_domain_without_tokens_has_no_table():
    layer = statistics(2, domains=2, tokens_M=rows(10, 0), count_ME=rows([10, 10], [0, 0]))

    assert routing(layer, ("code", "prose"))["domains"]["prose"] is None


def test_even_usage_is_balanced_and_a_lone_expert_is_not():
    even, lone = balance(rows(5, 5, 5, 5)), balance(rows(20, 0, 0, 0))

    assert even == {"entropy": pytest.approx(1.0), "variation": 0.0, "largest": 1.0, "smallest": 1.0, "unused": []}
    assert lone == {"entropy": 0.0, "variation": pytest.approx(3**0.5), "largest": 4.0, "smallest": 0.0, "unused": [1, 2, 3]}


@pytest.mark.parametrize("used", [2, 4])
def test_a_router_that_draws_blindly_has_a_lift_of_one(used):
    layer = counted(drawn(torch.ones(8), used, 20_000), 8)

    lift_EE = lift(layer)

    # A pair meets 20000 K (K - 1) / 56 times: 714 for K = 2, whose Poisson deviation is 3.7 %; five of these.
    assert (lift_EE - 1).abs().max() < 5 * 0.037


def test_popular_experts_meet_more_often_without_working_together():
    layer = counted(drawn(torch.tensor([8.0, 4.0, 2.0, 2.0, 1.0, 1.0]), 2, 40_000), 6)

    seen_EE, lift_EE = layer.total("together"), lift(layer)

    assert seen_EE[0, 1] > 10 * seen_EE[4, 5]
    # Drawn one after the other and not as pairs, so independence holds only nearly; 4 and 5 meet about 270 times (6 %).
    assert (lift_EE - 1).abs().max() < 0.35


def test_experts_that_only_come_together_are_lifted():
    ids_TK = torch.tensor([[0, 1], [2, 3]] * 50)

    lift_EE = lift(counted(ids_TK, 4))

    # Each has one partner in three who could be: 3 times as often as expected, and never with the others.
    assert lift_EE[0, 1] == pytest.approx(3.0)
    assert lift_EE[0, 2] == 0.0


def test_expected_meetings_keep_every_experts_number_of_partners():
    together_EE = counted(drawn(torch.tensor([5.0, 3.0, 2.0, 2.0, 1.0]), 3, 500), 5).total("together").fill_diagonal_(0.0)

    expected_EE = expected(together_EE)

    torch.testing.assert_close(expected_EE.sum(1), together_EE.sum(1), rtol=1e-6, atol=0)
    assert expected_EE.diagonal().tolist() == [0.0] * 5


def test_one_expert_per_token_has_no_partners():
    layer = counted(torch.tensor([[0], [1]]), 2)

    assert lift(layer) is None
    assert loudness(rows([5.0])) is None


def test_the_correlation_of_ranks_is_that_of_the_pairs_written_out():
    rank_KK = rows([5, 2, 1], [2, 3, 3], [1, 3, 4])
    pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(int(rank_KK[i, j]))]

    table = loudness(rank_KK)

    assert table["correlation"] == pytest.approx(float(torch.corrcoef(rows(*pairs).T)[0, 1]))
    assert table["same_place"] == 12 / 24
    assert table["loudest_first"] == 5 / 8


def test_a_router_that_always_prefers_the_loud_correlates_fully():
    assert loudness(torch.eye(4, dtype=torch.float64))["correlation"] == pytest.approx(1.0)
    assert loudness(torch.eye(4, dtype=torch.float64).flip(0))["correlation"] == pytest.approx(-1.0)
    assert loudness(torch.ones(4, 4, dtype=torch.float64))["correlation"] == pytest.approx(0.0)
