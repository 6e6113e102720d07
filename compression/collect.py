"""What one run of a live block leaves for slimming: statistics of everything its matrices were fed.

Linear layers that are fed the very same tensor (queries, keys and values) share one statistic. Routed tokens are
kept once, not once per expert, and turned into statistics for a chunk of experts at a time: the Gram matrices of
all experts would outweigh the block.

An expert that the router starves is topped up: beside its own tokens it is shown those for which the router gave it the
highest probability without choosing it, until it has seen twice as many as the widest of its matrices has inputs.

Shapes: T tokens, K experts per token, D width, E experts, I inputs, S tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from compression.architectures import Architecture
from compression.errors import NonFiniteWeights
from compression.moe import MoELayer, Routed, attention_module, by_expert, moe_layer
from compression.slimming.hessian import Statistic
from compression.sweep import Stream

ENOUGH = 2
"""Tokens per input up to which starved experts are topped up: decision record 0015."""

_STATISTIC_BYTES = 4 * 2**30
"""Gram matrices held at once, at most: beyond this size a longer stack gains nothing."""

NewStatistic = Callable[[int, int, torch.device], Statistic]
"""Makes an empty statistic for so many experts and inputs: a ``Gram`` or an ``InputNorm``."""


@dataclass
class Collected:
    """What a block's matrices were fed."""

    linears: dict[str, Statistic]
    routed: RoutedTokens | None


