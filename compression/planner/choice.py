"""Which of a few tried plans to follow: the predicted best, unless another beats it beyond doubt.

A trial is of weights rounded to nearest; what rounding costs beyond the method that writes artifacts is known from the prices, so

    loss(plan) = measured(rounded) - predicted(rounded) + predicted(as written).

A gain counts only beyond two standard errors of the difference, sequence by sequence: chasing the smaller of two noisy numbers
loses more than it finds (decision 0021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

ERRORS = 2.0
"""Standard errors by which a plan must be better than the predicted best."""
TRUSTED = (0.7, 1.4)
"""Measured over predicted loss within which a prediction is believed."""
_NOTHING = 0.005
"""Nats below which neither number says anything."""


@dataclass(frozen=True)
class Tried:
    """One plan, predicted and measured; losses in nats per token."""

    predicted: float
    rounded: float
    """What was predicted for the plan rounded to nearest."""
    measured: tuple[float, ...]
    """Of each sequence, rounded to nearest."""

    @property
    def corrected(self) -> tuple[float, ...]:
        """The measured losses, as the plan will be written."""
        return tuple(loss - self.rounded + self.predicted for loss in self.measured)

    @property
    def loss(self) -> float:
        """The mean of them."""
        return max(0.0, mean(self.corrected))

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 with a single sequence, which has none to show."""
        return stdev(self.measured) / sqrt(len(self.measured)) if len(self.measured) > 1 else 0.0


def as_predicted(predicted: float, measured: float) -> bool:
    """Say whether a measured loss agrees with its prediction as well as they usually do."""
    if max(predicted, measured) < _NOTHING:
        return True
    return predicted > 0 and TRUSTED[0] <= measured / predicted <= TRUSTED[1]


def settle(tried: Sequence[Tried]) -> int:
    """Return the place of the plan to follow; the first is the predicted best."""
    gains = {place: _gain(tried[0], other) for place, other in enumerate(tried) if place}
    sure = {place: gain for place, (gain, error) in gains.items() if gain > ERRORS * error and gain > 0}
    return max(sure, key=lambda place: sure[place]) if sure else 0


def _gain(best: Tried, other: Tried) -> tuple[float, float]:
    """Return by how much the other plan is better, and the standard error of that; no gain is sure of one sequence alone."""
    difference = [a - b for a, b in zip(best.corrected, other.corrected, strict=True)]
    if len(difference) < 2:
        return mean(difference), float("inf")
    return mean(difference), stdev(difference) / sqrt(len(difference))
