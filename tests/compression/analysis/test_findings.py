"""Findings: what is said follows from the numbers, and what was not gathered is said to be missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compression.analysis.findings import coactivated, findings
from compression.analysis.likeness import likeness
from tests.compression.analysis.studies import a_router, a_study, counted, live, random_layer, sample_of, statistics


def draws(weights, used=2, tokens=4000, seed=0):
    weight_E = torch.tensor(weights)
    return torch.multinomial(weight_E.expand(tokens, -1), used, generator=torch.Generator().manual_seed(seed))


def by_code(study):
    return {finding.code: finding for finding in findings(study)}


def upcycled_likeness(noise=0.5):
    """Experts that are one dense layer and noise of half its size: cosines of whole matrices are 1 / (1 + 0.5^2) = 0.8."""
    noisy = [stack[:1] + noise * stack for stack in random_layer(experts=9)]
    return likeness(live(*(stack[1:] for stack in noisy)), a_router(8, 32))


def scratch_likeness():
    return likeness(live(*random_layer(experts=8)), a_router(8, 32))


def with_cosines(*cosines, **given):
    ids_TK = draws([1.0] * 8)
    tokens = len(ids_TK)
    return [counted(ids_TK, 8, layer_cosine_M=torch.tensor([cosine * tokens]), **given) for cosine in cosines]


def test_experts_made_of_one_dense_layer_are_called_upcycled():
    study = a_study(counted(draws([1.0] * 8), 8, likeness=upcycled_likeness()))

    found = by_code(study)

    assert found["upcycled"].numbers["matrix_cosine"] == pytest.approx(0.8, abs=0.05)
    assert found["upcycled"].numbers["tau"] > 0.9
    assert found["upcycled"].blocks == (0,)
    assert "from_scratch" not in found


def test_random_experts_are_called_trained_from_scratch_and_better_dropped_than_merged():
    study = a_study(counted(draws([1.0] * 8), 8, likeness=scratch_likeness()))

    found = by_code(study)

    assert "from_scratch" in found
    assert "upcycled" not in found
    assert found["drop_not_merge"].blocks == (0,)
    assert "merge" not in found


def test_aligned_neurons_with_unlike_matrices_leave_the_origin_open():
    odd = replace(upcycled_likeness(), matrix_3EE=torch.eye(8, dtype=torch.float64).expand(3, -1, -1))

    assert "origin_unclear" in by_code(a_study(counted(draws([1.0] * 8), 8, likeness=odd)))


def test_merging_is_worth_a_try_only_where_experts_also_answer_alike():
    generator = torch.Generator().manual_seed(0)
    own_SED = torch.randn(50, 8, 16, generator=generator)
    common_SED = torch.randn(50, 1, 16, generator=generator)
    aligned = upcycled_likeness()
    alike = counted(draws([1.0] * 8), 8, likeness=aligned, sample=sample_of(2 * common_SED + own_SED))
    unlike = replace(alike, sample=sample_of(own_SED))

    found = by_code(a_study(alike, unlike))

    assert found["merge"].blocks == (0,)
    assert found["merge"].numbers["output_cosine"][0] == pytest.approx(0.8, abs=0.05)
    assert found["drop_not_merge"].blocks == (1,)


def test_the_quarter_that_turns_its_input_least_is_a_candidate_and_the_quarter_that_turns_it_most_is_spared():
    study = a_study(*with_cosines(0.5, 0.97, 0.91, 0.93, 0.2, 0.6, 0.95, 0.3))

    found = by_code(study)

    assert found["idle_layers"].blocks == (1, 6)
    assert found["idle_layers"].numbers["cosine"] == {1: pytest.approx(0.97), 6: pytest.approx(0.95)}
    assert found["busy_layers"].blocks == (4, 7)
    assert "layer_drop" in found["idle_layers"].message
    assert "block_drop" in found["idle_blocks"].message


def test_a_model_without_idle_layers_is_told_so():
    found = by_code(a_study(*with_cosines(0.5, 0.7)))

    assert "idle_layers" not in found
    assert found["no_idle_layers"].numbers == {"cosine": {1: pytest.approx(0.7)}}


def test_the_most_diverse_layers_are_those_whose_experts_answer_least_alike():
    generator = torch.Generator().manual_seed(0)
    own_SED, common_SED = torch.randn(20, 8, 16, generator=generator), torch.randn(20, 1, 16, generator=generator)
    layers = [
        replace(layer, sample=sample_of(share * common_SED + own_SED)) for share, layer in enumerate(with_cosines(0.5, 0.5))
    ]

    assert by_code(a_study(*layers))["diverse_layers"].blocks == (0,)


def test_unused_rare_and_overused_experts_are_named():
    count_ME = torch.tensor([[0.0, 1.0, 60.0, 10.0, 10.0, 10.0, 10.0, 10.0]])
    layer = statistics(8, tokens_M=torch.tensor([60.0]), count_ME=count_ME)

    found = by_code(a_study(layer))

    assert found["unused_experts"].numbers == {"experts": {0: [0]}}
    assert found["rarely_used_experts"].numbers == {"experts": {0: [1]}}
    assert found["overused_experts"].numbers == {"experts": {0: [2]}}  # 60 of 111: 4.3 times an even load


@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        ([[70.0, 30.0], [30.0, 70.0]], "router_prefers_loud"),
        ([[30.0, 70.0], [70.0, 30.0]], "router_prefers_quiet"),
        ([[51.0, 49.0], [49.0, 51.0]], "router_ignores_loudness"),
    ],
)
def test_what_the_router_prefers_follows_from_the_ranks(ranks, code):
    layer = counted(draws([1.0] * 8, tokens=100), 8, rank_MKK=torch.tensor([ranks], dtype=torch.float64))

    found = by_code(a_study(layer))

    assert {name for name in found if name.startswith("router_")} == {code}
    assert found[code].numbers["correlation"] == pytest.approx((ranks[0][0] - ranks[0][1]) / 100)


def test_experts_that_come_in_pairs_are_a_group_and_blind_routing_has_none():
    blind = counted(draws([1.0] * 8), 8)
    # Eight tokens in nine choose at random; the others always 0 with 5, 5 with 6, or 2 with 3.
    fixed_TK = torch.tensor([[0, 5], [5, 6], [2, 3]]).repeat(300, 1)
    paired = counted(torch.cat([draws([1.0] * 16, tokens=7200), fixed_TK]), 16)

    assert coactivated(blind.total("together")) == []
    assert coactivated(paired.total("together")) == [[0, 5, 6], [2, 3]]
    found = by_code(a_study(blind, paired))
    assert found["coactivated_experts"].blocks == (1,)


def test_a_handful_of_meetings_proves_nothing():
    ids_TK = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])

    assert coactivated(counted(ids_TK.repeat(9, 1), 8).total("together")) == []  # 9 where 1.3 are expected: 6.7 deviations
    assert coactivated(counted(ids_TK.repeat(10, 1), 8).total("together")) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_what_was_not_gathered_is_said_and_nothing_is_guessed():
    found = findings(a_study(statistics(8)))

    assert [finding.numbers["part"] for finding in found] == ["tokens", "sample", "likeness"]
    assert {finding.code for finding in found} == {"not_looked_at"}
    assert "likeness was not gathered" in found[2].message


def test_weights_alone_still_tell_the_origin():
    found = by_code(a_study(statistics(8, likeness=upcycled_likeness())))

    assert "upcycled" in found
    assert not {"merge", "idle_layers", "busy_layers"} & set(found)


def test_a_model_whose_tokens_have_one_expert_is_not_asked_about_pairs_or_ranks():
    found = by_code(a_study(counted(torch.tensor([[0], [1]] * 200), 2)))

    assert not [code for code in found if code.startswith("router_") or code == "coactivated_experts"]


def test_two_domains_with_habits_of_their_own_are_read_together():
    layer = statistics(
        4, domains=2, tokens_M=torch.tensor([10.0, 30.0]), count_ME=torch.tensor([[20.0, 0, 0, 0], [0, 30.0, 30.0, 0]])
    )

    assert by_code(a_study(layer, domains=("code", "prose")))["unused_experts"].numbers == {"experts": {0: [3]}}
