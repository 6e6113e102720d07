"""NAEE's criterion: keep the experts with which the MoE layer's output is rebuilt best.

Lu et al., "Not All Experts are Equal", arXiv:2402.14800, section 3.2. For a set of experts the router is asked again about
what it would choose among these alone, and the loss is |Z - Z'|, Z being the layer's output before and Z' after. The published
code runs the experts anew for every set. Here each sampled token was shown to every expert once, and what is kept is the
inner products of their outputs: Z - Z' is a combination of these outputs with known weights, so its norm needs nothing else.

It is the stock router that is asked, cut to the set: its rows become unit vectors and its input the logits that it gave.

Shapes: S sampled tokens, E experts, n experts that stay, K experts per token, C = 2 K of them before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compression.errors import ImpossibleStep
from compression.study import ExpertStatistics, Sample
from compression.trimming.subsets import Loss

_AGREEMENT = 2**-7
"""By how much the router, asked again about all experts, may differ from what it did: the rounding of 16-bit routers."""
_FEW = 16
_AGREEING = 0.95
"""Share of the sampled tokens that must agree so far: where two experts tie, 16-bit logits may choose either."""


class Search:
    """The reconstruction loss of one MoE layer as a function of the experts that stay."""

    def __init__(self, sample: Sample, router: Callable[[int], nn.Module]) -> None:
        self._sample, self._make = sample, router
        self._routers: dict[int, nn.Module] = {}
        self.experts = sample.logits_SE.shape[1]
        self._logits_SE = sample.logits_SE.float()
        # Few experts are multiplied out whole; of many, only those that change are looked up.
        self._gram_SEE = sample.gram_SEE.double() if self.experts <= _FEW else None
        self._refuse_strangers()

    @torch.no_grad()
    def loss(self, kept: tuple[int, ...]) -> float:
        """Return |Z - Z'| over the sampled tokens when only these experts, given ascending, are left; summed over domains."""
        weights_SK, ids_SK = self.ask(kept)
        change_SE = -self._sample.weights_SE
        change_SE = change_SE.scatter_add(1, ids_SK, weights_SK.double())
        if self._gram_SEE is not None:
            square_S = (torch.bmm(self._gram_SEE, change_SE[:, :, None])[:, :, 0] * change_SE).sum(1)
        else:
            square_S = self._squares(change_SE, torch.cat([ids_SK, self._chosen_SK], dim=1))
        domains = int(self._sample.domain_S.max()) + 1
        return float(square_S.new_zeros(domains).index_add_(0, self._sample.domain_S, square_S).clamp(min=0).sqrt().sum())

    @torch.no_grad()
    def ask(self, kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the routing weights [S, K] and expert ids [S, K] that the stock router gives among these experts."""
        kept_n = torch.tensor(kept)
        if len(kept) not in self._routers:
            self._routers[len(kept)] = self._make(len(kept))
        router = self._routers[len(kept)]
        extra = _adapt_(router, self._sample, kept_n)
        _, weights_SK, ids_SK = router(self._logits_SE, *extra)
        return weights_SK, kept_n[ids_SK]

    def _squares(self, change_SE: Tensor, ids_SC: Tensor) -> Tensor:
        """Return |sum of change times output|^2 of each token, from the inner products of the outputs that change."""
        # An expert chosen before and after stands twice among the C; its change counts once.
        order_SC = ids_SC.sort(dim=1).values
        fresh_SC = torch.ones_like(order_SC, dtype=torch.bool)
        fresh_SC[:, 1:] = order_SC[:, 1:] != order_SC[:, :-1]
        change_SC = change_SE.gather(1, order_SC) * fresh_SC
        pairs_SCC = order_SC[:, :, None] * self.experts + order_SC[:, None, :]
        gram_SCC = self._sample.gram_SEE.flatten(1).gather(1, pairs_SCC.flatten(1)).view_as(pairs_SCC)
        return torch.einsum("sa,sab,sb->s", change_SC, gram_SCC.double(), change_SC)

    def _refuse_strangers(self) -> None:
        """Refuse a router that, asked again about all its experts, does not answer what it answered in the model."""
        weights_SE = self._sample.weights_SE
        used = int((weights_SE != 0).sum(1).max())
        self._chosen_SK = weights_SE.topk(used, dim=1).indices
        weights_SK, ids_SK = self.ask(tuple(range(self.experts)))
        again_SE = torch.zeros_like(weights_SE).scatter_add(1, ids_SK, weights_SK.double())
        off_S = (again_SE - weights_SE).abs().amax(1)
        if (off_S <= _AGREEMENT * float(weights_SE.max())).double().mean() < _AGREEING:
            raise ImpossibleStep(
                "criterion reconstruction asks the router again about fewer experts, and this family's does not answer alone "
                "as it does in the model; use reap"
            )


def loss_of(statistics: ExpertStatistics, router: Callable[[int], Any] | None) -> Loss:
    """Return the reconstruction loss of a layer as a function of the experts that stay."""
    assert statistics.sample is not None, "the plan asks for the sample"
    assert router is not None
    return Search(statistics.sample, router).loss


def _adapt_(router: nn.Module, sample: Sample, kept_n: Tensor) -> list[Tensor]:
    """Make the router of n experts choose among these of E by the logits; return what else it is called with."""
    experts = sample.logits_SE.shape[1]
    rows_nE = nn.functional.one_hot(kept_n, experts).float()
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        is_weight = tensor.dim() == 2 and tensor.shape[0] == len(kept_n) and name not in sample.router
        value = rows_nE if is_weight else sample.router.get(name, torch.zeros(experts))[kept_n].float()
        _place_(router, name, value if is_weight else value.view(tensor.shape))
    for module in router.modules():
        for attribute in ("hidden_dim", "hidden_size", "in_features", "input_size"):
            if hasattr(module, attribute):
                setattr(module, attribute, experts)
    return [value[kept_n].float() for name, value in sorted(sample.router.items()) if name.startswith("argument ")]


def _place_(router: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = router.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
