"""Expert merge: the experts that go are folded into those that stay.

REAM, "Merging Improves Pruning of Experts in LLMs", arXiv:2604.04356. The experts of the highest REAP score stay as centroids,
and the router keeps their rows alone. Every other expert joins the centroid that answers most like it; then each group becomes
the mean of its experts, weighed by their REAP scores, after every member's neurons are put in the order of the centroid's.

Of the paper's choices two are made otherwise here, see decision record 0019: experts join in the order of how alike they are to
a centroid, not centroid by centroid; and likeness is that of outputs alone, without the router's.

Shapes: E experts, F neurons of an expert, D width, N numbers by which a neuron is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from compression.analysis.similarity import mean_output_similarity, output_similarity
from compression.architectures import Architecture
from compression.neurons import best_order, cosines
from compression.recipe import ExpertMerge
from compression.study import ExpertStatistics, Study
from compression.trimming import Cuts, Routing, by_group
from compression.trimming.expert_drop import keep_highest, reap

GROUP_SIZE = 16
"""Experts in one group, at most: REAM's own setting, for 128 experts. With fewer than 32, half of them."""

Groups = Mapping[int, tuple[int, ...]]
"""Each centroid with its group, itself included, ascending."""


def choose(study: Study, step: ExpertMerge, cuts: Cuts, routing: Routing) -> Cuts:
    """Return the cuts with ``experts_kept`` centroids in every MoE layer, equally many of each of the router's groups.

    Who was merged before joins with all of its group.
    """
    merged = dict(cuts.merged)
    for block, kept in cuts.experts.items():
        statistics, before = study.experts[block], cuts.merged.get(block, {})
        held = {expert: before.get(expert, (expert,)) for expert in kept}
        centroids = keep_highest(reap(statistics), kept, step.experts_kept, groups=routing.groups)
        alike_EE = similarity(statistics)
        groups: dict[int, tuple[int, ...]] = {}
        for members in by_group(kept, routing.experts, routing.groups):
            heads = [expert for expert in members if expert in centroids]
            groups |= grouped(alike_EE, heads, {expert: held[expert] for expert in members})
        merged[block] = dict(sorted(groups.items()))
    return replace(cuts, experts={block: tuple(merged[block]) for block in cuts.experts}, merged=merged)


def similarity(statistics: ExpertStatistics) -> Tensor:
    """Return how alike experts answer [E, E]: the mean cosine over sampled tokens, without a sample that of mean outputs."""
    sample = statistics.sample
    return mean_output_similarity(statistics) if sample is None else output_similarity(sample)


