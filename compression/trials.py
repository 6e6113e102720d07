"""What settings of slimming would do to every matrix of a block: errors measured on calibration tokens, nothing changed.

Each matrix is rounded to nearest, or pruned by Wanda, at each setting; its error is that of its outputs on the tokens it is
fed, tr(dW G dW^T) with the Gram matrix G of its inputs. Methods with error feedback do better than this; how much better is
the planner's business. At most 128 evenly spaced outputs of a matrix are looked at.

Shapes: E experts, O outputs, R outputs that are looked at, I inputs, D width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compression.architectures import Architecture
from compression.collect import collect, experts_at_once
from compression.moe import MoELayer, moe_layer
from compression.slimming import rtn, wanda
from compression.slimming.damage import energy, sample
from compression.slimming.grid import AnyGrid, FloatGrid, Grid, dequantize
from compression.slimming.hessian import Gram, Statistic
from compression.slimming.masks import NOfM, Pattern, Unstructured
from compression.study import Trials
from compression.sweep import Stream

_BITS = {"W8A16": 8, "W4A16": 4, "W3A16": 3, "W2A16": 2}
_GROUP_SIZES = (128, 64, 32)
_PATTERNS: dict[str, Pattern] = {"wanda 50 %": Unstructured(0.5), "wanda 4:8": NOfM(4, 8), "wanda 2:4": NOfM(2, 4)}
SETTINGS: tuple[str, ...] = (*_BITS, "FP8_DYNAMIC", *_PATTERNS)


@torch.no_grad()
def trial_errors(index: int, block: nn.Module, stream: Stream, architecture: Architecture) -> Trials:
    """Return what each setting would cost each matrix of a live block; the stream stays before it."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    collected = collect(index, block, stream, linears, new=Gram, architecture=architecture, advance=False)
    trials = Trials(SETTINGS, {}, {})
    for name, statistic in collected.linears.items():
        _try(trials, name, linears[name].weight[None], statistic)
    layer = moe_layer(architecture, block)
    if layer is not None:
        assert collected.routed is not None
        device = layer.experts.down_proj.device
        for experts in _chunks(layer):
            gate_up = collected.routed.input_statistic(experts, Gram, device, weighted=False)
            _try(trials, "experts.*.gate_up_proj", layer.stack("gate_up_proj", experts), gate_up)
            down = collected.routed.inner_statistic(experts, Gram, layer, device, weighted=False)
            _try(trials, "experts.*.down_proj", layer.stack("down_proj", experts), down)
    return trials


def _chunks(layer: MoELayer) -> Iterator[range]:
    size = experts_at_once(layer)
    yield from (range(first, min(first + size, layer.count)) for first in range(0, layer.count, size))


def _try(trials: Trials, name: str, weight_EOI: Tensor, statistic: Statistic) -> None:
    weight_ERI, scale = sample(weight_EOI), weight_EOI.shape[1] / sample(weight_EOI).shape[1]
    right_ERI, gram_EII = weight_ERI.float(), statistic.value
    errors = [energy(right_ERI - became_ERI.float(), gram_EII) for became_ERI in _became(weight_ERI, statistic)]
    found = {"error": torch.stack(errors).cpu() * scale, "energy": energy(right_ERI, gram_EII).cpu() * scale}
    for kind, value in found.items():
        known = getattr(trials, kind)
        known[name] = torch.cat([known[name], value], dim=-1) if name in known else value


def _became(weight_ERI: Tensor, statistic: Statistic) -> Iterator[Tensor]:
    """Yield the weights as each setting would leave them, in the order of SETTINGS."""
    inputs = weight_ERI.shape[2]
    group_size = next((size for size in _GROUP_SIZES if inputs % size == 0), -1)
    grids: list[AnyGrid] = [*(Grid(bits, group_size) for bits in _BITS.values()), FloatGrid()]
    for grid in grids:
        rounded = rtn.round_to_nearest(weight_ERI, grid)
        yield dequantize(rounded.codes_EOI, rounded.scale_EOG)
    for pattern in _PATTERNS.values():
        length = pattern.m if isinstance(pattern, NOfM) else 1
        # Where a pattern does not fill the row it cannot be had; the weights stay, and the error of a setting is zero only then.
        yield wanda.prune(weight_ERI, statistic.mean_square_EI, pattern) if inputs % length == 0 else weight_ERI
