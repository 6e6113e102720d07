"""Likeness: how alike one MoE layer's experts are, by their weights alone.

"A Closer Look into Mixture-of-Experts in Large Language Models", arXiv:2406.18219, section 4. Experts that were copied from one
dense layer keep its neurons in its order: Kendall's tau of the best matching was 0.75 for Mixtral, which was made that way, and
-0.0002 for DeepSeekMoE, which was trained from scratch. Where tau is near zero, averaging experts row by row means nothing.

Cost, for F neurons of width D in each of E experts: 6 E^2 F D operations for the cosines, in chunks of 64 MiB beside the
weights; for each pair matched, 2 F^2 D operations and an assignment of F by F, which took 0.04 s at F = 768 and 1.7 s at 3072
where neurons are unrelated, a seventh of that where they are aligned (one core). Wide experts are matched in fewer pairs.

Shapes: E experts, F neurons of an expert, D width, P pairs of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compression.moe import MoELayer
from compression.neurons import best_order, cosines, gate_up_down
from compression.study import Likeness

PAIRS = 28
"""Pairs of experts that are matched, at most: all pairs of eight."""
_FULL_WIDTH = 1024
"""Neurons up to which so many are; above, fewer with the cube of the width, so that no layer takes much longer."""
_CHUNK_NUMBERS = 2**24


@torch.no_grad()
def likeness(layer: MoELayer, router: nn.Module) -> Likeness:
    """Return the cosines between a live layer's experts, and how well neurons match for at most PAIRS pairs of them."""
    stacks = gate_up_down(layer)
    compared = [_compared(stack_EFD) for stack_EFD in stacks]
    pairs_P2 = pairs(layer.count, layer.width)
    matched = [_matched(stacks[0][one], stacks[0][other]) for one, other in pairs_P2.tolist()]
    tau_P, aligned_P, matched_P = torch.tensor(matched, dtype=torch.float64).reshape(-1, 3).unbind(1)
    return Likeness(
        matrix_3EE=torch.stack([matrix_EE for matrix_EE, _ in compared]),
        average_3EE=torch.stack([average_EE for _, average_EE in compared]),
        router_EE=_normalized(_gram(_rows(router, layer.count))),
        pairs_P2=pairs_P2,
        tau_P=tau_P,
        aligned_P=aligned_P,
        matched_P=matched_P,
    )


def pairs(experts: int, width: int) -> Tensor:
    """Return the pairs of experts to match [P, 2]: all there are, or some that lie evenly among them."""
    every_2Q = torch.triu_indices(experts, experts, offset=1)
    affordable = max(1, PAIRS * _FULL_WIDTH**3 // max(width, _FULL_WIDTH) ** 3)
    count = min(affordable, every_2Q.shape[1])
    place_P = (2 * torch.arange(count) + 1) * every_2Q.shape[1] // (2 * max(count, 1))
    return every_2Q[:, place_P].mT.contiguous()


def _compared(stack_EFD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines between the experts' matrices [E, E], and between their averages over neurons [E, E]."""
    experts, neurons, width = stack_EFD.shape
    gram_EE = torch.zeros(experts, experts, dtype=torch.float64)
    sum_ED = torch.zeros(experts, width, dtype=torch.float64)
    for chunk_EFD in stack_EFD.split(max(1, _CHUNK_NUMBERS // (experts * width)), dim=1):
        gram_EE += _gram(chunk_EFD.float().flatten(1))
        sum_ED += chunk_EFD.sum(1, dtype=torch.float32).double().cpu()
    return _normalized(gram_EE), _normalized(_gram(sum_ED / neurons))


def _matched(one_FD: Tensor, other_FD: Tensor) -> tuple[float, float, float]:
    """Return Kendall's tau of the best matching, and the mean cosine of neurons as saved and as matched."""
    cosine_FF = cosines(one_FD, other_FD)
    order_F = best_order(cosine_FF)
    matched_F = cosine_FF.gather(1, order_F.to(cosine_FF.device)[:, None])
    return kendall_tau(order_F), float(cosine_FF.diagonal().mean()), float(matched_F.mean())


def kendall_tau(order_F: Tensor) -> float:
    """Return Kendall's tau of a permutation: the share of pairs in order, from -1 for none to 1 for all."""
    count = len(order_F)
    in_order = int((order_F[:, None] < order_F).triu(diagonal=1).sum())
    return 4 * in_order / (count * (count - 1)) - 1


def _rows(router: nn.Module, experts: int) -> Tensor:
    return next(weight for weight in router.parameters() if weight.dim() == 2 and weight.shape[0] == experts).float()


def _gram(value_EN: Tensor) -> Tensor:
    return (value_EN @ value_EN.mT).double().cpu()


def _normalized(gram_EE: Tensor) -> Tensor:
    norm_E = gram_EE.diagonal().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return gram_EE / norm_E[:, None] / norm_E
