"""Expert drop: keep the experts that a criterion values most.

With N tokens routed to an expert out of T, routing weight g as the model really multiplies it, p what the router thought of
the expert whether it chose it or not, and f the expert's output before the weight:

    routing_score   sum p / T             arXiv:2406.02500, section 4.1 (after SEER-MoE, arXiv:2404.05089)
    frequency       N / T                 the expert's usage
    expert_norm     sum |f|               EAN, as in arXiv:2510.13999
    reap            sum g |f| / N         REAP, arXiv:2510.13999, equation 9
    man             sum |f| / N           MAN, arXiv:2606.15716
    msan            sum |f|^2 / N         MSAN, arXiv:2606.15716
    aimer           -|w|_1 / (sqrt(n) |w|_2)  AIMER, arXiv:2603.18492: the peakier the weights, the more is kept; no tokens
    random          a seeded draw         what every criterion must beat

Two criteria value sets rather than experts: ``hope`` (``pairwise.py``) and ``reconstruction`` (``reconstruction.py``). Scores
come from the model's own choice of experts, so they hold for every kind of router.

With scope ``layer`` every MoE layer keeps equally many. With ``global`` one budget is shared: experts go in the order of their
score over their layer's mean, wherever they are, and a layer may lose all of them.

Shapes: E experts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compression.errors import ImpossibleStep
from compression.recipe import ExpertDrop
from compression.study import ExpertStatistics, Study
from compression.trimming import Cuts, Routing, by_group, pairwise, reconstruction, subsets
from compression.trimming.subsets import Round

Criterion = Callable[[ExpertStatistics], Tensor]


def routing_score(statistics: ExpertStatistics) -> Tensor:
    """Return the mean probability that the router gives each expert over all tokens [E]."""
    return statistics.total("probability") / statistics.tokens


def frequency(statistics: ExpertStatistics) -> Tensor:
    """Return the share of tokens routed to each expert [E]."""
    return statistics.total("count") / statistics.tokens


def expert_norm(statistics: ExpertStatistics) -> Tensor:
    """Return the sum of output norms over each expert's own tokens [E]."""
    return statistics.total("norm")


def reap(statistics: ExpertStatistics) -> Tensor:
    """Return the mean of routing weight times output norm over each expert's own tokens [E]; 0 without tokens."""
    return _per_token(statistics, "weighted_norm")


def man(statistics: ExpertStatistics) -> Tensor:
    """Return the mean output norm over each expert's own tokens [E]; 0 without tokens."""
    return _per_token(statistics, "norm")


def msan(statistics: ExpertStatistics) -> Tensor:
    """Return the mean squared output norm over each expert's own tokens [E]; 0 without tokens."""
    return _per_token(statistics, "square")


def aimer(statistics: ExpertStatistics) -> Tensor:
    """Return minus the mean magnitude of each expert's weights over their root mean square [E]."""
    return -statistics.absolute_E / (statistics.parameters * statistics.magnitude_E).sqrt()


def _per_token(statistics: ExpertStatistics, name: str) -> Tensor:
    return statistics.total(name) / statistics.total("count").clamp(min=1)


CRITERIA: dict[str, Criterion] = {
    "routing_score": routing_score,
    "frequency": frequency,
    "expert_norm": expert_norm,
    "reap": reap,
    "man": man,
    "msan": msan,
    "aimer": aimer,
}
"""The criteria that score experts one by one; the higher, the longer an expert stays."""


def choose(study: Study | None, step: ExpertDrop, cuts: Cuts, routing: Routing) -> Cuts:
    """Return the cuts with fewer experts: equally many in each MoE layer but those named, or as many in all, by its scope."""
    if step.scope == "global":
        return cuts.keeping(_globally(study, step, cuts, routing))
    assert step.experts_kept is not None, "the plan resolves fraction_dropped"
    usual, named = step.experts_kept, step.experts_kept_in
    return cuts.keeping(
        {block: _in_layer(study, step, block, kept, named.get(block, usual), routing) for block, kept in cuts.experts.items()}
    )


