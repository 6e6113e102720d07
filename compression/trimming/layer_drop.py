"""Layer drop: remove the MoE layers, with their norms, that change the residual stream least.

He et al., "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework", arXiv:2406.02500, section 4.2. The
score is the mean over calibration tokens of cos(x', x' + MoE(norm x')), x' being what enters the norm before the MoE layer: with
the norm inside, because norm and layer go together. Attention stays, and with it the key-value cache.
"""

from __future__ import annotations

from collections.abc import Collection

from compression.recipe import LayerDrop
from compression.study import Study
from compression.trimming import Cuts


def choose(study: Study | None, step: LayerDrop, cuts: Cuts, candidates: Collection[int], *, prefix: bool = False) -> Cuts:
    """Return the cuts without the MoE layers that the step names, or those of highest cosine among the candidates.

    Ties drop the lowest index. ``prefix``: a stock class can only say that the first ones are gone, so these go, whatever their
    cosine. Only where blocks are named, no study is needed.
    """
    if step.blocks is not None:
        return cuts.without(layers=frozenset(step.blocks))
    assert study is not None, "scores come from a study"
    whole = [block for block in cuts.blocks if block in candidates and block in cuts.experts]
    ranked = whole if prefix else sorted(whole, key=lambda block: (-study.experts[block].layer_cosine, block))
    return cuts.without(layers=frozenset(ranked[: step.layers_dropped]))
