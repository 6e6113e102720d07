"""Similarity: do experts answer alike, do router rows tell what experts do, and how much is each layer missed?

Shapes: E experts, S sampled tokens, Q pairs of experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression.study import ExpertStatistics, Likeness, Sample, Study

MATRICES = ("gate", "up", "down")
_CHUNK_NUMBERS = 2**22

Table = dict[str, Any]


def output_similarity(sample: Sample) -> Tensor:
    """Return the mean over sampled tokens of the cosine between two experts' outputs [E, E]; an output of zero counts as zero."""
    experts = sample.gram_SEE.shape[1]
    total_EE = torch.zeros(experts, experts, dtype=torch.float64)
    for gram_SEE in sample.gram_SEE.split(max(1, _CHUNK_NUMBERS // experts**2)):
        norm_SE = gram_SEE.diagonal(dim1=1, dim2=2).double().clamp(min=0).sqrt()
        norm_SE = norm_SE.clamp(min=torch.finfo(torch.float32).tiny)
        total_EE += (gram_SEE.double() / norm_SE[:, :, None] / norm_SE[:, None]).sum(0)
    return total_EE / len(sample.gram_SEE)


def mean_output_similarity(layer: ExpertStatistics) -> Tensor:
    """Return the cosine between two experts' mean outputs over their own tokens [E, E]; zero for experts without tokens."""
    direction_ED = torch.nn.functional.normalize(layer.total("output"), dim=1)
    return direction_ED @ direction_ED.mT


def pairs_of(value_EE: Tensor) -> Tensor:
    """Return the values of all pairs of different experts [Q], each pair once."""
    experts = value_EE.shape[0]
    return value_EE[*torch.tril_indices(experts, experts, offset=-1)]


def mean_of_pairs(value_EE: Tensor) -> float | None:
    """Return the mean over pairs of different experts; None where there is but one expert."""
    return float(pairs_of(value_EE).mean()) if value_EE.shape[0] > 1 else None


def router_follows(likeness: Likeness) -> Table:
    """Return for each matrix how well a line predicts router rows' cosines from those of experts' average neurons.

    ``slope_sign`` is that of the line, ``r_squared`` the share of variance that it explains; None where either side is constant.
    """
    router_Q = pairs_of(likeness.router_EE)
    return {name: _line(pairs_of(likeness.average_3EE[place]), router_Q) for place, name in enumerate(MATRICES)}


def matching(likeness: Likeness) -> Table | None:
    """Return the means over matched pairs of tau and of neurons' cosines, as saved and as matched; None without any pair."""
    if not len(likeness.pairs_P2):
        return None
    return {
        "pairs": len(likeness.pairs_P2),
        "tau": float(likeness.tau_P.mean()),
        "lowest_tau": float(likeness.tau_P.min()),
        "cosine_as_saved": float(likeness.aligned_P.mean()),
        "cosine_matched": float(likeness.matched_P.mean()),
    }


def redundancy(study: Study, block: int) -> Table:
    """Return how little a block and its MoE layer change their input, and how alike experts are; None for what was not seen."""
    seen, layer = float(study.tokens_M.sum()) > 0, study.experts.get(block)
    return {
        "block_cosine": study.cosine(block) if seen and block in study.cosine_M else None,
        "layer_cosine": layer.layer_cosine if layer is not None and layer.tokens > 0 else None,
        "output_similarity": _outputs_of(layer),
        "matrix_similarity": _matrices_of(layer),
    }


def _line(x_Q: Tensor, y_Q: Tensor) -> Table | None:
    x_Q, y_Q = x_Q - x_Q.mean(), y_Q - y_Q.mean()
    spread = float(x_Q.square().sum() * y_Q.square().sum())
    if len(x_Q) < 2 or spread == 0.0:
        return None
    together = float(x_Q @ y_Q)
    return {"r_squared": together**2 / spread, "slope_sign": 1 if together >= 0 else -1}


def _outputs_of(layer: ExpertStatistics | None) -> float | None:
    if layer is None or layer.sample is None or not len(layer.sample.gram_SEE):
        return None
    return mean_of_pairs(output_similarity(layer.sample))


def _matrices_of(layer: ExpertStatistics | None) -> float | None:
    if layer is None or layer.likeness is None:
        return None
    return mean_of_pairs(layer.likeness.matrix_3EE.mean(0))
