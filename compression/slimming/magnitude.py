"""Magnitude: drop the weights that are nearest to zero. Needs no calibration; what every other pruning method must beat.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv:1506.02626.

Shapes: E experts, O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.slimming.masks import NOfM, Pattern, keep_largest


@torch.no_grad()
def prune(weight_EOI: Tensor, pattern: Pattern, moved_EI: Tensor | None = None) -> Tensor:
    """Return the stack with its smallest weights at zero; unstructured, the weights of a whole matrix are compared.

    ``moved_EI``: what the weights have been multiplied with since they came; they are compared as they were before.
    """
    score_EOI = weight_EOI.float().abs()
    if moved_EI is not None:
        score_EOI /= moved_EI[:, None]
    if isinstance(pattern, NOfM):
        return weight_EOI.where(keep_largest(score_EOI, pattern), 0)
    return weight_EOI.where(keep_largest(score_EOI.flatten(1), pattern).view(weight_EOI.shape), 0)
