"""AWQ: before rounding, make the weights of loud inputs larger and those inputs smaller by the same factor.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978, section 3.2.
What a norm scales down, everything that reads it must scale up: in a mixture that is the router, every expert and
the shared expert, so one scale is chosen for all of them together. The scale of an expert's ``down_proj`` is its own,
and is taken out of the rows of ``up_proj``, whose product with the gate it passes through unchanged.

Scales are powers of two. Moving one from a weight to an input then changes exponents alone: the model before rounding
is, bit for bit, the one that came in, router included, and so is an already quantized ``up_proj``. Decision record 0014
has what that costs.

Shapes: A exponents tried, E experts, O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.slimming.damage import energy, sample
from compression.slimming.grid import AnyGrid, Quantized, dequantize, quantize, search_scales

EXPONENTS = tuple(step / 10 for step in range(11))
"""Powers of an input's loudness that are tried: 0 is rounding as it is, 1 makes all inputs equally loud."""
_WIDEST = 6
"""Binary orders of magnitude that an input may be moved by, either way: half precision has few."""


@torch.no_grad()
def input_scales(mean_square_EI: Tensor, exponent: float) -> Tensor:
    """Return the factor for the weights of every input [E, I], a power of two; one for inputs that never fire."""
    heard_EI = mean_square_EI > 0
    order_EI = torch.where(heard_EI, mean_square_EI, 1.0).double().log2().div(2)
    middle_E1 = (order_EI * heard_EI).sum(dim=1, keepdim=True) / heard_EI.sum(dim=1, keepdim=True).clamp(min=1)
    moved_EI = ((order_EI - middle_E1) * heard_EI * exponent).round().clamp(-_WIDEST, _WIDEST)
    return torch.exp2(moved_EI).float()


@torch.no_grad()
def losses(weight_EOI: Tensor, gram_EII: Tensor, mean_square_EI: Tensor, grid: AnyGrid) -> Tensor:
    """Return, for each of ``EXPONENTS``, the squared output error [A, E] that rounding leaves, as a mean over tokens.

    ``mean_square_EI`` is what the scales are made of: each expert's own inputs, or for all the same. At most 128 outputs
    of every expert are looked at.
    """
    weight_ERI, own_EI = sample(weight_EOI), gram_EII.diagonal(dim1=1, dim2=2)
    found: list[Tensor] = []
    for exponent in EXPONENTS:
        factor_EI = input_scales(mean_square_EI, exponent)
        loud = round_weighted(weight_ERI * factor_EI[:, None].to(weight_ERI), own_EI / factor_EI.square(), grid)
        became_ERI = dequantize(loud.codes_EOI, loud.scale_EOG).float() / factor_EI[:, None]
        found.append(energy(weight_ERI.float() - became_ERI, gram_EII))
    return torch.stack(found)


@torch.no_grad()
def round_weighted(weight_EOI: Tensor, mean_square_EI: Tensor, grid: AnyGrid) -> Quantized:
    """Return the stack rounded to nearest, with the scales of least squared error where inputs count by their loudness.

    An expert whose inputs never fired gets those of rounding without calibration.
    """
    silent_E1 = mean_square_EI.sum(dim=1, keepdim=True) == 0
    scale_EOG = search_scales(weight_EOI, grid, torch.where(silent_E1, 1.0, mean_square_EI))
    return Quantized(quantize(weight_EOI, scale_EOG, grid), scale_EOG)


def best_exponents(loss_AE: Tensor) -> list[float]:
    """Return the exponent of least loss for each expert; the smallest of equals."""
    return [EXPONENTS[index] for index in loss_AE.argmin(dim=0).tolist()]