class RoutedTokens:
    """Every token that entered one block's experts, and who is to be calibrated on it; waits on the host."""

    def __init__(self, calls: list[Routed], probability_TE: Tensor, *, enough: int) -> None:
        """``probability_TE``: what the router thought of every expert. ``enough``: tokens up to which experts are topped up."""
        self.x_TD = torch.cat([call.x_TD.cpu() for call in calls])
        self._moved_D: Tensor | None = None
        ids_TK = torch.cat([call.ids_TK.cpu() for call in calls])
        weights_TK = torch.cat([call.weights_TK.cpu().float() for call in calls])
        experts = probability_TE.shape[1]
        self.own_E = torch.bincount(ids_TK.flatten(), minlength=experts)[:experts]
        """Tokens that the router sent to each expert."""
        own = {expert: (tokens, weights_TK[tokens, places]) for expert, tokens, places in by_expert(ids_TK, experts)}
        nobody = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._shown = [_topped_up(*own.get(e, nobody), probability_TE[:, e], enough=enough) for e in range(experts)]

    @property
    def tokens_E(self) -> Tensor:
        """Tokens that each expert is calibrated on."""
        return torch.tensor([len(tokens) for tokens, _ in self._shown])

    def input_statistic(self, experts: range, new: NewStatistic, device: torch.device, *, weighted: bool) -> Statistic:
        """Return the statistic of what enters these experts (their gate and up share it)."""
        statistic = new(len(experts), self.x_TD.shape[1], device)
        for place, rows_SD, weight_S in self._rows(experts, device):
            statistic.add_rows(place, rows_SD, weight_S if weighted else None)
        if self._moved_D is not None:
            statistic.moved_EI = self._moved_D.to(device).expand(len(experts), -1)
        return statistic

    def rescale_(self, factor_D: Tensor) -> None:
        """Divide the tokens by ``factor_D``, with which the weights that they enter have been multiplied."""
        self.x_TD = self.x_TD / factor_D.to(self.x_TD)
        self._moved_D = factor_D if self._moved_D is None else self._moved_D * factor_D

    def inner_statistic(
        self, experts: range, new: NewStatistic, layer: MoELayer, device: torch.device, *, weighted: bool
    ) -> Statistic:
        """Return the statistic of what enters these experts' ``down_proj``, as the layer computes it now."""
        statistic = new(len(experts), layer.width, device)
        for place, rows_SD, weight_S in self._rows(experts, device):
            statistic.add_rows(place, layer.gated(experts[place], rows_SD), weight_S if weighted else None)
        return statistic

    def _rows(self, experts: range, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        for place, expert in enumerate(experts):
            tokens_S, weight_S = self._shown[expert]
            if len(tokens_S):
                yield place, self.x_TD[tokens_S].to(device), weight_S.to(device)


@torch.no_grad()
def collect(
    index: int,
    block: nn.Module,
    stream: Stream,
    linears: Mapping[str, nn.Linear],
    *,
    new: NewStatistic,
    architecture: Architecture,
    advance: bool,
) -> Collected:
    """Run a block once on the stream; return each linear's statistic and the routed tokens.

    ``advance``: leave the stream behind the block as it stands, rather than before it. If it stays before it, it remembers what
    attention answered.
    Raises NonFiniteWeights naming the matrix whose inputs hold a NaN or an infinity.
    """
    layer = moe_layer(architecture, block)
    calls: list[Routed] = []
    logits: list[Tensor] = []
    with ExitStack() as stack:
        statistics = stack.enter_context(_gathered(linears, new))
        if layer is not None:
            # Where the experts' own outputs are not needed, they would be most of the block's arithmetic.
            stack.enter_context(layer.watched(calls.append, skip=not advance))
            router = block.get_submodule(architecture.running_router)
            hook = router.register_forward_hook(lambda _m, _a, output: logits.append(output[0].flatten(0, -2).cpu()))
            stack.callback(hook.remove)
        if advance:
            stream.push(index, block)
        else:
            stack.enter_context(stream.remembered(attention_module(architecture, block)))
            for _ in stream.peek(index, block):
                pass
    for name, statistic in statistics.items():
        refuse_non_finite_inputs(statistic, name)
    routed = None
    if layer is not None:
        probability_TE = probability(torch.cat(logits), architecture)
        routed = RoutedTokens(calls, probability_TE, enough=ENOUGH * max(layer.width, calls[0].x_TD.shape[1]))
    return Collected(statistics, routed)


def refuse_non_finite_inputs(statistic: Statistic, name: str) -> None:
    """Raise NonFiniteWeights if a matrix was fed a NaN, an infinity, or what is too large to square."""
    if not torch.isfinite(statistic.mean_square_EI.sum(dtype=torch.float64)):
        raise NonFiniteWeights(f"what enters {name} holds a NaN, an infinity, or a value too large to square")


def probability(logits_TE: Tensor, architecture: Architecture) -> Tensor:
    """Return what the router thinks of every expert, chosen or not, for each token [T, E]."""
    logits_TE = logits_TE.float()
    return logits_TE.sigmoid() if architecture.router_scores == "sigmoid" else logits_TE.softmax(dim=-1)


def _topped_up(own_S: Tensor, weight_S: Tensor, probability_T: Tensor, *, enough: int) -> tuple[Tensor, Tensor]:
    lacking = min(enough, len(probability_T)) - len(own_S)
    if lacking <= 0:
        return own_S, weight_S
    others_T = probability_T.clone()
    others_T[own_S] = -1.0
    more_S = torch.sort(others_T, descending=True, stable=True).indices[:lacking]
    return torch.cat([own_S, more_S]), torch.cat([weight_S, probability_T[more_S]])


def experts_at_once(layer: MoELayer) -> int:
    """Return how many experts' Gram matrices fit into a quarter of free memory; one at least."""
    weight = layer.experts.down_proj
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else psutil.virtual_memory().available
    one_expert = 4 * max(weight.shape[1], weight.shape[2]) ** 2
    return max(1, min(layer.count, min(free // 4, _STATISTIC_BYTES) // one_expert))


@contextmanager
def _gathered(linears: Mapping[str, nn.Linear], new: NewStatistic) -> Generator[dict[str, Statistic]]:
    statistics: dict[str, Statistic] = {}
    fed: dict[int, tuple[Tensor, Statistic]] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            known = fed.get(id(x))
            if known is not None:  # another linear has just been fed this very tensor
                statistics[name] = known[1]
                return
            statistic = statistics.setdefault(name, new(1, x.shape[-1], x.device))
            fed.clear()
            fed[id(x)] = (x, statistic)  # holds x, so that its id cannot be used again
            statistic.update(x.flatten(0, -2))

        return look

    hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield statistics
    finally:
        for handle in hooks:
            handle.remove()
