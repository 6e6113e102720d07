"""A live block with other weights for a while: what a scheme would make of its experts, or of some of its linear layers.

The same arithmetic as ``slim.py``, which changes what is saved; here only the live block changes, and is put back.

Shapes: E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from compression.collect import Collected, RoutedTokens, experts_at_once
from compression.moe import MoELayer
from compression.recipe import BITS
from compression.slimming.grid import Grid
from compression.slimming.hessian import Gram
from compression.stacks import Treatment, slim_stack


def rounded_to(scheme: str, group_size: int, method: str) -> Treatment:
    """Return the treatment that stores matrices by an integer scheme."""
    return Treatment(None, None, method, scheme, Grid(BITS[scheme], group_size), None)


@contextmanager
def slimmed_experts(layer: MoELayer, treatment: Treatment, routed: RoutedTokens | None, stored: torch.dtype) -> Generator[None]:
    """Let a live block's experts hold what a treatment makes of them."""
    whole = range(layer.count)
    before = {name: layer.stack(name, whole).clone() for name in ("gate_up_proj", "down_proj")}
    try:
        slim_experts_(layer, treatment, routed, stored)
        yield
    finally:
        for name, stack_EOI in before.items():
            layer.stack(name, whole).copy_(stack_EOI)


def slim_experts_(layer: MoELayer, treatment: Treatment, routed: RoutedTokens | None, stored: torch.dtype) -> None:
    """Replace a live layer's experts by what a treatment makes of them; ``routed`` None: without calibration."""
    size = experts_at_once(layer)
    for first in range(0, layer.count, size):
        _slim_some_(layer, range(first, min(first + size, layer.count)), treatment, routed, stored)


@torch.no_grad()
def _slim_some_(layer: MoELayer, experts: range, treatment: Treatment, routed: RoutedTokens | None, stored: torch.dtype) -> None:
    gate_up_EOI, down_EOI = layer.stack("gate_up_proj", experts), layer.stack("down_proj", experts)
    device, solved = down_EOI.device, treatment.quantize != "rtn" and routed is not None
    statistic = routed.input_statistic(experts, Gram, device, weighted=False) if solved and routed is not None else None
    gate_up_EOI.copy_(slim_stack(gate_up_EOI.to(stored, copy=True), statistic, treatment).became_EOI)
    inner = routed.inner_statistic(experts, Gram, layer, device, weighted=False) if solved and routed is not None else None
    down_EOI.copy_(slim_stack(down_EOI.to(stored, copy=True), inner, treatment).became_EOI)


@contextmanager
def slimmed_linears(
    linears: Mapping[str, nn.Linear], treatment: Treatment, collected: Collected, stored: torch.dtype
) -> Generator[None]:
    """Let some of a live block's linear layers hold what a treatment makes of them."""
    before = {name: linear.weight.data for name, linear in linears.items()}
    try:
        slim_linears_(linears, treatment, collected, stored)
        yield
    finally:
        for name, linear in linears.items():
            linear.weight.data = before[name]


@torch.no_grad()
def slim_linears_(
    linears: Mapping[str, nn.Linear], treatment: Treatment, collected: Collected | None, stored: torch.dtype
) -> None:
    """Replace the weights of linear layers by what a treatment makes of them; ``collected`` None: without calibration."""
    for name, linear in linears.items():
        statistic = collected.linears[name] if treatment.quantize != "rtn" and collected is not None else None
        slimmed = slim_stack(linear.weight.data.to(stored, copy=True)[None], statistic, treatment)
        linear.weight.data = slimmed.became_EOI[0].to(linear.weight.dtype)
