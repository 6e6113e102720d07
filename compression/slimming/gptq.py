"""GPTQ: quantize one input after the other and let the inputs still to come repair the damage.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323;
``feedback.py`` has the mechanism. Loud inputs go first, by a permutation that leaves no trace in the result, and scales
are fixed beforehand, so that equally loud inputs which never go together are rounded to nearest, exactly.

What an error costs is D, the mean square of an input that those after it cannot stand in for, and the scales are those of least
squared error in that currency: decision record 0014.

Shapes: E experts, O output features, I input features, G groups of inputs, B inputs of a base block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.slimming.feedback import chunks
from compression.slimming.grid import AnyGrid, Quantized, search_scales


@torch.no_grad()
def quantize(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    grid: AnyGrid,
    *,
    damping: float = 0.01,
    scale_EOG: Tensor | None = None,
    kept_EOI: Tensor | None = None,
) -> tuple[Quantized, Tensor]:
    """Return the quantized stack, and per expert the damping it took, as a multiple of the mean diagonal.

    An expert whose Gram matrix is zero, not finite, or not to be factored with a thousand times the damping is rounded to
    nearest, and its damping says ``inf``. The scales are searched unless the caller brings some. ``kept_EOI``: true where a
    weight may be other than zero.
    """
    assert damping > 0, "without damping, the Gram matrix of few tokens cannot be factored"
    experts, outputs, inputs = weight_EOI.shape
    searched = scale_EOG is None
    if scale_EOG is None:
        scale_EOG = weight_EOI.new_empty(experts, outputs, grid.groups(inputs))
    assert scale_EOG.shape == (experts, outputs, grid.groups(inputs)), f"scales have shape {tuple(scale_EOG.shape)}"
    codes_EOI = torch.empty_like(weight_EOI, dtype=grid.code_dtype, memory_format=torch.contiguous_format)
    damping_E = torch.empty(experts, dtype=torch.float64)
    for part, workbench in chunks(weight_EOI):
        order_EI = torch.argsort(gram_EII[part].diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
        feedback = workbench.lay_out(weight_EOI[part], gram_EII[part], order_EI, damping=damping)
        if searched:
            importance_EI = torch.empty_like(feedback.left_EI).scatter_(1, order_EI, feedback.left_EI)
            scale_EOG[part] = search_scales(weight_EOI[part], grid, importance_EI)
        rounding = _Rounding(grid, scale_EOG[part], order_EI, None if kept_EOI is None else kept_EOI[part])
        feedback.run(rounding)
        rounding.write_(codes_EOI[part])
        damping_E[part] = feedback.damping_E
    return Quantized(codes_EOI, scale_EOG), damping_E


class _Rounding:
    def __init__(self, grid: AnyGrid, scale_EOG: Tensor, order_EI: Tensor, kept_EOI: Tensor | None) -> None:
        experts, outputs, groups = scale_EOG.shape
        inputs = order_EI.shape[1]
        self._grid, self._order_EI, self._stored = grid, order_EI, scale_EOG.dtype
        self._scale_EGO = scale_EOG.mT.contiguous()
        self._group_EI = order_EI // (inputs // groups)
        self._kept_EOI = kept_EOI
        self._expert_E1 = torch.arange(experts, device=order_EI.device).unsqueeze(1)
        self._codes_EIO = scale_EOG.new_empty(experts, inputs, outputs, dtype=grid.code_dtype)
        self._code_EO = scale_EOG.new_empty(experts, outputs, dtype=torch.float32)

    def begin(self, start: int, stop: int) -> None:
        self._start = start
        self._scale_EBO = self._scale_EGO[self._expert_E1, self._group_EI[:, start:stop]].float()
        if self._kept_EOI is not None:
            self._kept_EBO = self._kept_EOI.mT[self._expert_E1, self._order_EI[:, start:stop]]

    def settle(self, index: int, target_EO: Tensor) -> Tensor:
        code_EO, scale_EO = self._code_EO, self._scale_EBO[:, index - self._start]
        self._grid.snap_(torch.div(target_EO, scale_EO, out=code_EO))
        if self._kept_EOI is not None:
            code_EO.mul_(self._kept_EBO[:, index - self._start])
        self._codes_EIO[:, index] = code_EO
        # As a loader computes it, rounded to the stored dtype: with 8 bits in bf16, a sixth less output error.
        return code_EO.mul_(scale_EO).to(self._stored)

    def write_(self, codes_EOI: Tensor) -> None:
        for expert, place_I in enumerate(torch.argsort(self._order_EI, dim=1)):
            codes_EOI[expert] = self._codes_EIO[expert].index_select(0, place_I).T
