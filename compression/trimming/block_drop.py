"""Block drop: remove the blocks that change their input least.

He et al., "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework", arXiv:2406.02500,
section 4.3. ``discrete``: one by one, by the block influence of ShortGPT (arXiv:2403.03853): the mean over calibration tokens of
the cosine between a block's input and its output. ``consecutive``: one span, by the cosine between what enters its first block
and what leaves its last (arXiv:2403.17887). Near one, the span hardly turns the residual stream.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from compression.errors import ImpossibleStep
from compression.recipe import BlockDrop
from compression.study import Study
from compression.trimming import Cuts


def choose(study: Study | None, step: BlockDrop, cuts: Cuts, candidates: Collection[int]) -> Cuts:
    """Return the cuts without the blocks that the step names, or without ``blocks_dropped`` candidates.

    Candidates still have their MoE layer; ties drop the lowest index. Only where blocks are named, no study is needed.
    """
    if step.blocks is not None:
        return cuts.without(frozenset(step.blocks))
    assert study is not None, "scores come from a study"
    open_to_drop = [block for block in cuts.blocks if block in candidates and block in cuts.experts]
    if step.selection == "consecutive":
        return cuts.without(frozenset(_span(study, cuts.blocks, open_to_drop, step.blocks_dropped)))
    ranked = sorted(open_to_drop, key=lambda block: (-study.cosine(block), block))
    return cuts.without(frozenset(ranked[: step.blocks_dropped]))


def spans(blocks: Sequence[int], candidates: Collection[int], length: int) -> list[tuple[int, ...]]:
    """Return every run of exactly so many blocks, neighbours among those left, all of which are candidates."""
    runs = (tuple(blocks[first : first + length]) for first in range(len(blocks) - length + 1))
    return [run for run in runs if all(block in candidates for block in run)]


def _span(study: Study, blocks: Sequence[int], candidates: Collection[int], length: int) -> tuple[int, ...]:
    runs = spans(blocks, candidates, length)
    if not runs:
        raise ImpossibleStep(f"no {length} blocks in a row are left that block_drop may choose; drop fewer, or discrete ones")
    return max(runs, key=lambda run: study.span_cosine(run[0], run[-1]))  # max keeps the first of equals
