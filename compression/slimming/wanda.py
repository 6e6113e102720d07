"""Wanda: drop the weights whose product with a typical input is smallest.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695, section 3. Needs the
norm of every input feature and nothing of how they go together. Rows are compared with themselves only, so that
every output feature keeps as many inputs.

Shapes: E experts, O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.slimming.masks import Pattern, keep_largest


@torch.no_grad()
def prune(weight_EOI: Tensor, mean_square_EI: Tensor, pattern: Pattern) -> Tensor:
    """Return the stack with its least important weights at zero.

    ``mean_square_EI``: mean square of every input feature over the expert's tokens. An expert that saw none is pruned
    by magnitude, row by row.
    """
    seen_E1 = (mean_square_EI.sum(dim=1, keepdim=True) > 0).expand_as(mean_square_EI)
    loudness_EI = torch.where(seen_E1, mean_square_EI.float(), 1.0).sqrt()
    return weight_EOI.where(keep_largest(weight_EOI.float().abs() * loudness_EI[:, None], pattern), 0)
