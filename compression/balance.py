"""AWQ's scales through one block: out of a norm, into everything that reads it; out of ``up_proj``, into ``down_proj``.

The block computes what it did, bit for bit, because scales are powers of two: ``slimming/awq.py`` says why, and chooses.

Shapes: E experts, O outputs, I inputs, D width, F expert width, A exponents tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from compression.architectures import Architecture, Component
from compression.collect import Collected, experts_at_once
from compression.moe import MoELayer, moe_layer
from compression.slimming.awq import best_exponents, input_scales, losses
from compression.slimming.grid import AnyGrid, dequantize
from compression.slimming.hessian import Gram, Statistic
from compression.stacks import LEAST, Slimmed, Treatment


@torch.no_grad()
def balance_block_(
    saved: dict[str, Tensor],
    block: nn.Module,
    collected: Collected,
    architecture: Architecture,
    index: int,
    treatment_of: Callable[[Component], Treatment | None],
) -> None:
    """Move a scale from each norm into its readers, in ``saved``, the live experts and the statistics alike."""
    work = _Balancing(saved, collected, architecture, architecture.prefix(index), treatment_of)
    for norm, readers in architecture.attention_norms:
        work.balance_(norm, [f"self_attn.{reader}" for reader in readers], None)
    layer = moe_layer(architecture, block)
    if layer is None:
        work.balance_(architecture.feed_forward_norm, ["mlp.gate_proj", "mlp.up_proj"], None)
    else:
        shared = [f"{architecture.moe}.{module}" for module in architecture.shared_experts]
        readers = [name for module in shared for name in (module, f"{module}.gate_proj", f"{module}.up_proj")]
        work.balance_(architecture.feed_forward_norm, [f"{architecture.moe}.{architecture.router}", *readers], layer)


@torch.no_grad()
def balance_down(
    weight_EOI: Tensor, statistic: Statistic, treatment: Treatment, up: Slimmed, rows: slice = slice(None)
) -> Tensor:
    """Return ``down_proj`` with each input scaled, and take the scale out of the already quantized ``up_proj``.

    ``rows``: where ``up_proj`` lies in ``up``. Every expert has scales of its own; one that saw too few tokens, none.
    """
    assert treatment.grid is not None
    assert isinstance(statistic, Gram)
    assert up.quantized is not None
    mean_square_EI = statistic.mean_square_EI
    exponents = best_exponents(losses(weight_EOI, statistic.value, mean_square_EI, treatment.grid))
    starved = (statistic.tokens_E < LEAST * weight_EOI.shape[2]).tolist()
    factor_EF = torch.cat(
        [
            input_scales(mean_square_EI[expert, None], 0.0 if few else exponent)
            for expert, (exponent, few) in enumerate(zip(exponents, starved, strict=True))
        ]
    )
    scale_EOG = up.quantized.scale_EOG[:, rows]
    zeros_EOG = (up.became_EOI[:, rows].unflatten(2, (scale_EOG.shape[2], -1)) == 0).all(dim=3)
    # No scale may become subnormal, which half precision rounds and some kernels flush. That of a group of zeros is the
    # smallest normal number, means nothing, and stays.
    room_EF = scale_EOG.double().masked_fill(zeros_EOG, torch.inf).amin(dim=2) / torch.finfo(scale_EOG.dtype).tiny
    factor_EF = factor_EF.minimum(room_EF.log2().floor().exp2().float())
    statistic.rescale_(factor_EF)
    scale_EOG /= torch.where(zeros_EOG, 1.0, factor_EF[:, :, None]).to(scale_EOG)
    up.became_EOI[:, rows] = dequantize(up.quantized.codes_EOI[:, rows], scale_EOG)
    up.weight_EOI[:, rows] /= factor_EF[:, :, None].to(up.weight_EOI)
    return weight_EOI * factor_EF[:, None].to(weight_EOI)


class _Balancing:
    def __init__(
        self,
        saved: dict[str, Tensor],
        collected: Collected,
        architecture: Architecture,
        prefix: str,
        treatment_of: Callable[[Component], Treatment | None],
    ) -> None:
        self.saved, self.collected, self.architecture = saved, collected, architecture
        self.prefix, self.treatment_of = prefix, treatment_of

    def balance_(self, norm: str, readers: Iterable[str], layer: MoELayer | None) -> None:
        """Choose one scale for the readers of a norm that the block has, and move it from the norm into all of them."""
        names = [name for name in (f"{self.prefix}{reader}" for reader in readers) if f"{name}.weight" in self.saved]
        calibrated = {name: self.collected.linears[name] for name in names if name in self.collected.linears}
        if not calibrated and layer is None:
            return
        mean_square_I = self._mean_square(calibrated, layer)
        losses_A = list(self._losses(calibrated, layer, mean_square_I))
        if not losses_A:  # none of its readers is rounded in this block
            return
        loss_A = sum(losses_A[1:], start=losses_A[0])
        factor_I = input_scales(mean_square_I[None], best_exponents(loss_A[:, None])[0])[0]
        for part in ("weight", "bias"):
            if f"{self.prefix}{norm}.{part}" in self.saved:
                self._scale_(f"{self.prefix}{norm}.{part}", 1 / factor_I)
        for name in names:
            self._scale_(f"{name}.weight", factor_I)
        for statistic in {id(statistic): statistic for statistic in calibrated.values()}.values():
            assert isinstance(statistic, Gram)  # which AWQ asks for
            statistic.rescale_(factor_I[None])
        if layer is not None:
            self._scale_experts_(layer, factor_I)

    def _mean_square(self, calibrated: dict[str, Statistic], layer: MoELayer | None) -> Tensor:
        if layer is None:
            return next(iter(calibrated.values())).mean_square_EI[0]
        assert self.collected.routed is not None
        mean_square_D = self.collected.routed.x_TD.float().square().mean(dim=0, dtype=torch.float64)
        return mean_square_D.float().to(layer.experts.down_proj.device)

    def _losses(self, calibrated: dict[str, Statistic], layer: MoELayer | None, mean_square_I: Tensor) -> Iterator[Tensor]:
        """Yield, for every stack that reads the norm, the loss at each exponent [A], summed over tokens."""
        for name, statistic in calibrated.items():
            treatment = self.treatment_of(self.architecture.component_of(f"{name}.weight"))
            assert treatment is not None
            if treatment.grid is None:  # pruned and kept: it gets the scale and has no say in it
                continue
            weight_EOI = self.saved[f"{name}.weight"].to(mean_square_I.device)[None]
            yield _summed(weight_EOI, statistic, mean_square_I, treatment.grid)
        experts = self.treatment_of("experts")
        if layer is None or experts is None or experts.grid is None:
            return
        assert self.collected.routed is not None
        size = experts_at_once(layer)
        for first in range(0, layer.count, size):
            chunk = range(first, min(first + size, layer.count))
            statistic = self.collected.routed.input_statistic(chunk, Gram, mean_square_I.device, weighted=False)
            stored = self.saved[f"{self.prefix}{self.architecture.feed_forward_norm}.weight"].dtype
            yield _summed(layer.stack("gate_up_proj", chunk).to(stored), statistic, mean_square_I, experts.grid)

    def _scale_experts_(self, layer: MoELayer, factor_D: Tensor) -> None:
        layer.stack("gate_up_proj", range(layer.count)).mul_(factor_D)
        assert self.collected.routed is not None
        self.collected.routed.rescale_(factor_D)
        gate, up, _ = self.architecture.gate_up_down
        for expert in range(layer.count):
            for matrix in (gate, up):
                self._scale_(f"{self.prefix}{self.architecture.moe}.experts.{expert}.{matrix}.weight", factor_D)

    def _scale_(self, name: str, factor_I: Tensor) -> None:
        self.saved[name] = self.saved[name] * factor_I.to(self.saved[name])


def _summed(weight_EOI: Tensor, statistic: Statistic, mean_square_I: Tensor, grid: AnyGrid) -> Tensor:
    loss_AE = losses(weight_EOI, statistic.value, mean_square_I.expand(weight_EOI.shape[0], -1), grid)
    return (loss_AE * statistic.tokens_E.to(loss_AE)).sum(dim=1)
