"""Plans tried for real, several in one sweep: trim, round to nearest, and measure the divergence from the original.

Trials repair what a sum of prices cannot know, provided that the plans differ in kind. They are judged by divergence, which needs
a third of the text that next-token loss needs. Rounding stands in for the method that writes artifacts, and the plan knows by
how much it overstates (``planner/choice.py``).

Every block is read once; each plan that keeps it gets its own cut of it, and its own stream.

Shapes: N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from compression.altered import rounded_to, slim_experts_, slim_linears_
from compression.block import Blocks, Shell
from compression.checkpoint.reader import Reader, refuse_non_finite
from compression.evaluation.divergence import divergences
from compression.linears import find_linears
from compression.memory import give_back
from compression.moe import moe_layer
from compression.planner.levers import Levers
from compression.planner.prices import LEVERS, Lever
from compression.sweep import OnBlock, Stream
from compression.trimming import Cuts
from compression.trimming.surgery import cut_block, cut_config


@dataclass(frozen=True)
class Trial:
    """A plan as the sweep needs it: what stays, and the scheme of every lever in every kept block."""

    cuts: Cuts
    schemes: Mapping[int, Mapping[Lever, str]]
    """By source block; a lever that is absent stays as it is."""


Slim = Callable[[nn.Module, Mapping[str, Tensor], int, Trial], None]
"""Gives a live block, cut as a plan says, the weights that the plan's schemes leave it; told what the cut left, and its index."""


def try_plans(
    shell: Shell, reader: Reader, clean: Stream, plans: Sequence[Trial], levers: Levers, on_block: OnBlock
) -> list[Tensor]:
    """Return each plan's divergence from the original on the clean stream's tokens, in nats, sequence by sequence [N]."""

    def rounded(block: nn.Module, cut: Mapping[str, Tensor], index: int, plan: Trial) -> None:
        _round_(block, cut, plan.schemes.get(index, {}), levers, reader, clean)

    streams = carried(shell, reader, clean, plans, rounded, on_block)
    _, found = divergences(shell, clean, streams)
    return [found[place] for place in range(len(plans))]


def carried(
    shell: Shell, reader: Reader, clean: Stream, plans: Sequence[Trial], slim: Slim, on_block: OnBlock
) -> dict[int, Stream]:
    """Take the clean stream through the model; return a stream for each plan, by place, that went through that plan's blocks."""
    architecture, blocks = reader.architecture, len(shell.blocks)
    trimmed = [Blocks(cut_config(reader.config, architecture, plan.cuts), clean.device) for plan in plans]
    streams = {place: clean.fork() for place in range(len(plans))}
    for index in range(blocks):
        saved = reader.block(index)
        refuse_non_finite(saved)
        for place, plan in enumerate(plans):
            if index not in plan.cuts.blocks:
                continue
            after = plan.cuts.blocks.index(index)
            cut = cut_block(saved, architecture, plan.cuts, after)
            with trimmed[place].live(after, cut) as block:
                clean.convert_(block)
                slim(block, cut, index, plan)
                streams[place].push(index, block)
            del block, cut
        with shell.live(index, saved) as block:
            clean.push(index, clean.convert_(block))
        del block, saved
        give_back()
        on_block(index + 1, blocks, f"block {index + 1} of {blocks}: {len(plans)} plans are being tried")
    return streams


def _round_(
    block: nn.Module, saved: Mapping[str, Tensor], schemes: Mapping[Lever, str], levers: Levers, reader: Reader, stream: Stream
) -> None:
    layer = moe_layer(reader.architecture, block)
    for lever in LEVERS:
        if lever not in schemes:
            continue
        treatment = rounded_to(schemes[lever], levers.group_size, "rtn")
        if lever == "experts":
            if layer is not None:
                slim_experts_(layer, treatment, None, stream.stored)
        else:
            slim_linears_(
                find_linears(saved, block, reader.architecture, levers.components[lever]), treatment, None, stream.stored
            )
