"""The predicted best is left only for a plan that is better beyond doubt, and rounding is held against nobody."""

from __future__ import annotations

import pytest

from compression.planner.choice import Tried, as_predicted, settle


def plan(*measured: float, predicted: float = 0.1, rounded: float = 0.1) -> Tried:
    return Tried(predicted, rounded, measured)


def test_a_plan_that_is_better_in_every_sequence_alike_is_taken():
    assert settle([plan(0.30, 0.20, 0.10), plan(0.25, 0.15, 0.06)]) == 1


def test_a_gain_within_two_standard_errors_is_none():
    # Differences .1, -.05, .04: mean .03, standard error .0436.
    assert settle([plan(0.30, 0.20, 0.10), plan(0.20, 0.25, 0.06)]) == 0


def test_of_two_sure_gains_the_larger_is_taken():
    assert settle([plan(0.30, 0.20), plan(0.28, 0.17), plan(0.20, 0.11)]) == 2


def test_one_sequence_makes_nothing_sure():
    assert settle([plan(0.5), plan(0.1)]) == 0


def test_a_plan_that_rounding_hurts_more_is_not_blamed_for_it():
    cheap_bits = plan(0.30, 0.31, 0.29, predicted=0.10, rounded=0.30)
    drops = plan(0.12, 0.13, 0.11, predicted=0.12, rounded=0.12)

    assert settle([cheap_bits, drops]) == 0
    assert cheap_bits.loss == pytest.approx(0.10)


def test_the_error_is_that_of_the_mean():
    # 1, 2, 3: standard deviation 1, over the root of 3.
    assert plan(1.0, 2.0, 3.0).error == pytest.approx(3**-0.5)


def test_a_loss_four_times_the_prediction_is_not_as_predicted():
    assert as_predicted(0.1, 0.1)
    assert not as_predicted(0.1, 0.4)
    assert not as_predicted(0.1, 0.03)


def test_losses_too_small_to_compare_are_as_predicted():
    assert as_predicted(0.0, 0.004)
