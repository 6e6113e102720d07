"""Neurons of experts (a row of gate, that row of up, that column of down), and which of two experts' are most like each other.

An expert computes the same whatever the order of its neurons. Before two experts are compared or averaged neuron by neuron,
their neurons are matched one to one so that the sum of cosines is largest: an assignment problem, solved exactly by
scipy's Jonker-Volgenant. Its time grows with the cube of the width: decision record 0019.

Shapes: E experts, F neurons of an expert, D width, N numbers by which a neuron is known.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from compression.moe import MoELayer


def gate_up_down(layer: MoELayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three matrices of all experts [E, F, D], neurons first, as views into the live parameters."""
    everyone = range(layer.count)
    both_EOD = layer.stack("gate_up_proj", everyone)
    # The stock decorator marks families in which gate and up alternate instead of following each other.
    gate_EFD, up_EFD = both_EOD.chunk(2, dim=1) if layer.experts.is_concatenated else (both_EOD[:, ::2], both_EOD[:, 1::2])
    return gate_EFD, up_EFD, layer.stack("down_proj", everyone).mT


def cosines(one_FN: Tensor, other_FN: Tensor) -> Tensor:
    """Return the cosine of every row of one with every row of the other, in float32; zero where a row is zero."""
    return torch.nn.functional.normalize(one_FN.float(), dim=1) @ torch.nn.functional.normalize(other_FN.float(), dim=1).mT


def best_order(cosine_FF: Tensor) -> Tensor:
    """Return, for each row, the column it is matched with [F]: each is taken once, and the sum of cosines is the largest."""
    _, order_F = linear_sum_assignment(cosine_FF.cpu().numpy(), maximize=True)
    return torch.from_numpy(order_F)
