"""GPTQ: quantize one input after the other and let the inputs still to come repair the damage.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323, in
the form without an inverse (Chee et al., arXiv:2307.13304, call it LDLQ and prove it the same): with the damped Gram
matrix factored as N^T D N, N unit lower triangular, input j is quantized as w_j + sum over k < j of N[j,k] (w_k - q_k).
Loud inputs go first, by a permutation that leaves no trace in the result, and scales are fixed beforehand: a Gram
matrix with nothing off its diagonal gives round-to-nearest, exactly.

A whole stack of experts is solved at once, in chunks that fit the free memory. Inside, a stack lies input-major, [E, I, O],
so that what is touched together is contiguous. Decision record 0009 has the measurements.

Shapes: E experts, O output features, I input features, G groups of inputs, B inputs of a base block.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from compression.slimming.grid import Grid, Quantized, dequantize, search_scales
from compression.slimming.hessian import damped_factors_

_BASE = 8
"""Inputs that hand their errors on one by one; above that, matrix products of doubling size do."""
_COLUMN_ON_CPU = 2**13
"""Numbers per operation (experts x outputs) beyond which more experts at once stop paying on a CPU."""
_SHARE_OF_FREE_MEMORY = 4


@torch.no_grad()
def quantize(
    weight_EOI: Tensor, gram_EII: Tensor, grid: Grid, *, damping: float = 0.01, scale_EOG: Tensor | None = None
) -> tuple[Quantized, Tensor]:
    """Return the quantized stack, and per expert the damping it took, as a multiple of the mean diagonal.

    An expert whose Gram matrix is zero, not finite, or not to be factored with a thousand times the damping is rounded to
    nearest, and its damping says ``inf``. The scales are those of round-to-nearest unless the caller brings some.
    """
    assert damping > 0, "without damping, the Gram matrix of few tokens cannot be factored"
    experts, outputs, inputs = weight_EOI.shape
    if scale_EOG is None:
        scale_EOG = search_scales(weight_EOI, grid)
    assert scale_EOG.shape == (experts, outputs, grid.groups(inputs)), f"scales have shape {tuple(scale_EOG.shape)}"
    codes_EOI = torch.empty_like(weight_EOI, dtype=torch.int8, memory_format=torch.contiguous_format)
    damping_E = torch.empty(experts, dtype=torch.float64)
    step = _experts_at_once(weight_EOI)
    workbench = _Workbench(step, outputs, inputs, device=weight_EOI.device)
    for start in range(0, experts, step):
        part = slice(start, start + step)
        damping_E[part] = workbench.solve(
            weight_EOI[part], gram_EII[part], scale_EOG[part], codes_EOI=codes_EOI[part], grid=grid, damping=damping
        )
    return Quantized(codes_EOI, scale_EOG), damping_E


@torch.no_grad()
def output_error(weight_EOI: Tensor, quantized: Quantized, gram_EII: Tensor) -> Tensor:
    """Return, per expert, the squared error of its outputs relative to their squared size, over the Gram matrix's tokens.

    Zero where there is no error: an expert without tokens has no output to get wrong. NaN if the Gram matrix is.
    """
    error_E = torch.zeros(weight_EOI.shape[0], dtype=torch.float64)
    for expert, gram_II in enumerate(gram_EII):
        weight_OI = weight_EOI[expert].float()
        stored_OI = dequantize(quantized.codes_EOI[expert], quantized.scale_EOG[expert])
        lost = _energy(weight_OI - stored_OI, gram_II)
        error_E[expert] = lost / _energy(weight_OI, gram_II) if lost != 0 else 0.0
    return error_E


def _energy(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    return (weight_OI @ gram_II.float()).mul_(weight_OI).sum(dtype=torch.float64)


def _experts_at_once(weight_EOI: Tensor) -> int:
    experts, outputs, inputs = weight_EOI.shape
    one_expert = 9 * outputs * inputs + 4 * inputs * inputs  # bytes: two float32 copies, int8 codes; the factor
    if weight_EOI.device.type == "cpu":
        free, enough = psutil.virtual_memory().available, -(-_COLUMN_ON_CPU // outputs)
    else:
        free, enough = torch.cuda.mem_get_info(weight_EOI.device)[0], experts
    return max(1, min(experts, enough, free // _SHARE_OF_FREE_MEMORY // one_expert))


class _Workbench:
    """The buffers of one chunk, made once: fresh ones of this size cost more than the arithmetic done in them."""

    def __init__(self, experts: int, outputs: int, inputs: int, *, device: torch.device) -> None:
        self._target_EIO = torch.empty(experts, inputs, outputs, device=device)
        self._error_EIO = torch.empty(experts, inputs, outputs, device=device)
        self._factor_EII = torch.empty(experts, inputs, inputs, device=device)
        self._codes_EIO = torch.empty(experts, inputs, outputs, device=device, dtype=torch.int8)

    def solve(
        self, weight_EOI: Tensor, gram_EII: Tensor, scale_EOG: Tensor, *, codes_EOI: Tensor, grid: Grid, damping: float
    ) -> Tensor:
        """Fill ``codes_EOI`` for one chunk; return the damping each expert took."""
        used = slice(weight_EOI.shape[0])
        target_EIO, error_EIO, factor_EII = self._target_EIO[used], self._error_EIO[used], self._factor_EII[used]
        order_EI = torch.argsort(gram_EII.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
        # One matrix at a time: transposing a stack in one operation is several times slower.
        for expert, order_I in enumerate(order_EI):
            torch.index_select(weight_EOI[expert].float().T.contiguous(), 0, order_I, out=target_EIO[expert])
        error_EIO.copy_(target_EIO)
        damping_E = damped_factors_(factor_EII, gram_EII, order_EI, damping=damping)
        group_EI = order_EI // (weight_EOI.shape[2] // scale_EOG.shape[2])
        codes_EIO, scale_EGO = self._codes_EIO[used], scale_EOG.mT.contiguous()
        _solve_(target_EIO, error_EIO, factor_EII, scale_EGO=scale_EGO, group_EI=group_EI, codes_EIO=codes_EIO, grid=grid)
        for expert, place_I in enumerate(torch.argsort(order_EI, dim=1)):
            codes_EOI[expert] = codes_EIO[expert].index_select(0, place_I).T
        return damping_E


def _solve_(
    target_EIO: Tensor,
    error_EIO: Tensor,
    factor_EII: Tensor,
    *,
    scale_EGO: Tensor,
    group_EI: Tensor,
    codes_EIO: Tensor,
    grid: Grid,
) -> None:
    # target: the weights, to which repairs are added. error: the weights before an input's turn, w - q after it.
    inputs, stored = target_EIO.shape[1], scale_EGO.dtype
    expert_E1 = torch.arange(len(group_EI), device=group_EI.device).unsqueeze(1)
    code_EO = torch.empty_like(target_EIO[:, 0])
    for start in range(0, inputs, _BASE):
        stop = min(start + _BASE, inputs)
        if start:
            # Every pair of inputs meets once: with start = odd x 2^m, the last 2^m repair the next 2^m.
            span = start & -start
            ahead, behind = slice(start, start + span), slice(start - span, start)
            target_EIO[:, ahead].baddbmm_(factor_EII[:, ahead, behind], error_EIO[:, behind])
        scale_EBO = scale_EGO[expert_E1, group_EI[:, start:stop]].float()
        for j in range(start, stop):
            scale_EO = scale_EBO[:, j - start]
            torch.div(target_EIO[:, j], scale_EO, out=code_EO)
            codes_EIO[:, j] = code_EO.round_().clamp_(grid.lowest, grid.highest)
            # q as a loader computes it, rounded to the stored dtype: with 8 bits in bf16, a sixth less output error.
            error_EIO[:, j].sub_(code_EO.mul_(scale_EO).to(stored))
            rest = slice(j + 1, stop)
            target_EIO[:, rest].addcmul_(factor_EII[:, rest, j, None], error_EIO[:, j, None])