def grouped(alike_EE: Tensor, centroids: Sequence[int], held: Groups) -> dict[int, tuple[int, ...]]:
    """Return each centroid with what it holds once all other experts, each with what it holds, have joined one.

    The most alike pair comes first; an expert whose centroid is full goes to the next best. Ties go to the lowest ids.
    """
    total = sum(map(len, held.values()))
    room = max(min(GROUP_SIZE, total // 2), -(-total // max(len(centroids), 1)))
    groups = {centroid: held[centroid] for centroid in centroids}
    left = [expert for expert in held if expert not in groups]
    for expert, centroid in sorted(_pairs(left, centroids), key=lambda pair: (-float(alike_EE[pair]), pair)):
        if expert in left and len(groups[centroid]) + len(held[expert]) <= room:
            groups[centroid] += held[expert]
            left.remove(expert)
    for expert in left:  # only what was merged before can be too large for all of them
        smallest = min(centroids, key=lambda centroid: (len(groups[centroid]), centroid))
        groups[smallest] += held[expert]
    return {centroid: tuple(sorted(group)) for centroid, group in groups.items()}


def merge_block(
    saved: Mapping[str, Tensor], architecture: Architecture, block: int, groups: Groups, saliency_E: Tensor
) -> dict[str, Tensor]:
    """Return a block's saved tensors with every centroid of a group become its mean; all other tensors are the very same.

    ``saliency_E``: the weight of each of the source's experts in a mean; an expert of weight zero changes nothing.
    """
    merged = dict(saved)
    for centroid, members in groups.items():
        weight_of = {expert: float(saliency_E[expert]) for expert in members if expert == centroid or saliency_E[expert] > 0}
        if len(weight_of) == 1:
            continue
        for name in _names(saved, architecture, block, centroid):
            if merged[name] is saved[name]:
                merged[name] = saved[name].clone()
        experts = {expert: _expert(saved, architecture, block, expert) for expert in weight_of}
        _average_(_expert(merged, architecture, block, centroid), experts, centroid, weight_of)
    return merged


class _Expert(NamedTuple):
    """Views of everything that one expert has."""

    matrices: list[Tensor]
    """Gate, up and down [F, D], neurons first."""
    by_neuron: list[Tensor]
    """Biases of gate and up [F]."""
    by_output: list[Tensor]
    """The bias of down [D]."""

    @property
    def neurons_FN(self) -> Tensor:
        """All weights of each neuron in a row."""
        return torch.cat([matrix_FD.float() for matrix_FD in self.matrices], dim=1)


def _average_(into: _Expert, experts: Mapping[int, _Expert], centroid: int, weight_of: Mapping[int, float]) -> None:
    """Write the weighted mean of the experts, neurons in the centroid's order, into the views ``into``."""
    total, centre = sum(weight_of.values()), experts[centroid]
    # The centroid plus weighted differences: where members equal it, these are zero and no bit changes.
    means = [[part.float().clone() for part in parts] for parts in centre]
    centre_FN = centre.neurons_FN
    for expert, other in experts.items():
        if expert == centroid:
            continue
        order_F = best_order(cosines(centre_FN, other.neurons_FN)).to(centre_FN.device)
        ordered = _Expert([m[order_F] for m in other.matrices], [b[order_F] for b in other.by_neuron], other.by_output)
        for mean_parts, parts, centre_parts in zip(means, ordered, centre, strict=True):
            for mean, part, own in zip(mean_parts, parts, centre_parts, strict=True):
                mean += weight_of[expert] / total * (part.float() - own.float())
    for parts, mean_parts in zip(into, means, strict=True):
        for part, mean in zip(parts, mean_parts, strict=True):
            part.copy_(mean)


def _expert(tensors: Mapping[str, Tensor], architecture: Architecture, block: int, expert: int) -> _Expert:
    names = _names(tensors, architecture, block, expert)
    if not architecture.fused_on_disk:
        gate, up, down, *biases = (tensors[name] for name in names)
        return _Expert([gate, up, down.mT], biases[:2], biases[2:])
    both_EXX, down_EXX, *biases = (tensors[name] for name in names)
    both, down = both_EXX[expert], down_EXX[expert]
    if both.shape[1] == 2 * down.shape[0]:  # inputs first; with outputs first, both have as many inputs as down has outputs
        both, down = both.mT, down.mT
    return _Expert(
        [*_halves(both, architecture), down.mT],
        [half for bias in biases[:1] for half in _halves(bias[expert], architecture)],
        [bias[expert] for bias in biases[1:]],
    )


def _halves(both: Tensor, architecture: Architecture) -> tuple[Tensor, Tensor]:
    """Return gate and up out of what holds both in its first dimension."""
    if architecture.gate_and_up == "alternating":
        return both[::2], both[1::2]
    middle = both.shape[0] // 2
    return both[:middle], both[middle:]


def _names(tensors: Mapping[str, Tensor], architecture: Architecture, block: int, expert: int) -> list[str]:
    """Return the saved names of an expert's matrices, and then of their biases where it has them."""
    if architecture.fused_on_disk:
        gate_up_down = [f"{architecture.prefix(block)}{place}" for place in architecture.fused_places]
        biases = [f"{name}_bias" for name in gate_up_down]
    else:
        stems = [f"{architecture.experts_prefix(block)}.{expert}.{matrix}" for matrix in architecture.gate_up_down]
        gate_up_down, biases = [f"{stem}.weight" for stem in stems], [f"{stem}.bias" for stem in stems]
    return gate_up_down + [name for name in biases if name in tensors]


def _pairs(experts: Sequence[int], centroids: Sequence[int]) -> list[tuple[int, int]]:
    return [(expert, centroid) for expert in experts for centroid in centroids]
