"""MoELayer: the router and the stacked experts of any supported block.

Every supported family calls its experts module with three positional tensors: tokens, chosen experts, routing
weights. Watching that one call shows the router's own decision, whatever the router does inside (softmax,
sigmoid with correction bias, groups). This module contains no model name.

Shapes: T tokens, K experts per token, D width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compression.architectures import Architecture


class Routed(NamedTuple):
    """One call of an experts module: what the router decided for each token."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


class Outputs:
    """What each expert answered to each of its own tokens, before the routing weight: one row per pair, expert by expert."""

    def __init__(self, ids_TK: Tensor, count: int) -> None:
        self.order_P = ids_TK.flatten().argsort(stable=True)
        """For each row, its place in the flattened [T, K]."""
        self.token_P = self.order_P // ids_TK.shape[1]
        self.count_E = torch.bincount(ids_TK.flatten(), minlength=count)
        self._used = ids_TK.shape[1]
        self.value_PD: Tensor = torch.empty(0)

    def fill_(self, layer: MoELayer, x_TD: Tensor) -> Tensor:
        """Run the experts and return their answers [P, D], which stay in ``value_PD``."""
        self.value_PD = x_TD.new_empty(len(self.token_P), x_TD.shape[1])
        for expert, tokens, rows in self.by_expert():
            self.value_PD[rows] = layer.output(expert, x_TD[tokens])
        return self.value_PD

    def by_token(self, value_P: Tensor) -> Tensor:
        """Return a value of each row in the order of the router's choice [T, K]."""
        return torch.empty_like(value_P).index_copy_(0, self.order_P, value_P).view(-1, self._used)

    def by_expert(self) -> Generator[tuple[int, Tensor, slice]]:
        """Yield each expert that was chosen, its tokens, and the rows that hold its answers."""
        start = 0
        for expert, size in enumerate(self.count_E.tolist()):
            if size:
                rows = slice(start, start + size)
                yield expert, self.token_P[rows], rows
            start += size


class MoELayer:
    """The mixture inside one live block."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.count: int = experts.down_proj.shape[0]
        self.width: int = experts.down_proj.shape[1 if experts.is_transposed else 2]

    @contextmanager
    def watched(self, see: Callable[[Routed], None], *, skip: bool = False) -> Generator[None]:
        """Call ``see`` at every call of the experts; with ``skip`` they answer zeros and compute nothing."""

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(Routed(*args[:3]))

        hook = self.experts.register_forward_pre_hook(look)
        if skip:
            self.experts.forward = lambda x_TD, *_: torch.zeros_like(x_TD)
        try:
            yield
        finally:
            hook.remove()
            self.experts.__dict__.pop("forward", None)

    @contextmanager
    def observed(self, see: Callable[[Routed, Outputs], None]) -> Generator[None]:
        """Run the experts here, each on its own tokens once, and call ``see`` at every call with what they answered.

        The layer's answer is the stock one up to the rounding of a sum.
        """

        def forward(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            routed, outputs = Routed(x_TD, ids_TK, weights_TK), Outputs(ids_TK, self.count)
            pairs_PD = outputs.fill_(self, x_TD)
            see(routed, outputs)
            pairs_PD *= weights_TK.flatten()[outputs.order_P, None]
            return torch.zeros_like(x_TD).index_add_(0, outputs.token_P, pairs_PD.to(x_TD.dtype))

        self.experts.forward = forward
        try:
            yield
        finally:
            self.experts.__dict__.pop("forward", None)

    def stack(self, name: str, experts: range) -> Tensor:
        """Return one matrix of these experts [E, O, I], as a view into the live parameter."""
        stack = getattr(self.experts, name).data[experts.start : experts.stop]
        return stack.mT if self.experts.is_transposed else stack

    def gated(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return what enters the expert's ``down_proj`` [T, F]."""
        return self.experts._apply_gate(self._project("gate_up_proj", expert, x_TD))  # type: ignore[operator]

    def output(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return the expert's output [T, D] before the routing weight."""
        return self._project("down_proj", expert, self.gated(expert, x_TD))

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self.experts, name)[expert]
        # The stock decorator marks families that store [in, out] and those with biases.
        y = x @ (weight if self.experts.is_transposed else weight.mT)
        return y + getattr(self.experts, f"{name}_bias")[expert] if self.experts.has_bias else y


def moe_layer(architecture: Architecture, block: nn.Module) -> MoELayer | None:
    """Return the block's mixture, or None where the block is dense."""
    module: Any = block
    for part in architecture.running_experts.split("."):
        module = getattr(module, part, None)
    return MoELayer(module) if module is not None and hasattr(module, "down_proj") else None


@contextmanager
def without_layer(architecture: Architecture, block: nn.Module) -> Generator[None]:
    """Let a live block's MoE layer, and what runs beside it for every token, answer zeros: as if the layer had been dropped."""
    silent = [(architecture.running_moe, architecture.layer_returns), *((name, 1) for name in architecture.shared_beside)]
    modules = [(block.get_submodule(name), returns) for name, returns in silent]
    for module, returns in modules:
        module.forward = partial(_nothing, returns)
    try:
        yield
    finally:
        for module, _ in modules:
            module.__dict__.pop("forward", None)


def _nothing(returns: int, x: Tensor, *_: Any, **__: Any) -> Any:
    zeros = torch.zeros_like(x)
    return zeros if returns == 1 else (zeros, *[None] * (returns - 1))


def attention_module(architecture: Architecture, block: nn.Module) -> nn.Module:
    """Return the module of a live block that mixes tokens: attention, or what stands in for it."""
    names = [name for module in architecture.attention for name in architecture.names_of(module)]
    return block.get_submodule(next(name for name in names if hasattr(block, name)))


def by_expert(ids_TK: Tensor, count: int) -> Generator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that was chosen, the tokens that chose it, and in which of the K places."""
    order = ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(ids_TK.flatten(), minlength=count).tolist()[:count]  # skipped experts bear the id after the last
    start = 0
    for expert, size in enumerate(counts):
        if size:
            pairs = order[start : start + size]
            yield expert, pairs // ids_TK.shape[1], pairs % ids_TK.shape[1]
        start += size
