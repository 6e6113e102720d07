"""Slim one live block: find its weights, calibrate them together, prune and quantize them stack by stack.

Experts are worked on a chunk at a time, as many as fit beside their statistics in free memory: gate and up first,
as one matrix with one statistic, then ``down_proj`` on what the already slimmed gate and up feed it.

Shapes: E experts, O outputs, I inputs, D width, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compression.architectures import COMPONENTS, Architecture, Component
from compression.balance import balance_block_, balance_down
from compression.collect import Collected, RoutedTokens, collect, experts_at_once, refuse_non_finite_inputs
from compression.ledger import entries
from compression.linears import find_linears
from compression.methods import NEEDS, PRUNERS, QUANTIZERS, STATISTICS, Needs, pattern_of
from compression.moe import MoELayer, moe_layer
from compression.recipe import BITS, Pattern, Prune, Quantize
from compression.report import LedgerRow
from compression.slimming.grid import AnyGrid, FloatGrid, Grid
from compression.stacks import Slimmed, Treatment, slim_stack, store_
from compression.sweep import Stream


@dataclass(frozen=True)
class Slimming:
    """The steps of a recipe that work inside weights, and how pruned weights are stored."""

    prune: Prune | None
    quantize: Quantize | None
    packed: Pattern | None = None
    """The pattern in which pruned weights are stored without their zeros; None where they are stored with them."""

    @property
    def steps(self) -> tuple[Prune | Quantize, ...]:
        """The steps there are, in the order in which they work."""
        return tuple(step for step in (self.prune, self.quantize) if step is not None)

    @property
    def needs(self) -> Needs:
        """What must be known of a weight's inputs."""
        wanted: list[Needs] = ["nothing"]
        if self.prune is not None:
            wanted.append(PRUNERS[self.prune.method].needs)
        if self.quantize is not None:
            wanted.append(QUANTIZERS[self.quantize.method].needs)
        return max(wanted, key=NEEDS.index)

    @property
    def propagate_error(self) -> bool:
        """Whether a block is calibrated on the outputs of the blocks slimmed before it; calibrated steps agree."""
        return all(step.propagate_error for step in self.steps if step.calibrated)

    @property
    def routing_weighted(self) -> bool:
        """Whether a token counts by its routing weight; calibrated steps agree."""
        return any(step.routing_weighted for step in self.steps if step.calibrated)

    def treatment(self, component: Component, block: int | None = None) -> Treatment | None:
        """Return what is done to the matrices of a component in a block of the source; None if nothing is.

        Without a block, what is done to those of which the recipe says nothing by themselves.
        """
        step, prune = self.quantize, self.prune
        scheme = "keep" if step is None else step.scheme_in(block, component)
        pruned = prune is not None and (component == "experts" or (component == "shared_experts" and prune.shared_experts))
        if scheme == "keep" and not pruned:
            return None
        return Treatment(
            prune=prune.method if prune is not None and pruned else None,
            pattern=pattern_of(prune) if prune is not None and pruned else None,
            quantize=step.method if step is not None and scheme != "keep" else None,
            scheme=scheme,
            grid=None if step is None or scheme == "keep" else _grid(scheme, step.group_size or -1),
            packed=self.packed if pruned and scheme == "keep" else None,
        )


def _grid(scheme: str, group_size: int) -> AnyGrid:
    return FloatGrid() if scheme == "FP8_DYNAMIC" else Grid(BITS[scheme], group_size)


def slim_(
    saved: dict[str, Tensor],
    block: nn.Module,
    slimming: Slimming,
    *,
    stream: Stream | None,
    architecture: Architecture,
    index: int,
    source: int | None = None,
) -> list[LedgerRow]:
    """Replace the weights in ``saved`` by slimmer ones; the live block's experts are used up. Returns the ledger.

    ``source``: the block's index in the source, by which the recipe knows it; not given, it is treated like any other.
    ``stream``: calibration tokens, None where no method needs any. Where errors do not propagate, it has moved behind the
    block as it came in; else it stays before it.
    """
    work = _Work(saved, block, slimming, architecture, index, source)
    if slimming.needs == "nothing":
        collected = Collected({}, None)
    else:
        assert stream is not None
        new, advance = STATISTICS[slimming.needs], not slimming.propagate_error
        collected = collect(index, block, stream, work.linears, new=new, architecture=architecture, advance=advance)
    if slimming.quantize is not None and slimming.quantize.method == "awq":
        balance_block_(work.saved, block, collected, architecture, index, work.treatment)
    rows = work.slim_linears_(collected)
    if work.layer is not None and work.treatment("experts") is not None:
        size = experts_at_once(work.layer)
        for first in range(0, work.layer.count, size):
            rows += work.slim_experts_(range(first, min(first + size, work.layer.count)), collected.routed)
    return rows


