"""How much of what a weight computes was lost when it was slimmed, in the measure that its calibration allows.

With a Gram matrix it is the squared error of the outputs over the calibration tokens, tr(dW G dW^T); with the mean
squares of the inputs alone, the same as if inputs were uncorrelated; with neither, the squared error of the weight itself.
Each is relative to what the whole weight would give.

Shapes: E experts, O output features, I input features, R outputs that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_OUTPUTS = 128
"""Outputs looked at, evenly spaced: all of them would cost twice the solver's own arithmetic."""


def sample(weight_EOI: Tensor) -> Tensor:
    """Return at most 128 evenly spaced outputs [E, R, I] of a stack."""
    return weight_EOI[:, :: -(-weight_EOI.shape[1] // _OUTPUTS)]


@torch.no_grad()
def relative_errors(weight_ERI: Tensor, ways: Sequence[Tensor], statistic: Tensor | None) -> list[Tensor]:
    """Return, for each thing that could become of the weights, the squared error per expert relative to what is right.

    ``statistic``: Gram matrices [E, I, I], mean squares of inputs [E, I], or None. Float64, on the host. Zero where there is
    no error: an expert without tokens has no output to get wrong. NaN if the statistic is.
    """
    right_ERI = weight_ERI.float()
    right_E = energy(right_ERI, statistic)
    lost = [energy(right_ERI - became_ERI.float(), statistic) for became_ERI in ways]
    return [torch.where(lost_E == 0, 0.0, lost_E / right_E).cpu() for lost_E in lost]


@torch.no_grad()
def energy(weight_ERI: Tensor, statistic: Tensor | None) -> Tensor:
    """Return, per expert, the mean squared output summed over outputs; float32 in, float64 out."""
    if statistic is None:
        return weight_ERI.square().sum(dim=(1, 2), dtype=torch.float64)
    if statistic.dim() == 2:
        return (weight_ERI.square().sum(dim=1, dtype=torch.float64) * statistic.double()).sum(dim=1)
    return torch.bmm(weight_ERI, statistic.float()).mul_(weight_ERI).sum(dim=(1, 2), dtype=torch.float64)
