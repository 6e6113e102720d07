"""Choosing what goes, on hand-written studies."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from compression.methods import Choice, choose_cuts
from compression.recipe import BlockDrop, ExpertDrop, ExpertSkip, LayerDrop
from compression.study import RATIO_BINS, ExpertStatistics, Study
from compression.trimming import Cuts, Routing, block_drop, subsets
from compression.trimming.expert_drop import CRITERIA, keep_highest


def statistics(count, *, tokens=10, cosine=0.0, **sums):
    experts = len(count)
    sizes = {"M": 1, "E": experts, "K": 2, "D": 2, "B": 4}
    letters = {f.name: f.name.rsplit("_", 1)[1] for f in fields(ExpertStatistics) if "_M" in f.name}
    zeros = {name: torch.zeros([sizes[letter] for letter in of], dtype=torch.float64) for name, of in letters.items()}
    given = {name: torch.tensor([row], dtype=torch.float64) for name, row in {"count_ME": count, **sums}.items()}
    total = torch.tensor([float(tokens)], dtype=torch.float64)
    weights = torch.ones(experts, dtype=torch.float64)
    own = {"tokens_M": total, "layer_cosine_M": total * cosine, "absolute_E": weights, "magnitude_E": weights, "parameters": 4}
    return ExpertStatistics(**{**zeros, **given, **own})


def a_study(cosines, experts=None):
    tokens = torch.tensor([4.0], dtype=torch.float64)
    return Study(cosine_M={b: c * tokens for b, c in enumerate(cosines)}, tokens_M=tokens, experts=experts or {})


def choice(candidates=(), *, experts=4, top_k=1, groups=1, least=0, prefix=False):
    return Choice(frozenset(candidates), Routing(experts, top_k, groups, least), prefix)


def drop(**settings):
    return ExpertDrop.model_validate(settings)


def test_the_criteria_on_two_experts_by_hand():
    seen = statistics(
        [8, 2],
        probability_ME=[6.0, 4.0],
        weighted_norm_ME=[4.0, 5.4],
        norm_ME=[16.0, 6.0],
        square_ME=[40.0, 18.0],
    )

    scores = {name: criterion(seen).tolist() for name, criterion in CRITERIA.items()}

    assert scores == {
        "routing_score": pytest.approx([0.6, 0.4]),
        "frequency": pytest.approx([0.8, 0.2]),
        "expert_norm": pytest.approx([16.0, 6.0]),
        "reap": pytest.approx([0.5, 2.7]),  # rarely used, but loud when it is
        "man": pytest.approx([2.0, 3.0]),
        "msan": pytest.approx([5.0, 9.0]),
        "aimer": pytest.approx([-0.5, -0.5]),
    }


def test_peaky_weights_outlive_even_ones_by_aimer():
    seen = replace(statistics([0, 0]), absolute_E=torch.tensor([4.0, 2.0]), magnitude_E=torch.tensor([4.0, 4.0]))

    even, peaky = CRITERIA["aimer"](seen).tolist()  # four weights of 1, and one of 2 among zeros

    assert (even, peaky) == (-1.0, -0.5)


def test_an_expert_without_tokens_scores_zero_and_not_nan():
    seen = statistics([0, 2], weighted_norm_ME=[0.0, 1.0], norm_ME=[0.0, 1.0], square_ME=[0.0, 1.0])

    assert all(CRITERIA[name](seen)[0] == 0.0 for name in CRITERIA if name != "aimer")


def test_ties_keep_the_lowest_id():
    assert keep_highest(torch.tensor([1.0, 1.0, 1.0, 1.0]), (0, 1, 2, 3), 2) == (0, 1)


def test_keeping_all_experts_keeps_all_of_them_in_order():
    assert keep_highest(torch.tensor([1.0, 3.0, 2.0]), (0, 1, 2), 3) == (0, 1, 2)


def test_every_group_loses_equally_many_experts():
    score_E = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])

    assert keep_highest(score_E, tuple(range(8)), 4, groups=2) == (0, 1, 6, 7)


def test_a_second_drop_chooses_among_what_the_first_one_left():
    seen = {0: statistics([1, 2, 3, 4], probability_ME=[4.0, 3.0, 2.0, 1.0])}
    steps = (drop(criterion="routing_score", experts_kept=3), drop(criterion="frequency", experts_kept=2))
    whole = Cuts((0,), {0: (0, 1, 2, 3)})

    cuts = choose_cuts(steps, a_study([0.5], seen), whole, choice())

    assert cuts.experts[0] == (1, 2)  # the first drop took 3; by frequency 0 goes next


def test_lots_are_drawn_by_seed_and_differ_between_blocks_and_seeds():
    whole = Cuts(tuple(range(8)), {block: tuple(range(64)) for block in range(8)})

    def drawn(seed):
        step = drop(criterion="random", experts_kept=32, seed=seed)
        return choose_cuts((step,), None, whole, choice(experts=64)).experts

    assert drawn(3) == drawn(3)
    assert len({kept for seed in (3, 4) for kept in drawn(seed).values()}) == 16
    assert {len(kept) for kept in drawn(3).values()} == {32}
    times_kept = [sum(expert in kept for seed in range(8) for kept in drawn(seed).values()) for expert in range(64)]
    assert all(32 - 4 * 4 <= times <= 32 + 4 * 4 for times in times_kept)  # 64 draws of a half: deviation 4


def test_one_budget_takes_from_where_it_costs_least():
    seen = {0: statistics([1, 1, 1, 1], norm_ME=[1.0, 1.0, 1.0, 1.0]), 1: statistics([1, 1, 1, 1], norm_ME=[9.0, 9.0, 0.1, 0.2])}
    whole = Cuts((0, 1), {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)})

    cuts = choose_cuts((drop(criterion="expert_norm", scope="global", experts_kept=3),), a_study([0, 0], seen), whole, choice())

    assert cuts.experts == {0: (0, 1, 2, 3), 1: (0, 1)}  # layers count by their own mean: 0.1 and 0.2 against 1 and 9


def test_a_budget_can_leave_a_layer_without_any_expert():
    seen = {b: statistics([1, 1], weighted_norm_ME=row) for b, row in enumerate([[2.0, 2.0], [0.0, 0.0]])}
    whole = Cuts((0, 1), {0: (0, 1), 1: (0, 1)})

    cuts = choose_cuts((drop(scope="global", experts_kept=1),), a_study([0, 0], seen), whole, choice(experts=2))

    assert cuts.experts == {0: (0, 1), 1: ()}


def test_a_budget_respects_what_every_group_must_keep():
    seen = {b: statistics([1] * 8, weighted_norm_ME=row) for b, row in enumerate([[5.0] * 8, [0.0, 0.01, 0.02, 5.0] * 2])}
    whole = Cuts((0, 1), {b: tuple(range(8)) for b in range(2)})
    routing = choice(experts=8, groups=2, least=2)

    cuts = choose_cuts((drop(scope="global", experts_kept=5),), a_study([0, 0], seen), whole, routing)

    assert cuts.experts[1] == (2, 3, 6, 7)  # two of each group are left, however little they give
    assert [len([e for e in cuts.experts[0] if e // 4 == group]) for group in range(2)] == [3, 3]


def test_a_budget_counts_what_earlier_steps_left():
    seen = {b: statistics([1] * 4, weighted_norm_ME=[4.0, 3.0, 2.0, 1.0], cosine=c) for b, c in enumerate([0.1, 0.9, 0.2, 0.3])}
    whole = Cuts((0, 1, 2, 3), {b: (0, 1, 2, 3) for b in range(4)})
    steps = (LayerDrop(layers_dropped=1), BlockDrop(blocks_dropped=1), drop(scope="global", fraction_dropped=0.25))

    cuts = choose_cuts(steps, a_study([0.8, 0.9, 0.1, 0.1], seen), whole, choice(range(4)))

    assert (cuts.blocks, cuts.layers_dropped) == ((1, 2, 3), {1})  # block 0 goes, since 1 has lost its layer
    assert sum(map(len, cuts.experts.values())) == 6  # of eight in two layers, a quarter goes
    assert cuts.experts == {2: (0, 1, 2), 3: (0, 1, 2)}


def test_two_layer_drops_take_the_two_highest_cosines():
    seen = {b: statistics([1], cosine=c) for b, c in enumerate([0.1, 0.9, 0.8, 0.3])}
    whole = Cuts((0, 1, 2, 3), {b: (0,) for b in range(4)})

    once = choose_cuts((LayerDrop(layers_dropped=2),), a_study([0] * 4, seen), whole, choice(range(4)))
    twice = choose_cuts((LayerDrop(layers_dropped=1),) * 2, a_study([0] * 4, seen), whole, choice(range(4)))

    assert once == twice
    assert once.layers_dropped == {1, 2}


def test_a_class_that_counts_dense_blocks_from_the_start_loses_its_first_layers():
    seen = {b: statistics([1], cosine=c) for b, c in enumerate([0.1, 0.9, 0.8])}
    whole = Cuts((0, 1, 2), {b: (0,) for b in range(3)})

    cuts = choose_cuts((LayerDrop(layers_dropped=2),), a_study([0] * 3, seen), whole, choice(range(3), prefix=True))

    assert cuts.layers_dropped == {0, 1}


def spanning(rows):
    study = a_study([0.0] * len(rows))
    study.span_MLL, study.sampled_M = torch.tensor([rows], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return study


def test_consecutive_blocks_are_one_span_of_exactly_that_many():
    study = spanning([[0.9, 0.2, 0.1], [0.0, 0.9, 0.7], [0.0, 0.0, 0.1]])
    whole = Cuts((0, 1, 2), {b: (0,) for b in range(3)})

    cuts = block_drop.choose(study, BlockDrop(blocks_dropped=2, selection="consecutive"), whole, {0, 1, 2})

    assert cuts.blocks == (0,)  # from block 1's input to block 2's output: 0.7, against 0.2 from 0 to 1


def test_a_span_may_close_over_what_an_earlier_step_dropped():
    study = spanning([[0.1, 0.9, 0.2, 0.1], [0, 0.1, 0.1, 0.8], [0, 0, 0.9, 0.3], [0, 0, 0, 0.1]])
    cuts = Cuts((0, 1, 3), {b: (0,) for b in (0, 1, 3)})

    after = block_drop.choose(study, BlockDrop(blocks_dropped=2, selection="consecutive"), cuts, {0, 1, 2, 3})

    assert after.blocks == (3,)  # 0 to 1 at 0.9; 1 to 3, with the lost block 2 between them, at 0.8


def test_no_span_goes_through_a_block_that_must_stay():
    study = spanning([[0.1, 0.9, 0.2], [0, 0.1, 0.99], [0, 0, 0.9]])
    whole = Cuts((0, 1, 2), {0: (0,), 1: (0,)})

    assert block_drop.choose(study, BlockDrop(blocks_dropped=2, selection="consecutive"), whole, {0, 1}).blocks == (2,)


def test_skipping_takes_beta_from_the_study_or_as_it_is_written():
    seen = {b: statistics([1, 1], ratio_MB=row) for b, row in enumerate([[0, 0, 5, 4], [9, 0, 0, 0]])}
    whole = Cuts((0, 1, 2), {0: (0, 1), 1: (0, 1), 2: ()})

    median = choose_cuts((ExpertSkip(),), a_study([0] * 3, seen), whole, choice())
    fixed = choose_cuts((ExpertSkip(beta=0.25),), None, whole, choice())

    assert median.skip == {0: 2.5 / RATIO_BINS, 1: 0.5 / RATIO_BINS}  # the middle of the third bin, and of the first
    assert fixed.skip == {0: 0.25, 1: 0.25}


def test_what_a_dropped_block_had_goes_with_it():
    cuts = Cuts((0, 1), {0: (0, 1), 1: (0, 1)}, frozenset(), {0: {0: (0, 2)}, 1: {1: (1, 3)}}, {0: 0.5, 1: 0.5})

    assert cuts.without(frozenset({0})) == Cuts((1,), {1: (0, 1)}, frozenset(), {1: {1: (1, 3)}}, {1: 0.5})
    assert cuts.without(layers=frozenset({0})) == Cuts((0, 1), {1: (0, 1)}, frozenset({0}), {1: {1: (1, 3)}}, {1: 0.5})
    assert cuts.keeping({0: (1,), 1: (1,)}).merged == {0: {}, 1: {1: (1, 3)}}


@pytest.mark.parametrize("groups", [1, 2])
def test_no_swap_betters_what_the_greedy_search_ends_with(groups, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        cost_EE = torch.rand(8, 8, generator=generator, dtype=torch.float64)
        cost_EE = cost_EE + cost_EE.mT

        def loss(kept, cost_EE=cost_EE):
            gone = [e for e in range(8) if e not in kept]
            return float(cost_EE[gone][:, gone].sum())

        routing = Routing(8, 2, groups)
        monkeypatch.setattr(subsets, "EXHAUSTIVE", 0)
        greedy = set(subsets.best(loss, range(8), 4, routing))

        swaps = [
            (out, back) for out in greedy for back in set(range(8)) - greedy if out // (8 // groups) == back // (8 // groups)
        ]
        assert all(loss(greedy - {out} | {back}) >= loss(greedy) for out, back in swaps)
        assert {sum(e // (8 // groups) == g for e in greedy) for g in range(groups)} == {4 // groups}


def test_equal_sets_keep_the_one_whose_dropped_ids_come_first():
    assert subsets.best(lambda kept: 0.0, range(4), 2, Routing(4, 1)) == (2, 3)


def test_the_blocks_that_turn_their_input_least_go_first():
    study = a_study([0.2, 0.9, 0.5, 0.8])

    cuts = block_drop.choose(study, BlockDrop(blocks_dropped=2), Cuts((0, 1, 2, 3), {b: (0,) for b in range(4)}), {0, 1, 2, 3})

    assert cuts == Cuts((0, 2), {0: (0,), 2: (0,)})


def test_blocks_outside_the_candidates_stay_however_idle_they_are():
    study = a_study([0.99, 0.9, 0.5])

    cuts = block_drop.choose(study, BlockDrop(blocks_dropped=1), Cuts((0, 1, 2), {1: (0,), 2: (0,)}), {1, 2})

    assert cuts.blocks == (0, 2)


def test_a_budget_by_negative_scores_still_takes_the_lowest_first():
    whole = Cuts((0, 1), {b: (0, 1, 2, 3) for b in range(2)})
    ones, quarters = torch.tensor([4.0] * 4).double(), torch.tensor([1.0, 1.0, 1.0, 0.25]).double()
    seen = {
        0: replace(statistics([0] * 4), absolute_E=ones * quarters, magnitude_E=ones),
        1: replace(statistics([0] * 4), absolute_E=ones * 0.9, magnitude_E=ones),
    }

    cuts = choose_cuts((drop(criterion="aimer", scope="global", fraction_dropped=0.375),), a_study([0, 0], seen), whole, choice())

    assert cuts.experts == {0: (3,), 1: (0, 1, 2, 3)}  # the even ones of layer 0 go before any of layer 1, beside their means
