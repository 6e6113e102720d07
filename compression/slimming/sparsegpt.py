"""SparseGPT: drop the weights that cost least to lose, input after input, and let the inputs still to come repair the damage.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv:2301.00774;
``feedback.py`` has the mechanism. Losing a weight costs its square times what is left of its input's mean square once the
inputs after it are known, D (1 / D is what the paper reads off the inverse's factor). Which weights go is decided a
block of inputs at a time, from the weights as they are repaired by then: unstructured, 128 inputs of all outputs
are compared; with a pattern, each group of m.

Shapes: E experts, O output features, I input features, B inputs decided on together, C weights compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.slimming.feedback import BASE, Feedback, chunks
from compression.slimming.masks import NOfM, Pattern, Unstructured, keep_largest

COMPARED = 128
"""Inputs whose weights are compared with one another when no pattern says which."""


@torch.no_grad()
def prune(weight_EOI: Tensor, gram_EII: Tensor, pattern: Pattern, *, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return the pruned and repaired stack, and per expert the damping it took, as a multiple of the mean diagonal.

    An expert whose Gram matrix is of no use is pruned by magnitude, over the same comparisons, and its damping says ``inf``.
    """
    pruned_EOI = torch.empty_like(weight_EOI)
    damping_E = torch.empty(weight_EOI.shape[0], dtype=torch.float64)
    inputs = weight_EOI.shape[2]
    for part, workbench in chunks(weight_EOI):
        # Groups of m are consecutive inputs, so inputs keep their order.
        order_EI = torch.arange(inputs, device=weight_EOI.device).expand(weight_EOI[part].shape[0], -1)
        feedback = workbench.lay_out(weight_EOI[part], gram_EII[part], order_EI, damping=damping)
        unheard_EI = (gram_EII[part].diagonal(dim1=1, dim2=2) == 0) & feedback.damping_E.isfinite().to(order_EI.device)[:, None]
        feedback.left_EI[unheard_EI] = 0  # nothing is lost with an input that never fires
        dropping = _Dropping(feedback, pattern, weight_EOI[part])
        feedback.run(dropping, base=dropping.base)
        dropping.write_(pruned_EOI[part])
        damping_E[part] = feedback.damping_E
    return pruned_EOI, damping_E


class _Dropping:
    def __init__(self, feedback: Feedback, pattern: Pattern, weight_EOI: Tensor) -> None:
        self._feedback, self._pattern, self._stored = feedback, pattern, weight_EOI.dtype
        self._decided = pattern.m if isinstance(pattern, NOfM) else COMPARED
        self.base = pattern.m * -(-BASE // pattern.m) if isinstance(pattern, NOfM) else BASE
        self._pruned_EIO = torch.empty_like(feedback.target_EIO, dtype=weight_EOI.dtype)

    def begin(self, start: int, stop: int) -> None:
        """Nothing: what goes is decided when the first input of a group has its turn."""

    def settle(self, index: int, target_EO: Tensor) -> Tensor:
        if index % self._decided == 0:
            self._decide(index, min(index + self._decided, self._pruned_EIO.shape[1]))
        # As it will be stored: the rounding of a repaired weight is repaired too.
        self._pruned_EIO[:, index] = target_EO.where(self._kept_EBO[:, index % self._decided], 0)
        return self._pruned_EIO[:, index]

    def _decide(self, start: int, stop: int) -> None:
        score_EBO = self._feedback.best_EIO(start, stop).square_().mul_(self._feedback.left_EI[:, start:stop, None])
        if isinstance(self._pattern, Unstructured):
            self._kept_EBO = keep_largest(score_EBO.flatten(1), self._pattern).view(score_EBO.shape)
        else:
            self._kept_EBO = keep_largest(score_EBO.mT, self._pattern).mT

    def write_(self, pruned_EOI: Tensor) -> None:
        for expert, pruned_IO in enumerate(self._pruned_EIO):
            pruned_EOI[expert] = pruned_IO.T
