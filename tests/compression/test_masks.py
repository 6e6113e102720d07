"""Masks: the highest scores stay, exactly as many as the pattern says, and equals stay from the left.

Shapes: O output features, I input features, G groups, N inputs of a group.
"""

import pytest
import torch

from compression.slimming.masks import NOfM, Unstructured, keep_largest, largest


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_of_four_by_hand():
    score_I = torch.tensor([1.0, 4.0, 3.0, 2.0, 5.0, 8.0, 7.0, 6.0])

    kept_I = keep_largest(score_I, NOfM(2, 4))

    assert kept_I.dtype == torch.bool
    assert kept_I.tolist() == [False, True, True, False, False, True, True, False]


def test_unstructured_keeps_the_highest_of_a_row_wherever_they_lie():
    score_OI = torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 8.0, 7.0, 10.0]])

    kept_OI = keep_largest(score_OI, Unstructured(0.75))

    assert kept_OI.tolist() == [[False, True, False, False], [False, False, False, True]]


def test_of_equal_scores_the_lowest_index_stays():
    score_I = torch.zeros(1000)  # long enough that an unstable sort would shuffle

    kept_I = keep_largest(score_I, Unstructured(0.7))
    kept_of_four_I = keep_largest(score_I, NOfM(1, 4))

    assert kept_I.nonzero().flatten().tolist() == list(range(300))
    assert kept_of_four_I.nonzero().flatten().tolist() == list(range(0, 1000, 4))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 3), (3, 5), (7, 16), (4, 120)])
def test_exactly_n_of_every_m_consecutive_inputs_stay_and_none_that_goes_is_higher(n: int, m: int):
    score_OGN = scores(6, 240).unflatten(-1, (-1, m))

    kept_OGN = keep_largest(score_OGN.flatten(-2), NOfM(n, m)).unflatten(-1, (-1, m))

    assert (kept_OGN.sum(-1) == n).all()
    lowest_kept_OG = score_OGN.where(kept_OGN, torch.inf).amin(-1)
    highest_gone_OG = score_OGN.where(~kept_OGN, -torch.inf).amax(-1)
    assert (lowest_kept_OG > highest_gone_OG).all()


@pytest.mark.parametrize(("sparsity", "stay"), [(0.5, 5), (0.54, 5), (0.56, 4), (0.01, 10), (0.99, 0), (0.9, 1)])
def test_unstructured_drops_the_rounded_share_of_every_row(sparsity: float, stay: int):
    kept_OI = keep_largest(scores(7, 10), Unstructured(sparsity))

    assert kept_OI.sum(-1).tolist() == [stay] * 7


def test_with_sparsity_zero_everything_stays():
    assert keep_largest(torch.zeros(3, 5), Unstructured(0.0)).all()


def test_rows_and_leading_dimensions_are_masked_as_each_is_alone():
    score_EOI = scores(3, 4, 24)

    for pattern in (Unstructured(0.4), NOfM(2, 6)):
        kept_EOI = keep_largest(score_EOI, pattern)
        alone_EOI = torch.stack([torch.stack([keep_largest(row_I, pattern) for row_I in score_OI]) for score_OI in score_EOI])
        assert torch.equal(kept_EOI, alone_EOI)


def test_the_highest_scores_are_marked_where_they_are_and_the_scores_left_alone():
    score_I = torch.tensor([-1.0, 3.0, -2.0, 3.0])

    assert largest(score_I, 3).tolist() == [True, True, False, True]
    assert largest(score_I, 0).tolist() == [False] * 4
    assert score_I.tolist() == [-1.0, 3.0, -2.0, 3.0]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_a_pattern_that_keeps_all_or_nothing_is_our_own_mistake(n: int, m: int):
    with pytest.raises(AssertionError, match="no pattern"):
        NOfM(n, m)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_a_sparsity_that_is_no_share_is_our_own_mistake(sparsity: float):
    with pytest.raises(AssertionError, match="keeps nothing"):
        Unstructured(sparsity)


def test_groups_that_do_not_divide_the_row_are_our_own_mistake():
    with pytest.raises(AssertionError, match="groups of 4 do not divide 10"):
        keep_largest(torch.zeros(2, 10), NOfM(2, 4))
