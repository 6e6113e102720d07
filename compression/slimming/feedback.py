"""Error feedback: settle one input after the other and let the inputs still to come repair the damage.

What GPTQ and SparseGPT share (Frantar et al., arXiv:2210.17323 and arXiv:2301.00774), in the form without an inverse (Chee
et al., arXiv:2307.13304, call it LDLQ and prove it the same): with the damped Gram matrix factored as N^T D N, N unit
lower triangular, input j is settled from its target w_j + sum over k < j of N[j,k] (w_k - q_k), where q_k is what became
of input k. A Gram matrix with nothing off its diagonal repairs nothing.

A whole stack of experts is worked on at once, in chunks that fit the free memory. Inside, a stack lies input-major, [E, I, O],
so that what is touched together is contiguous. Decision record 0009 has the measurements.

Shapes: E experts, O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import psutil
import torch
from torch import Tensor

from compression.slimming.hessian import damped_factors_

BASE = 8
"""Inputs that hand their errors on one by one; above that, matrix products of doubling size do."""
_COLUMN_ON_CPU = 2**13
"""Numbers per operation (experts x outputs) beyond which more experts at once stop paying on a CPU."""
_SHARE_OF_FREE_MEMORY = 4


class Settle(Protocol):
    """What becomes of the inputs, in their turn."""

    def begin(self, start: int, stop: int) -> None:
        """Get ready for these inputs; all repairs of those before ``start`` have reached them."""
        ...

    def settle(self, index: int, target_EO: Tensor) -> Tensor:
        """Return what becomes of one input, given its repaired weights, which stay as they are."""
        ...


def chunks(weight_EOI: Tensor) -> Iterator[tuple[slice, Workbench]]:
    """Yield the experts to work on together, with buffers that fit them."""
    experts, outputs, inputs = weight_EOI.shape
    step = _experts_at_once(weight_EOI)
    buffers = Workbench(step, outputs, inputs, device=weight_EOI.device)
    for start in range(0, experts, step):
        yield slice(start, min(start + step, experts)), buffers


class Workbench:
    """The buffers of one chunk, made once: fresh ones of this size cost more than the arithmetic done in them."""

    def __init__(self, experts: int, outputs: int, inputs: int, *, device: torch.device) -> None:
        self._target_EIO = torch.empty(experts, inputs, outputs, device=device)
        self._rest_EIO = torch.empty(experts, inputs, outputs, device=device)
        self._factor_EII = torch.empty(experts, inputs, inputs, device=device)

    def lay_out(self, weight_EOI: Tensor, gram_EII: Tensor, order_EI: Tensor, *, damping: float) -> Feedback:
        """Return the chunk with its inputs in the order given, ready to be worked on; valid until the next one."""
        used = slice(weight_EOI.shape[0])
        target_EIO, rest_EIO, factor_EII = self._target_EIO[used], self._rest_EIO[used], self._factor_EII[used]
        # One matrix at a time: transposing a stack in one operation is several times slower.
        for expert, order_I in enumerate(order_EI):
            torch.index_select(weight_EOI[expert].float().T.contiguous(), 0, order_I, out=target_EIO[expert])
        rest_EIO.copy_(target_EIO)
        damping_E, left_EI = damped_factors_(factor_EII, gram_EII, order_EI, damping=damping)
        return Feedback(target_EIO, rest_EIO, factor_EII, left_EI, damping_E)


class Feedback:
    """One chunk of experts on its way from the first input to the last."""

    def __init__(self, target_EIO: Tensor, rest_EIO: Tensor, factor_EII: Tensor, left_EI: Tensor, damping_E: Tensor) -> None:
        self.target_EIO = target_EIO
        """The weights, to which repairs are added."""
        self.rest_EIO = rest_EIO
        """The weights before an input's turn, and what was lost of them, w - q, after it."""
        self.factor_EII = factor_EII
        self.left_EI = left_EI
        """What is left of an input's mean square once the inputs after it are known."""
        self.damping_E = damping_E
        """Multiple of the mean diagonal that was added; ``inf`` where nothing is repaired."""

    @torch.no_grad()
    def run(self, settle: Settle, *, base: int = BASE) -> None:
        """Settle every input in turn. ``base``: inputs that hand their errors on one by one."""
        target_EIO, rest_EIO, factor_EII = self.target_EIO, self.rest_EIO, self.factor_EII
        inputs = target_EIO.shape[1]
        for unit, start in enumerate(range(0, inputs, base)):
            stop = min(start + base, inputs)
            if unit:
                # Every pair of inputs meets once: with unit = odd x 2^n, the last 2^n units repair the next 2^n.
                span = (unit & -unit) * base
                ahead, behind = slice(start, start + span), slice(start - span, start)
                target_EIO[:, ahead].baddbmm_(factor_EII[:, ahead, behind], rest_EIO[:, behind])
            settle.begin(start, stop)
            for j in range(start, stop):
                rest_EIO[:, j].sub_(settle.settle(j, target_EIO[:, j]))
                later = slice(j + 1, stop)
                target_EIO[:, later].addcmul_(factor_EII[:, later, j, None], rest_EIO[:, j, None])

    def best_EIO(self, start: int, stop: int) -> Tensor:
        """Return the weights [E, stop - start, O] that would repair the damage so far best, if none came after it.

        A target repairs for one input at a time; here these inputs share the work, as GPTQ's updated weights do.
        """
        inside = slice(start, stop)
        rest_EIO = self.rest_EIO[:, inside]
        repair_EIO = self.target_EIO[:, inside] - rest_EIO
        corner_EII = self.factor_EII[:, inside, inside]
        return rest_EIO + torch.linalg.solve_triangular(corner_EII, repair_EIO, upper=False, unitriangular=True)


def _experts_at_once(weight_EOI: Tensor) -> int:
    experts, outputs, inputs = weight_EOI.shape
    one_expert = 9 * outputs * inputs + 4 * inputs * inputs  # bytes: two float32 copies and codes; the factor
    if weight_EOI.device.type == "cpu":
        free, enough = psutil.virtual_memory().available, -(-_COLUMN_ON_CPU // outputs)
    else:
        free, enough = torch.cuda.mem_get_info(weight_EOI.device)[0], experts
    return max(1, min(experts, enough, free // _SHARE_OF_FREE_MEMORY // one_expert))
