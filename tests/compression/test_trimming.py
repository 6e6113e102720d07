"""Choosing what goes, on hand-written studies."""

from __future__ import annotations

import pytest
import torch

from compression.methods import choose_cuts
from compression.recipe import BlockDrop, ExpertDrop
from compression.study import ExpertStatistics, Study
from compression.trimming import Cuts, block_drop
from compression.trimming.expert_drop import CRITERIA, keep_highest


def statistics(count, weight, norm, tokens=10):
    rows = [torch.tensor([row], dtype=torch.float64) for row in (count, weight, norm)]
    return ExpertStatistics(torch.tensor([float(tokens)]), *rows)


def a_study(cosines, experts=None):
    return Study(experts or {}, {b: torch.tensor([c * 4.0]) for b, c in enumerate(cosines)}, torch.tensor([4.0]))


def test_the_three_criteria_on_two_experts_by_hand():
    seen = statistics(count=[8, 2], weight=[4.0, 1.8], norm=[4.0, 5.4])

    scores = {name: criterion(seen).tolist() for name, criterion in CRITERIA.items()}

    assert scores["routing_score"] == pytest.approx([0.4, 0.18])
    assert scores["frequency"] == pytest.approx([0.8, 0.2])
    assert scores["reap"] == pytest.approx([0.5, 2.7])  # rarely used, but loud when it is


def test_an_expert_without_tokens_scores_zero_and_not_nan():
    seen = statistics(count=[0, 2], weight=[0.0, 1.0], norm=[0.0, 1.0])

    assert all(criterion(seen)[0] == 0.0 for criterion in CRITERIA.values())


def test_ties_keep_the_lowest_id():
    assert keep_highest(torch.tensor([1.0, 1.0, 1.0, 1.0]), (0, 1, 2, 3), 2) == (0, 1)


def test_keeping_all_experts_keeps_all_of_them_in_order():
    assert keep_highest(torch.tensor([1.0, 3.0, 2.0]), (0, 1, 2), 3) == (0, 1, 2)


def test_every_group_loses_equally_many_experts():
    score_E = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])

    assert keep_highest(score_E, tuple(range(8)), 4, groups=2) == (0, 1, 6, 7)


def test_a_second_drop_chooses_among_what_the_first_one_left():
    seen = {0: statistics([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0], [1.0] * 4)}
    steps = (ExpertDrop(criterion="routing_score", experts_kept=3), ExpertDrop(criterion="frequency", experts_kept=2))
    whole = Cuts((0,), {0: (0, 1, 2, 3)})

    cuts = choose_cuts(steps, a_study([0.5], seen), whole, candidates=frozenset(), groups=1)

    assert cuts.experts[0] == (1, 2)  # the first drop took 3; by frequency 0 goes next


def test_the_blocks_that_turn_their_input_least_go_first():
    study = a_study([0.2, 0.9, 0.5, 0.8])

    cuts = block_drop.choose(study, BlockDrop(blocks_dropped=2), Cuts((0, 1, 2, 3), {1: (0,), 2: (0,)}), {0, 1, 2, 3})

    assert cuts == Cuts((0, 2), {2: (0,)})


def test_blocks_outside_the_candidates_stay_however_idle_they_are():
    study = a_study([0.99, 0.9, 0.5])

    cuts = block_drop.choose(study, BlockDrop(blocks_dropped=1), Cuts((0, 1, 2), {}), {1, 2})

    assert cuts.blocks == (0, 2)
