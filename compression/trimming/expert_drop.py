"""Expert drop: keep the experts that a criterion scores highest, the same number in every MoE layer.

With N tokens routed to an expert out of T, routing weight g as the model really multiplies it, and f(x) the
expert's output before that weight:

    routing_score  sum g / T          arXiv:2406.02500, section 4.1 (after SEER-MoE, arXiv:2404.05089)
    frequency      N / T              the expert's usage
    reap           sum g |f(x)| / N   REAP, arXiv:2510.13999, equation 9

Scores come from the model's own choice of experts, so they hold for every kind of router.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compression.recipe import ExpertDrop
from compression.study import ExpertStatistics, Study
from compression.trimming import Cuts

Criterion = Callable[[ExpertStatistics], Tensor]


def routing_score(statistics: ExpertStatistics) -> Tensor:
    """Return the mean routing weight of each expert over all tokens [E]."""
    return statistics.weight_E / statistics.tokens


def frequency(statistics: ExpertStatistics) -> Tensor:
    """Return the share of tokens routed to each expert [E]."""
    return statistics.count_E / statistics.tokens


def reap(statistics: ExpertStatistics) -> Tensor:
    """Return the mean of routing weight times output norm over each expert's own tokens [E]; 0 without tokens."""
    return statistics.weighted_norm_E / statistics.count_E.clamp(min=1)


CRITERIA: dict[str, Criterion] = {"routing_score": routing_score, "frequency": frequency, "reap": reap}


def choose(study: Study, step: ExpertDrop, cuts: Cuts, groups: int) -> Cuts:
    """Return the cuts with ``experts_kept`` experts in every MoE layer, equally many from each of ``groups``."""
    assert step.experts_kept is not None, "the plan resolves fraction_dropped"
    score = CRITERIA[step.criterion]
    experts = {
        block: keep_highest(score(study.experts[block]), kept, step.experts_kept, groups=groups)
        for block, kept in cuts.experts.items()
    }
    return Cuts(cuts.blocks, experts)


def keep_highest(score_E: Tensor, among: tuple[int, ...], count: int, *, groups: int = 1) -> tuple[int, ...]:
    """Return the ``count`` best of the expert ids ``among``, ascending; ties keep the lowest id.

    Group-limited routers choose groups first, so every group must lose equally many.
    """
    per_group = score_E.shape[0] // groups
    kept: list[int] = []
    for group in range(groups):
        members = [expert for expert in among if expert // per_group == group]
        order = torch.sort(score_E[members], descending=True, stable=True).indices[: count // groups]
        kept += [members[position] for position in order.tolist()]
    return tuple(sorted(kept))
