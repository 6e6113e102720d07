"""Block drop: remove the blocks that change their input least.

He et al., "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework", arXiv:2406.02500,
section 4.3; the score is the block influence of ShortGPT (arXiv:2403.03853): the mean over calibration tokens of
the cosine between a block's input and its output. Near one, the block hardly turns the residual stream.
"""

from __future__ import annotations

from collections.abc import Collection

from compression.recipe import BlockDrop
from compression.study import Study
from compression.trimming import Cuts


def choose(study: Study, step: BlockDrop, cuts: Cuts, candidates: Collection[int]) -> Cuts:
    """Return the cuts without the ``blocks_dropped`` candidates of highest cosine; ties drop the lowest index."""
    open_to_drop = [block for block in cuts.blocks if block in candidates]
    ranked = sorted(open_to_drop, key=lambda block: (-study.cosine(block), block))
    dropped = set(ranked[: step.blocks_dropped])
    return Cuts(
        blocks=tuple(block for block in cuts.blocks if block not in dropped),
        experts={block: kept for block, kept in cuts.experts.items() if block not in dropped},
    )
