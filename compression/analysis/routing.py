"""Routing: how often each expert is chosen, how evenly, with which others, and whether loud experts are preferred.

The experts of one token are never the same, so even a router that draws blindly pairs them up less often than the product of
their usages says. What is expected of a pair is therefore a_i a_j for i other than j, with those a that keep every expert's own
number of partners (quasi-independence, as for any table with an empty diagonal). Lift is what was seen over what is expected.

Whether the router prefers loud experts: of the K experts of a token, is the one with the largest routing weight also the one with
the largest output? arXiv:2406.18219, section 5, finds that it is for Mixtral, and the reverse for Grok.

Shapes: M domains, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compression.study import ExpertStatistics

_ROUNDS = 200
"""Steps of the fit of expected pairs; it moves by less than 1e-6 after a few dozen unless one expert is chosen always."""

Table = dict[str, Any]


def routing(layer: ExpertStatistics, domains: tuple[str, ...]) -> Table:
    """Return the routing table of all tokens under ``mixed`` and of each domain's; None where there was no token."""
    by_domain = {domain: _table(layer, place) for place, domain in enumerate(domains)}
    return {"mixed": _table(layer, None), "domains": by_domain}


def lift(layer: ExpertStatistics) -> Tensor | None:
    """Return for each pair how often it was chosen together over what is expected [E, E]; None if a token has one expert.

    One where nothing is expected, and on the diagonal.
    """
    together_EE = layer.total("together").clone().fill_diagonal_(0.0)
    if layer.rank_MKK.shape[1] < 2 or not together_EE.any():
        return None
    expected_EE = expected(together_EE)
    return torch.where(expected_EE > 0, together_EE / expected_EE.clamp(min=1e-300), 1.0)


def expected(together_EE: Tensor) -> Tensor:
    """Return how often pairs would meet if partners were drawn independently, every expert having as many as it had [E, E]."""
    partners_E = together_EE.sum(1)
    share_E = partners_E / partners_E.sum().clamp(min=1.0).sqrt()
    for _ in range(_ROUNDS):
        meets_E = share_E * (share_E.sum() - share_E)
        share_E = share_E * (partners_E / meets_E.clamp(min=1e-300)).sqrt()
    return (share_E[:, None] * share_E).fill_diagonal_(0.0)


def balance(count_E: Tensor) -> Table:
    """Return how even a count is: entropy over its largest value, deviation over mean, the extremes over the mean, the unused."""
    share_E = count_E / count_E.sum()
    experts = len(share_E)
    entropy = float(torch.special.entr(share_E).sum())
    return {
        "entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "variation": float(share_E.std(correction=0)) * experts,
        "largest": float(share_E.max()) * experts,
        "smallest": float(share_E.min()) * experts,
        "unused": (count_E == 0).nonzero().flatten().tolist(),
    }


def loudness(rank_KK: Tensor) -> Table | None:
    """Return how the places of a token's experts agree, by routing weight and by output norm; None if a token has one expert."""
    used = rank_KK.shape[0]
    if used < 2 or not rank_KK.any():
        return None
    place_K = torch.arange(used, dtype=torch.float64) - (used - 1) / 2
    # Each token has every place once on both sides, so both deviations are those of 0, 1, ..., K - 1.
    product = float(place_K @ rank_KK @ place_K / rank_KK.sum())
    return {
        "ranks": rank_KK.tolist(),
        "same_place": float(rank_KK.trace() / rank_KK.sum()),
        "by_chance": 1 / used,
        "loudest_first": float(rank_KK[0, 0] / rank_KK[0].sum()),
        "correlation": product / float(place_K.square().mean()),
    }


def _table(layer: ExpertStatistics, domain: int | None) -> Table | None:
    def of(sums: Tensor) -> Tensor:
        return sums.sum(0) if domain is None else sums[domain]

    tokens, count_E = float(of(layer.tokens_M)), of(layer.count_ME)
    if tokens == 0 or not count_E.any():
        return None
    used_E = count_E.clamp(min=1)
    return {
        "tokens": tokens,
        "count": count_E.tolist(),
        "usage": (count_E / tokens).tolist(),
        "mean_weight": (of(layer.weight_ME) / used_E).tolist(),
        "mean_probability": (of(layer.probability_ME) / tokens).tolist(),
        "mean_norm": (of(layer.norm_ME) / used_E).tolist(),
        "balance": balance(count_E),
        "loudness": loudness(of(layer.rank_MKK)),
    }
