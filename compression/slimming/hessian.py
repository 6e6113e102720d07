"""What calibration leaves of every expert's inputs: their mean squares, or the whole Gram matrix, and its factor.

The Gram matrix, X^T X / tokens, is what second-order methods know of the data; its diagonal is all that first-order ones
need. With routing weights, each token's outer product counts by the weight its expert's output is multiplied with (Hu et
al., "MoEQuant", arXiv:2505.03804).

Half the Hessian of the squared output error with respect to one row of weights, hence the module's name in the
papers (Frantar et al., arXiv:2210.17323, section 2). Products and running sum are float32: a product of two bf16
numbers is exact there, and float64 would double both the time and the largest allocation of a run. For up to 65,536
tokens, however they are split, entry ij differs from float64's by at most 1.4e-6 of the root of entries ii and jj: four
orders below the damping. The mean is taken once, at the end.

The factor starts at the last input, gram = N^T D N with N unit lower triangular, so that row j of N says how the
errors of the inputs before j are repaired at j; no inverse is needed.

Shapes: E experts, I input features, T tokens, K experts chosen per token, S tokens of one expert, P inputs of a panel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_STRIPE = 128
"""Columns per product. X^T X is symmetric: each stripe stops at its diagonal block, which halves the work."""
_PANEL = 64
"""Inputs factored at once; the rest is matrix products. torch factors a stack matrix by matrix, up to 2.6 times slower."""
_TRIES = 4
"""Dampings tried, each ten times the one before, until an expert is given up."""


class Statistic(ABC):
    """What is known of the inputs of a stack of experts."""

    def __init__(self, experts: int) -> None:
        self.tokens_E = torch.zeros(experts, dtype=torch.int64)
        """Tokens each expert was shown; on the host."""
        self.moved_EI: Tensor | None = None
        """What the inputs were divided by, and the weights that read them multiplied with; None for nothing."""

    def update(self, x_TI: Tensor) -> None:
        """Show the tokens to the only expert of a stack of one."""
        assert self.tokens_E.numel() == 1, "a stack of experts needs add_rows"
        self.add_rows(0, x_TI)

    @abstractmethod
    def add_rows(self, expert: int, rows_SI: Tensor, weight_S: Tensor | None = None) -> None:
        """Show tokens to one expert, each counted ``weight_S`` times where given."""

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The statistic of each expert, zero where it saw no token."""

    @property
    @abstractmethod
    def mean_square_EI(self) -> Tensor:
        """The mean square of each input."""


