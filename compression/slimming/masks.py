"""Which weights stay: the highest scores, by a share of all that are compared or n in every m consecutive inputs.

A mask is true where the weight stays. What is compared with what is the caller's choice, by the last dimension it passes.

Shapes: C weights compared with one another, M weights of a group; any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any ``sparsity`` of the weights may go, wherever they lie."""

    sparsity: float

    def __post_init__(self) -> None:
        assert 0 <= self.sparsity < 1, f"a sparsity of {self.sparsity} keeps nothing"


@dataclass(frozen=True, slots=True)
class NOfM:
    """At most ``n`` non-zero weights in every ``m`` consecutive inputs."""

    n: int
    m: int

    def __post_init__(self) -> None:
        assert 0 < self.n < self.m, f"{self.n}:{self.m} is no pattern"


Pattern = Unstructured | NOfM


def keep_largest(score_C: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask of what the pattern lets stay, compared along the last dimension; ties keep the lowest index."""
    match pattern:
        case Unstructured(sparsity):
            compared = score_C.shape[-1]
            return largest(score_C, compared - round(sparsity * compared))
        case NOfM(n, m):
            assert score_C.shape[-1] % m == 0, f"groups of {m} do not divide {score_C.shape[-1]} inputs"
            return largest(score_C.unflatten(-1, (-1, m)), n).flatten(-2)


def largest(score_C: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` highest scores along the last dimension; ties keep the lowest index."""
    order_C = torch.sort(score_C, dim=-1, descending=True, stable=True).indices
    kept_C = torch.zeros_like(score_C, dtype=torch.bool)
    return kept_C.scatter_(-1, order_C[..., :count], True)