class _Work:
    def __init__(
        self,
        saved: dict[str, Tensor],
        block: nn.Module,
        slimming: Slimming,
        architecture: Architecture,
        index: int,
        source: int | None = None,
    ) -> None:
        self.saved, self.slimming, self.architecture, self.index = saved, slimming, architecture, index
        self.source = source
        self.layer = moe_layer(architecture, block)
        slimmed: list[Component] = [component for component in COMPONENTS if self.treatment(component) is not None]
        self.linears = find_linears(saved, block, architecture, slimmed)
        if self.layer is not None and architecture.fused_on_disk:
            self._own_fused_experts(self.layer)

    def _own_fused_experts(self, layer: MoELayer) -> None:
        # What the reader handed out is not ours to change, and the loader may have made it the live block's own parameter.
        for matrix in ("gate_up_proj", "down_proj"):
            name = f"{self.architecture.experts_prefix(self.index)}.{matrix}"
            given, live = self.saved[name], getattr(layer.experts, matrix)
            self.saved[name] = given.clone()
            if live.data_ptr() == given.data_ptr():
                live.data = self.saved[name]

    def treatment(self, component: Component) -> Treatment | None:
        """Return what is done to the matrices of a component in this block; None if nothing is."""
        return self.slimming.treatment(component, self.source)

    def slim_linears_(self, collected: Collected) -> list[LedgerRow]:
        rows: list[LedgerRow] = []
        done: dict[str, Slimmed] = {}
        for name in sorted(self.linears, key=lambda name: name.endswith("down_proj")):  # up_proj must come before it
            treatment = self.treatment(self.architecture.component_of(f"{name}.weight"))
            assert treatment is not None
            statistic = collected.linears.get(name)
            weight_EOI = self.saved[f"{name}.weight"].to(self.linears[name].weight.device)[None]
            up = done.get(f"{name.removesuffix('down_proj')}up_proj")
            if treatment.quantize == "awq" and name.endswith(".down_proj") and up is not None and statistic is not None:
                weight_EOI = balance_down(weight_EOI, statistic, treatment, up)
                store_(self.saved, f"{name.removesuffix('down_proj')}up_proj", up, 0)
            done[name] = slimmed = slim_stack(weight_EOI, statistic, treatment)
            size = store_(self.saved, name, slimmed, 0)
            tokens_E = None if statistic is None else statistic.tokens_E
            rows += entries([name], slimmed, [size], own_E=tokens_E, shown_E=tokens_E)
        return rows

    def slim_experts_(self, experts: range, routed: RoutedTokens | None) -> list[LedgerRow]:
        """Slim a chunk of experts: gate and up, then down on what these feed it."""
        layer, treatment, weighted = self.layer, self.treatment("experts"), self.slimming.routing_weighted
        assert layer is not None
        assert treatment is not None
        gate_up_EOI, down_EOI = layer.stack("gate_up_proj", experts), layer.stack("down_proj", experts)
        stored, device = self._stored_dtype(experts[0]), gate_up_EOI.device
        statistic = inner = new = None
        if routed is not None:
            new = STATISTICS[self.slimming.needs]
            statistic = routed.input_statistic(experts, new, device, weighted=weighted)
            refuse_non_finite_inputs(statistic, f"{self.architecture.experts_prefix(self.index)} {_named(experts)}")
        both = slim_stack(gate_up_EOI.to(stored, copy=True), statistic, treatment)
        if self.slimming.propagate_error:
            # What enters down_proj then comes from the gate and up that will really be served.
            gate_up_EOI.copy_(both.became_EOI)
        if routed is not None and new is not None:
            inner = routed.inner_statistic(experts, new, layer, device, weighted=weighted)
            refuse_non_finite_inputs(inner, f"the down_proj of {self.architecture.experts_prefix(self.index)} {_named(experts)}")
        down_EOI = down_EOI.to(stored, copy=True)
        up = slice(both.became_EOI.shape[1] // 2, None)
        if treatment.quantize == "awq" and inner is not None:
            down_EOI = balance_down(down_EOI, inner, treatment, both, up)
        down = slim_stack(down_EOI, inner, treatment)
        return self._keep_experts_(experts, both, down, routed)

    def _keep_experts_(self, experts: range, both: Slimmed, down: Slimmed, routed: RoutedTokens | None) -> list[LedgerRow]:
        prefix = self.architecture.experts_prefix(self.index)
        half = both.became_EOI.shape[1] // 2
        gate, up, last = self.architecture.gate_up_down
        parts = {gate: both.outputs(slice(None, half)), up: both.outputs(slice(half, None)), last: down}
        if self.architecture.fused_on_disk:
            parts = {"gate_up_proj": both, "down_proj": down}
        own_E = None if routed is None else routed.own_E[experts.start : experts.stop]
        shown_E = None if routed is None else routed.tokens_E[experts.start : experts.stop]
        rows: list[LedgerRow] = []
        for matrix, part in parts.items():
            if self.architecture.fused_on_disk:
                names = [f"{prefix}.{matrix}[{expert}]" for expert in experts]
                whole = self.saved[f"{prefix}.{matrix}"]
                whole[experts.start : experts.stop] = part.became_EOI.mT.cpu()  # these families store [inputs, outputs]
                sizes = [whole[expert].nbytes for expert in experts]
            else:
                names = [f"{prefix}.{expert}.{matrix}" for expert in experts]
                sizes = [store_(self.saved, name, part, place) for place, name in enumerate(names)]
            rows += entries(names, part, sizes, own_E=own_E, shown_E=shown_E)
        return rows

    def _stored_dtype(self, expert: int) -> torch.dtype:
        prefix = self.architecture.experts_prefix(self.index)
        if self.architecture.fused_on_disk:
            return self.saved[f"{prefix}.down_proj"].dtype
        return self.saved[f"{prefix}.{expert}.{self.architecture.gate_up_down[0]}.weight"].dtype


def _named(experts: range) -> str:
    return f"{experts.start} to {experts.stop - 1}"