class Gram(Statistic):
    """The mean outer product of each expert's inputs over all calibration tokens seen so far."""

    def __init__(self, experts: int, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__(experts)
        self._sum_EII = torch.zeros(experts, width, width, dtype=torch.float32, device=device)
        self._finished = False

    @torch.no_grad()
    def add_rows(self, expert: int, rows_SI: Tensor, weight_S: Tensor | None = None) -> None:
        """Show tokens to one expert, each counted ``weight_S`` times where given.

        Fewer, longer calls are faster: each one reads and writes the whole matrix.
        """
        assert not self._finished, "the mean has been taken; no more tokens can be shown"
        sum_II = self._sum_EII[expert]
        x_SI = _weighed(rows_SI.to(sum_II), weight_S)
        for start in range(0, sum_II.shape[0], _STRIPE):
            stop = start + _STRIPE
            sum_II[start:stop, :stop].addmm_(x_SI[:, start:stop].T, x_SI[:, :stop])
        self.tokens_E[expert] += x_SI.shape[0]

    @property
    def value(self) -> Tensor:
        """The means [E, I, I], exactly symmetric, zero where an expert saw no token. Taken in place: ends the counting."""
        if not self._finished:
            self._finished = True
            for sum_II, tokens in zip(self._sum_EII, self.tokens_E.tolist(), strict=True):
                if tokens:
                    _mirror_(sum_II.div_(tokens))
        return self._sum_EII

    @property
    def mean_square_EI(self) -> Tensor:
        """The mean square of each input; ends the counting, too."""
        return self.value.diagonal(dim1=1, dim2=2)

    def rescale_(self, factor_EI: Tensor) -> None:
        """Turn the statistic into that of inputs divided by ``factor_EI``; exact for powers of two."""
        self.value.div_(factor_EI[:, :, None]).div_(factor_EI[:, None])
        self.moved_EI = factor_EI if self.moved_EI is None else self.moved_EI * factor_EI


class InputNorm(Statistic):
    """The mean square of each input feature of each expert over all calibration tokens seen so far."""

    def __init__(self, experts: int, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__(experts)
        self._sum_EI = torch.zeros(experts, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add_rows(self, expert: int, rows_SI: Tensor, weight_S: Tensor | None = None) -> None:
        """Show tokens to one expert, each counted ``weight_S`` times where given."""
        self._sum_EI[expert] += _weighed(rows_SI.float(), weight_S).square().sum(dim=0, dtype=torch.float64)
        self.tokens_E[expert] += rows_SI.shape[0]

    @property
    def value(self) -> Tensor:
        """The means [E, I], zero where an expert saw no token."""
        return self._sum_EI / self.tokens_E.clamp(min=1).to(self._sum_EI.device)[:, None]

    @property
    def mean_square_EI(self) -> Tensor:
        """The same, by the name that both statistics have for it."""
        return self.value


def _weighed(x_SI: Tensor, weight_S: Tensor | None) -> Tensor:
    return x_SI if weight_S is None else x_SI * weight_S.to(x_SI).sqrt()[:, None]


@torch.no_grad()
def damped_factors_(factor_EII: Tensor, gram_EII: Tensor, order_EI: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """Fill ``factor_EII`` with N of each damped Gram matrix, its inputs in the order given.

    Below the diagonal, that is; the rest of it means nothing. Returns the damping used per expert, on the host, and the
    diagonal D [E, I]: what is left of an input's mean square once the inputs after it are known.

    ``damping`` is a multiple of the mean diagonal and rises for the experts that fail, for them alone. Where no damping
    helps, it is ``inf``, nothing is left below the diagonal, and D is one: no input repairs another, all are equal.
    """
    diagonal_EI = gram_EII.diagonal(dim1=1, dim2=2).float()
    mean_E = diagonal_EI.mean(dim=1)
    # An input that never fired touches nobody: any positive pivot will do. Where none fired, none is positive.
    pivot_EI = torch.where(diagonal_EI == 0, mean_E.unsqueeze(1), diagonal_EI).gather(1, order_EI)
    hopeful = ((mean_E > 0) & mean_E.isfinite()).tolist()
    used_E = torch.full(mean_E.shape, torch.inf, dtype=torch.float64)
    left_EI = torch.ones_like(diagonal_EI)
    stack_EII, todo = factor_EII, list(range(len(hopeful)))
    for power in range(_TRIES):
        multiple = damping * 10**power
        for place, expert in enumerate(todo):
            _permute_into_(stack_EII[place], gram_EII[expert], order_EI[expert])
            stack_EII[place].diagonal().copy_(pivot_EI[expert] + multiple * mean_E[expert])
        fine_E, squares_EI = _factor_(stack_EII)
        for place, fine in enumerate(fine_E.tolist()):
            if fine:
                used_E[todo[place]] = multiple
                left_EI[todo[place]] = squares_EI[place]
                if power:
                    factor_EII[todo[place]] = stack_EII[place]
        todo = [expert for expert in todo if used_E[expert].isinf() and hopeful[expert]]
        if not todo:
            break
        stack_EII = factor_EII.new_empty(len(todo), *factor_EII.shape[1:])
    for expert in used_E.isinf().nonzero().flatten().tolist():
        factor_EII[expert] = 0
    return used_E, left_EI


def _permute_into_(permuted_II: Tensor, gram_II: Tensor, order_I: Tensor) -> None:
    torch.index_select(gram_II.float().index_select(0, order_I), 1, order_I, out=permuted_II)


def _factor_(gram_EII: Tensor) -> tuple[Tensor, Tensor]:
    # In place, from the last panel of rows to the first; says which experts came out finite and positive, and D.
    inputs = gram_EII.shape[1]
    fine_E = torch.ones(gram_EII.shape[0], dtype=torch.bool, device=gram_EII.device)
    for start in reversed(range(0, inputs, _PANEL)):
        stop = min(start + _PANEL, inputs)
        panel_EPI = gram_EII[:, start:stop]
        if stop < inputs:
            below_EII = gram_EII[:, stop:]
            panel_EPI[:, :, :stop].baddbmm_(below_EII[:, :, start:stop].mT, below_EII[:, :, :stop], alpha=-1)
        # cholesky_ex never raises: one bad expert must not stop the others.
        flipped_EPP, info_E = torch.linalg.cholesky_ex(panel_EPI[:, :, start:stop].flip(1, 2))
        fine_E &= info_E == 0
        corner_EPP = flipped_EPP.flip(1, 2)
        if start:
            eye_PP = torch.eye(stop - start, device=gram_EII.device)
            inverse_EPP = torch.linalg.solve_triangular(corner_EPP, eye_PP.expand_as(corner_EPP), upper=True)
            panel_EPI[:, :, :start] = inverse_EPP @ panel_EPI[:, :, :start]
        panel_EPI[:, :, start:stop] = corner_EPP.mT
    root_EI = gram_EII.diagonal(dim1=1, dim2=2).clone()
    gram_EII /= root_EI.unsqueeze(2)
    # Not every library's cholesky_ex reports a NaN; wherever there is one, it has reached a pivot.
    return fine_E & root_EI.isfinite().all(dim=1), root_EI.square_()


def _mirror_(sum_II: Tensor) -> None:
    for start in range(0, sum_II.shape[0], _STRIPE):
        stop = start + _STRIPE
        sum_II[:start, start:stop] = sum_II[start:stop, :start].T
        corner = sum_II[start:stop, start:stop].tril()
        sum_II[start:stop, start:stop] = corner + corner.tril(-1).T
