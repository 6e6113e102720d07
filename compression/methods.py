"""Step class -> function, listed by hand, one line per method.

Shapes: E experts, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compression.architectures import Architecture
from compression.recipe import Analyze, AnyStep, BlockDrop, ExpertDrop, ExpertMerge, ExpertSkip, LayerDrop, Prune, parse_pattern
from compression.slimming import awq, gptq, magnitude, rtn, sparsegpt, wanda
from compression.slimming.grid import AnyGrid, Quantized
from compression.slimming.hessian import Gram, InputNorm, Statistic
from compression.slimming.masks import NOfM, Pattern, Unstructured
from compression.study import Part, Study
from compression.trimming import Cuts, Routing, block_drop, expert_drop, expert_merge, expert_skip, layer_drop
from compression.trimming.view import Merge

Needs = Literal["nothing", "input_norm", "gram"]
"""What a method must know of a weight's inputs, least first."""
NEEDS: tuple[Needs, ...] = ("nothing", "input_norm", "gram")
STATISTICS: dict[Needs, type[Gram | InputNorm]] = {"input_norm": InputNorm, "gram": Gram}


@dataclass(frozen=True)
class Pruner:
    """A way to set weights of a stack to zero."""

    run: Callable[[Tensor, Statistic | None, Pattern], tuple[Tensor, Tensor]]
    """(weight [E, O, I], statistic, pattern) -> weight, damping used per expert [E]."""
    needs: Needs
    fallback: str = "magnitude"
    """What it is for an expert whose inputs are unknown."""


@dataclass(frozen=True)
class Quantizer:
    """A way to put a stack of weights on a grid; a weight that is zero stays so."""

    run: Callable[[Tensor, Statistic | None, AnyGrid], tuple[Quantized, Tensor]]
    """(weight [E, O, I], statistic, grid) -> codes and scales, damping used per expert [E]."""
    needs: Needs
    fallback: str = "rtn"
    """What it is for an expert whose inputs are unknown."""


def _undamped(weight_EOI: Tensor) -> Tensor:
    return torch.zeros(weight_EOI.shape[0], dtype=torch.float64)


def _magnitude(weight_EOI: Tensor, statistic: Statistic | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    moved_EI = None if statistic is None else statistic.moved_EI
    return magnitude.prune(weight_EOI, pattern, moved_EI), _undamped(weight_EOI)


def _wanda(weight_EOI: Tensor, statistic: Statistic | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    assert statistic is not None
    return wanda.prune(weight_EOI, statistic.mean_square_EI, pattern), _undamped(weight_EOI)


def _sparsegpt(weight_EOI: Tensor, statistic: Statistic | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    assert isinstance(statistic, Gram)
    return sparsegpt.prune(weight_EOI, statistic.value, pattern)


def _rtn(weight_EOI: Tensor, statistic: Statistic | None, grid: AnyGrid) -> tuple[Quantized, Tensor]:
    return rtn.round_to_nearest(weight_EOI, grid), _undamped(weight_EOI)


def _gptq(weight_EOI: Tensor, statistic: Statistic | None, grid: AnyGrid) -> tuple[Quantized, Tensor]:
    assert isinstance(statistic, Gram)
    kept_EOI = weight_EOI != 0
    return gptq.quantize(weight_EOI, statistic.value, grid, kept_EOI=None if kept_EOI.all() else kept_EOI)


def _awq(weight_EOI: Tensor, statistic: Statistic | None, grid: AnyGrid) -> tuple[Quantized, Tensor]:
    assert statistic is not None
    return awq.round_weighted(weight_EOI, statistic.mean_square_EI, grid), _undamped(weight_EOI)


PRUNERS: dict[str, Pruner] = {
    "magnitude": Pruner(_magnitude, "nothing"),
    "wanda": Pruner(_wanda, "input_norm"),
    "sparsegpt": Pruner(_sparsegpt, "gram"),
}
QUANTIZERS: dict[str, Quantizer] = {
    "rtn": Quantizer(_rtn, "nothing"),
    "gptq": Quantizer(_gptq, "gram"),
    "awq": Quantizer(_awq, "gram"),  # its scales, chosen before for everything that reads one norm: balance.py
}


def pattern_of(step: Prune) -> Pattern:
    """Return the part of a prune step that the mathematics needs."""
    if step.pattern is not None:
        return NOfM(*parse_pattern(step.pattern))
    assert step.sparsity is not None, "the step's class demands one of the two"
    return Unstructured(step.sparsity)


@dataclass(frozen=True)
class Choice:
    """What the plan leaves to the study."""

    blocks: frozenset[int]
    """Those that block_drop and layer_drop choose among: alike, so that bytes do not hang on which of them go."""
    routing: Routing
    prefix: bool = False
    """Whether layer_drop can only take the first of them, for stock classes that count dense blocks from the start."""


def choose_cuts(steps: tuple[object, ...], study: Study | None, cuts: Cuts, choice: Choice) -> Cuts:
    """Work through the trimming steps in order and return what stays."""
    for step in steps:
        match step:
            case ExpertDrop():
                cuts = expert_drop.choose(study, step, cuts, choice.routing)
            case ExpertMerge():
                assert study is not None
                cuts = expert_merge.choose(study, step, cuts, choice.routing)
            case LayerDrop():
                cuts = layer_drop.choose(study, step, cuts, choice.blocks, prefix=choice.prefix)
            case BlockDrop():
                cuts = block_drop.choose(study, step, cuts, choice.blocks)
            case ExpertSkip():
                cuts = expert_skip.choose(study, step, cuts)
            case _:
                pass
    return cuts


def parts_for(steps: Iterable[object]) -> frozenset[Part]:
    """Return the parts of a study that these steps read; none where no study is needed."""
    parts: set[Part] = set()
    for step in steps:
        match step:
            case ExpertDrop(criterion="random") | LayerDrop(blocks=tuple()) | BlockDrop(blocks=tuple()):
                pass
            case ExpertDrop(criterion="aimer"):
                parts.add("weights")
            case ExpertDrop(criterion="reconstruction") | ExpertMerge():
                parts |= {"tokens", "sample"}
            case ExpertDrop() | LayerDrop() | BlockDrop() | ExpertSkip(beta="median"):
                parts.add("tokens")
            case Analyze():
                parts |= {"tokens", "sample", "likeness"}
            case _:
                pass
    return frozenset(parts)


def merger(architecture: Architecture, cuts: Cuts, study: Study | None) -> Merge | None:
    """Return what folds experts into others in a source block's tensors, as the cuts say; None where they say nothing."""
    if not cuts.merged:
        return None
    assert study is not None, "merging went by a study"

    def merge(saved: Mapping[str, Tensor], block: int) -> Mapping[str, Tensor]:
        if block not in cuts.merged:
            return saved
        saliency_E = expert_drop.reap(study.experts[block])
        return expert_merge.merge_block(saved, architecture, block, cuts.merged[block], saliency_E)

    return merge


def at_random(step: AnyStep, seed: int) -> AnyStep:
    """Return the step as it is but for experts, which are drawn by lot; as many are left."""
    match step:
        case ExpertDrop():
            return step.model_copy(update={"criterion": "random", "seed": seed})
        case ExpertMerge():
            return ExpertDrop(criterion="random", experts_kept=step.experts_kept, seed=seed)
        case _:
            return step
