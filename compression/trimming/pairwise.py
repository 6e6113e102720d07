"""HOPE: experts are dropped as a set, because what one of them gives may depend on which others a token chose.

"HOPE", arXiv:2609.18916. With a = g |f| the size of an expert's contribution to a token, and F_ij the mean of a_i a_j over the
tokens routed to both (zero if there are none), the set of dropped experts p minimises p^T F p. F is not positive
definite; the paper relaxes the problem to fractions and rounds, here the sets themselves are searched (``subsets.py``).

Shapes: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.study import ExpertStatistics
from compression.trimming.subsets import Loss


def interactions(statistics: ExpertStatistics) -> Tensor:
    """Return F [E, E]: the mean product of two experts' contributions over the tokens that chose both."""
    together_EE = statistics.total("together")
    return torch.where(together_EE > 0, statistics.total("together_norm") / together_EE.clamp(min=1), 0.0)


def loss_of(statistics: ExpertStatistics) -> Loss:
    """Return p^T F p as a function of the experts that stay, p marking all others."""
    interaction_EE = interactions(statistics)
    experts = interaction_EE.shape[0]

    def loss(kept: tuple[int, ...]) -> float:
        held = set(kept)
        gone = [expert for expert in range(experts) if expert not in held]
        return float(interaction_EE[gone][:, gone].sum())

    return loss
