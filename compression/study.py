"""The first visitor, and the Study it leaves: every statistic that today's trimming steps need, from one pass.

Sums are kept per calibration domain and in float64, so any mixture of domains is exact arithmetic afterwards and
a split calibration set gives the same statistic.

Shapes: M domains, E experts, T tokens, K experts per token, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compression.architectures import Architecture
from compression.moe import MoELayer, Routed, by_expert, moe_layer
from compression.sweep import Stream


@dataclass
class ExpertStatistics:
    """What one MoE layer did with the calibration tokens."""

    tokens_M: Tensor
    count_ME: Tensor
    """Tokens routed to each expert."""
    weight_ME: Tensor
    """Sum of the routing weights that the model really used."""
    weighted_norm_ME: Tensor
    """Sum of routing weight times the L2 norm of the expert's output; NaN where it was not asked for."""

    @property
    def tokens(self) -> float:
        """Tokens seen, over all domains."""
        return float(self.tokens_M.sum())

    @property
    def count_E(self) -> Tensor:
        """Tokens routed to each expert, over all domains."""
        return self.count_ME.sum(0)

    @property
    def weight_E(self) -> Tensor:
        """Sum of routing weights, over all domains."""
        return self.weight_ME.sum(0)

    @property
    def weighted_norm_E(self) -> Tensor:
        """Sum of routing weight times output norm, over all domains."""
        return self.weighted_norm_ME.sum(0)


@dataclass
class Study:
    """The statistics of an untouched model, by block index."""

    experts: dict[int, ExpertStatistics] = field(default_factory=dict)
    cosine_M: dict[int, Tensor] = field(default_factory=dict)
    """Sum over tokens of cos(block input, block output), per domain."""
    tokens_M: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def cosine(self, block: int) -> float:
        """Return the mean cosine between a block's input and output."""
        return float(self.cosine_M[block].sum() / self.tokens_M.sum())


class Observer:
    """Watches every block of the untouched model and fills a Study."""

    def __init__(self, architecture: Architecture, domain_N: Tensor, *, output_norms: bool) -> None:
        """``domain_N``: domain of each sequence. ``output_norms``: run each expert once more for its output norm."""
        self.study = Study()
        self._architecture = architecture
        self._domain_N = domain_N
        self._domains = int(domain_N.max()) + 1
        self._output_norms = output_norms

    def visit(self, index: int, block: nn.Module, stream: Stream) -> None:
        """Push the stream through the block and add up what it shows."""
        domains = [d_B.repeat_interleave(ids.shape[1]) for d_B, ids in zip(self._split(stream), stream.ids, strict=True)]
        self.study.tokens_M = sum(self._sum_by_domain(d_T, torch.ones(len(d_T))) for d_T in domains)  # type: ignore[assignment]
        cosine_M = torch.zeros(self._domains, dtype=torch.float64)

        def compare(batch: int, input_BSD: Tensor, output_BSD: Tensor) -> None:
            cosine_T = torch.cosine_similarity(input_BSD.double(), output_BSD.double(), dim=-1).flatten().cpu()
            cosine_M.add_(self._sum_by_domain(domains[batch], cosine_T))

        layer = moe_layer(self._architecture, block)
        if layer is None:
            stream.push(index, block, compare)
        else:
            self.study.experts[index] = statistics = self._empty(layer.count)
            remaining = iter(domains)
            with layer.watched(lambda routed: self._add(statistics, layer, routed, next(remaining))):
                stream.push(index, block, compare)
        self.study.cosine_M[index] = cosine_M

    def _add(self, statistics: ExpertStatistics, layer: MoELayer, routed: Routed, domain_T: Tensor) -> None:
        ids_TK, weights_TK = routed.ids_TK.cpu(), routed.weights_TK.cpu().double()
        slot_TK = domain_T[:, None] * layer.count + ids_TK
        _scatter(statistics.count_ME, slot_TK, torch.ones_like(weights_TK))
        _scatter(statistics.weight_ME, slot_TK, weights_TK)
        statistics.tokens_M += self._sum_by_domain(domain_T, torch.ones(len(domain_T)))
        if not self._output_norms:
            return
        for expert, tokens, places in by_expert(routed.ids_TK, layer.count):
            norm_T = layer.output(expert, routed.x_TD[tokens]).float().norm(dim=-1).double().cpu()
            tokens, places = tokens.cpu(), places.cpu()
            _scatter(statistics.weighted_norm_ME, slot_TK[tokens, places], weights_TK[tokens, places] * norm_T)

    def _empty(self, experts: int) -> ExpertStatistics:
        zeros = torch.zeros(self._domains, experts, dtype=torch.float64)
        norms = zeros.clone() if self._output_norms else torch.full_like(zeros, torch.nan)
        return ExpertStatistics(torch.zeros(self._domains, dtype=torch.float64), zeros.clone(), zeros.clone(), norms)

    def _split(self, stream: Stream) -> tuple[Tensor, ...]:
        return self._domain_N.split([ids.shape[0] for ids in stream.ids])

    def _sum_by_domain(self, domain_T: Tensor, value_T: Tensor) -> Tensor:
        return torch.zeros(self._domains, dtype=torch.float64).index_add_(0, domain_T, value_T.double())


def _scatter(total_ME: Tensor, slot: Tensor, value: Tensor) -> None:
    total_ME.view(-1).index_add_(0, slot.flatten(), value.flatten())
