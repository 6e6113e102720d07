"""What one run of a live block leaves for slimming: the Gram matrix of everything its matrices were fed.

Linear layers that are fed the very same tensor (queries, keys and values) share one Gram matrix. Routed tokens are
kept once, not once per expert, and turned into Gram matrices for a chunk of experts at a time: the Gram matrices of
all experts would outweigh the block.

Shapes: T tokens, K experts per token, D width, E experts, I inputs.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compression.moe import MoELayer, Routed, by_expert
from compression.slimming.hessian import Gram
from compression.sweep import Stream


class RoutedTokens:
    """Every token that entered one block's experts, and who was to compute it; waits on the host."""

    def __init__(self, calls: list[Routed], experts: int) -> None:
        self._x_TD = torch.cat([call.x_TD.cpu() for call in calls])
        ids_TK = torch.cat([call.ids_TK.cpu() for call in calls])
        self._tokens = {expert: tokens for expert, tokens, _ in by_expert(ids_TK, experts)}

    def input_gram(self, experts: range, device: torch.device) -> Gram:
        """Return the Gram matrices of what enters these experts (their gate and up share it)."""
        gram = Gram(len(experts), self._x_TD.shape[1], device)
        for place, rows_TD in self._rows(experts, device):
            gram.add_rows(place, rows_TD)
        return gram

    def inner_gram(self, experts: range, layer: MoELayer, device: torch.device) -> Gram:
        """Return the Gram matrices of what enters these experts' ``down_proj``, as the layer computes it now."""
        gram = Gram(len(experts), layer.width, device)
        for place, rows_TD in self._rows(experts, device):
            gram.add_rows(place, layer.gated(experts[place], rows_TD))
        return gram

    def _rows(self, experts: range, device: torch.device) -> Generator[tuple[int, Tensor]]:
        for place, expert in enumerate(experts):
            if expert in self._tokens:
                yield place, self._x_TD[self._tokens[expert]].to(device)


@torch.no_grad()
def collect(
    index: int, block: nn.Module, stream: Stream, linears: Mapping[str, nn.Linear], layer: MoELayer | None
) -> tuple[dict[str, Gram], RoutedTokens | None]:
    """Run a block once on the stream, which stays where it is; return each linear's Gram and the routed tokens."""
    calls: list[Routed] = []
    with ExitStack() as stack:
        grams = stack.enter_context(_gathered(linears))
        if layer is not None:
            # The experts' own outputs are not needed, and they are most of the block's arithmetic.
            stack.enter_context(layer.watched(calls.append, skip=True))
        for _ in stream.peek(index, block):
            pass
    return grams, RoutedTokens(calls, layer.count) if layer is not None else None


@contextmanager
def _gathered(linears: Mapping[str, nn.Linear]) -> Generator[dict[str, Gram]]:
    grams: dict[str, Gram] = {}
    fed: dict[int, tuple[Tensor, Gram]] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            known = fed.get(id(x))
            if known is not None:  # another linear has just been fed this very tensor
                grams[name] = known[1]
                return
            gram = grams.setdefault(name, Gram(1, x.shape[-1], x.device))
            fed.clear()
            fed[id(x)] = (x, gram)  # holds x, so that its id cannot be used again
            gram.update(x.flatten(0, -2))

        return look

    hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield grams
    finally:
        for handle in hooks:
            handle.remove()