def score(study: Study | None, step: ExpertDrop, block: int, routing: Routing) -> Tensor:
    """Return what the criterion gives every expert of a block [E]; for criteria that value experts one by one."""
    if step.criterion == "random":
        generator = torch.Generator().manual_seed(step.seed * 2**16 + block)
        return torch.rand(routing.experts, generator=generator, dtype=torch.float64)
    return CRITERIA[step.criterion](_of(study, block))


def keep_highest(score_E: Tensor, among: Sequence[int], count: int, *, groups: int = 1) -> tuple[int, ...]:
    """Return the ``count`` best of the expert ids ``among``, ascending; ties keep the lowest id.

    Group-limited routers choose groups first, so every group must lose equally many.
    """
    kept: list[int] = []
    for members in by_group(among, score_E.shape[0], groups):
        order = torch.sort(score_E[members], descending=True, stable=True).indices[: count // groups]
        kept += [members[position] for position in order.tolist()]
    return tuple(sorted(kept))


def _in_layer(
    study: Study | None, step: ExpertDrop, block: int, among: tuple[int, ...], count: int, routing: Routing
) -> tuple[int, ...]:
    match step.criterion:
        case "hope":
            return subsets.best(pairwise.loss_of(_of(study, block)), among, count, routing)
        case "reconstruction":
            return subsets.best(reconstruction.loss_of(_of(study, block), routing.router), among, count, routing)
        case _:
            return keep_highest(score(study, step, block, routing), among, count, groups=routing.groups)


def _globally(study: Study | None, step: ExpertDrop, cuts: Cuts, routing: Routing) -> dict[int, tuple[int, ...]]:
    """Drop one expert of every group at a time, from whichever layer loses least by it, until the budget is met."""
    rounds = {block: _rounds(study, step, block, kept, routing) for block, kept in cuts.experts.items()}
    left = {block: set(kept) for block, kept in cuts.experts.items()}
    heap = [(layer[0].cost, block, 0) for block, layer in rounds.items() if layer]
    heapq.heapify(heap)
    dropped = step.dropped_of([len(kept) for kept in cuts.experts.values()], groups=routing.groups)
    for _ in range(dropped // routing.groups):
        if not heap:
            raise ImpossibleStep(
                f"expert_drop cannot drop {dropped} experts in all: every layer must keep what its router needs; keep more"
            )
        _, block, place = heapq.heappop(heap)
        left[block] -= set(rounds[block][place].experts)
        if place + 1 < len(rounds[block]):
            heapq.heappush(heap, (rounds[block][place + 1].cost, block, place + 1))
    return {block: tuple(sorted(kept)) for block, kept in left.items()}


def _rounds(study: Study | None, step: ExpertDrop, block: int, among: tuple[int, ...], routing: Routing) -> list[Round]:
    """Return the order in which a layer would lose its experts, one of every group in each round, and what each costs."""
    members = by_group(among, routing.experts, routing.groups)
    removable = min(len(group) for group in members) - routing.least_per_group
    if step.criterion == "hope":
        return _relative(subsets.rounds(pairwise.loss_of(_of(study, block)), among, removable, routing))
    if step.criterion == "reconstruction":
        least = -(-routing.top_k // routing.groups)
        removable = min(removable, min(len(group) for group in members) - least)
        return _relative(subsets.rounds(reconstruction.loss_of(_of(study, block), routing.router), among, removable, routing))
    score_E = score(study, step, block, routing)
    mean = abs(float(score_E[list(among)].mean())) or 1.0  # scores may be negative, and their order must not turn
    orders = [[group[place] for place in torch.sort(score_E[group], stable=True).indices.tolist()] for group in members]
    return [
        Round(sum(float(score_E[expert]) for expert in experts) / (mean * len(experts)), experts)
        for experts in list(zip(*orders, strict=False))[:removable]
    ]


def _relative(rounds: list[Round]) -> list[Round]:
    """Return the rounds with costs over their layer's mean, so that layers of large outputs do not count for more."""
    mean = sum(abs(going.cost) for going in rounds) / max(1, len(rounds)) or 1.0
    return [Round(going.cost / mean, going.experts) for going in rounds]


def _of(study: Study | None, block: int) -> ExpertStatistics:
    assert study is not None, "every criterion but random reads a study"
    return study.experts[block]
