"""RTN: round every weight to the nearest point of its grid. Needs no calibration; what every other method must beat.

Shapes: E experts, O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

from compression.slimming.grid import AnyGrid, Quantized, quantize, search_scales


def round_to_nearest(weight_EOI: Tensor, grid: AnyGrid) -> Quantized:
    """Return the stack rounded to the grid whose scales lose least on the weights themselves."""
    scale_EOG = search_scales(weight_EOI, grid)
    return Quantized(quantize(weight_EOI, scale_EOG, grid), scale_EOG)
