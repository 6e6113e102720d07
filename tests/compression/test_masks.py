"""Masks: which weights stay, by hand, with ties, and counted.

Shapes: E experts, O outputs, I inputs.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.slimming.masks import NOfM, Unstructured, keep_largest, largest

anything = settings(deadline=None, derandomize=True, max_examples=100)


def kept(scores: list[float], pattern: NOfM | Unstructured) -> list[int]:
    return keep_largest(torch.tensor(scores), pattern).int().tolist()


def test_the_largest_of_each_group_stay_wherever_they_stand_among_all():
    assert kept([1, 2, 3, 4, 90, 80, 70, 60], NOfM(2, 4)) == [0, 0, 1, 1, 1, 1, 0, 0]


def test_without_a_pattern_all_are_compared():
    assert kept([1, 2, 3, 4, 90, 80, 70, 60], Unstructured(0.5)) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_of_equal_scores_the_lowest_indices_stay():
    assert kept([5, 5, 5, 5, 7, 5, 5, 7], NOfM(2, 4)) == [1, 1, 0, 0, 1, 0, 0, 1]
    assert kept([5, 5, 5, 5, 7, 5, 5, 7], Unstructured(0.5)) == [1, 1, 0, 0, 1, 0, 0, 1]
    assert kept([0] * 6, NOfM(1, 3)) == [1, 0, 0, 1, 0, 0]


def test_ties_keep_the_lowest_index_in_rows_too_long_for_an_unstable_sort_to_keep_it_by_chance():
    mask_C = largest(torch.ones(100_000), 30_000)

    assert mask_C[:30_000].all()
    assert not mask_C[30_000:].any()


@anything
@given(m=st.integers(2, 64), n=st.integers(1, 63), groups=st.integers(1, 4), levels=st.integers(1, 50), seed=st.integers(0, 9999))
def test_a_pattern_keeps_exactly_n_of_every_m(m: int, n: int, groups: int, levels: int, seed: int):
    n = min(n, m - 1)
    score_EOI = torch.randint(levels, (2, 3, groups * m), generator=torch.Generator().manual_seed(seed)).float()

    mask_EOI = keep_largest(score_EOI, NOfM(n, m))

    assert mask_EOI.shape == score_EOI.shape
    assert (mask_EOI.unflatten(2, (-1, m)).sum(3) == n).all()
    lowest_kept_EOG = score_EOI.where(mask_EOI, torch.inf).unflatten(2, (-1, m)).amin(3)
    highest_gone_EOG = score_EOI.where(~mask_EOI, -torch.inf).unflatten(2, (-1, m)).amax(3)
    assert (lowest_kept_EOG >= highest_gone_EOG).all()


@anything
@given(sparsity=st.floats(0, 0.999), compared=st.integers(1, 300), seed=st.integers(0, 9999))
def test_without_a_pattern_the_rounded_share_of_each_row_goes(sparsity: float, compared: int, seed: int):
    score_OC = torch.rand(3, compared, generator=torch.Generator().manual_seed(seed))

    mask_OC = keep_largest(score_OC, Unstructured(sparsity))

    assert (~mask_OC).sum(1).tolist() == [round(sparsity * compared)] * 3


def test_a_sparsity_of_zero_keeps_everything_even_what_is_zero():
    assert keep_largest(torch.zeros(4, 7), Unstructured(0.0)).all()


def test_rows_are_compared_with_themselves_only():
    mask_OI = keep_largest(torch.tensor([[1.0, 2.0], [30.0, 20.0]]), Unstructured(0.5))

    assert mask_OI.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_a_pattern_that_keeps_nothing_or_everything_is_our_own_mistake(n: int, m: int):
    with pytest.raises(AssertionError, match="no pattern"):
        NOfM(n, m)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_a_sparsity_that_keeps_nothing_is_our_own_mistake(sparsity: float):
    with pytest.raises(AssertionError, match="keeps nothing"):
        Unstructured(sparsity)


def test_groups_that_do_not_divide_the_inputs_are_our_own_mistake():
    with pytest.raises(AssertionError, match="groups of 4 do not divide 6"):
        keep_largest(torch.zeros(6), NOfM(2, 4))
