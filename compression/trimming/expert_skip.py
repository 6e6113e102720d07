"""Expert skip: at run time, leave out a token's weakest experts when their weights are small beside the others'.

Lu et al., "Not All Experts are Equal", arXiv:2402.14800, section 3.3, for two experts per token: with weights w1 > w2, run
the first alone when w2 < beta w1, beta being the layer's median of w2 / w1 on calibration text. For k experts: of the sorted
weights the fewest are kept whose sum times beta exceeds that of the others, and ``"median"`` is the median of the lower
half's sum over the upper half's, so that half of the tokens skip half of their experts, rounded down. Betas are the
untouched model's. Saves arithmetic, and no memory.
"""

from __future__ import annotations

from dataclasses import replace

from compression.recipe import ExpertSkip
from compression.study import Study
from compression.trimming import Cuts


def choose(study: Study | None, step: ExpertSkip, cuts: Cuts) -> Cuts:
    """Return the cuts with a beta for every MoE layer that still has experts to choose from."""
    blocks = [block for block, kept in cuts.experts.items() if len(kept) > 1]
    if step.beta != "median":
        return replace(cuts, skip=dict.fromkeys(blocks, float(step.beta)))
    assert study is not None, "the plan asks for a study"
    return replace(cuts, skip={block: study.experts[block].median_ratio() for block in blocks})
