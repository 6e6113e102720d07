"""The ledger's rows: what was done to each weight of a stack, and what it lost.

Shapes: E experts, R outputs that are looked at, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from compression.report import LedgerRow
from compression.slimming import magnitude, rtn
from compression.slimming.damage import relative_errors, sample
from compression.slimming.grid import dequantize
from compression.stacks import Slimmed, Treatment

ErrorOf = Literal["outputs", "weights_times_inputs", "weights"]


@torch.no_grad()
def entries(
    names: Sequence[str], slimmed: Slimmed, sizes: Sequence[int], *, own_E: Tensor | None, shown_E: Tensor | None
) -> list[LedgerRow]:
    """Return a row for each matrix of a stack, by name and bytes stored.

    ``own_E``: calibration tokens of its own. ``shown_E``: those and what it was topped up with.
    """
    treatment, statistic = slimmed.treatment, slimmed.statistic
    weight_ERI = sample(slimmed.weight_EOI)
    ways = [_without_calibration(weight_ERI, treatment, slimmed.moved_EI), sample(slimmed.became_EOI)]
    before_E, after_E = relative_errors(weight_ERI, ways, statistic)
    zeros_E = (slimmed.became_EOI == 0).flatten(1).double().mean(dim=1)
    rows: list[LedgerRow] = []
    for place, name in enumerate(names):
        own = None if own_E is None else int(own_E[place])
        shown = None if shown_E is None else int(shown_E[place])
        damping = float(slimmed.damping_E[place])
        rows.append(
            LedgerRow(
                tensor=name if name.endswith("]") else f"{name}.weight",
                scheme=treatment.scheme,
                method_asked="+".join(treatment.methods),
                method_used="+".join(slimmed.used[place]),
                tokens=own,
                tokens_topped_up=0 if own is None or shown is None else shown - own,
                damping=damping if 0 < damping < float("inf") else None,
                error_before=float(before_E[place]),
                error_after=float(after_E[place]),
                error_of=_error_of(statistic),
                zeros=float(zeros_E[place]),
                bits=8 * sizes[place] / slimmed.weight_EOI[place].numel(),
            )
        )
    return rows


def _without_calibration(weight_ERI: Tensor, treatment: Treatment, moved_EI: Tensor | None) -> Tensor:
    moved_E1I = None if moved_EI is None else moved_EI[:, None].to(weight_ERI)
    came_ERI = weight_ERI if moved_E1I is None else weight_ERI / moved_E1I
    if treatment.pattern is not None:
        came_ERI = magnitude.prune(came_ERI, treatment.pattern)
    if treatment.grid is not None:
        rounded = rtn.round_to_nearest(came_ERI, treatment.grid)
        came_ERI = dequantize(rounded.codes_EOI, rounded.scale_EOG)
    return came_ERI if moved_E1I is None else came_ERI * moved_E1I


def _error_of(statistic: Tensor | None) -> ErrorOf:
    if statistic is None:
        return "weights"
    return "outputs" if statistic.dim() == 3 else "weights_times_inputs"
