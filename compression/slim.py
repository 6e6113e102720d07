"""Slim one live block: find its weights, calibrate them together, quantize them stack by stack.

Experts are worked on a chunk at a time, as many as fit beside their Gram matrices in free memory: gate and up first,
as one matrix with one Gram matrix, then ``down_proj`` on what the already quantized gate and up feed it.

Shapes: E experts, O outputs, I inputs, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from compression.architectures import Architecture
from compression.checkpoint.packing import pack
from compression.collect import RoutedTokens, collect
from compression.methods import QUANTIZERS, Quantizer
from compression.moe import MoELayer, moe_layer
from compression.recipe import BITS, Quantize
from compression.report import LedgerRow
from compression.slimming.gptq import output_error
from compression.slimming.grid import Grid, Quantized, dequantize
from compression.slimming.hessian import Gram
from compression.sweep import Stream

_GRAM_BYTES = 4 * 2**30
"""Gram matrices held at once, at most: beyond this size a longer stack gains nothing."""


def slim_(
    saved: dict[str, Tensor], block: nn.Module, step: Quantize, *, stream: Stream, architecture: Architecture, index: int
) -> list[LedgerRow]:
    """Replace the weights in ``saved`` by packed ones; the live block's experts are used up. Returns the ledger."""
    work = _Work(saved, step, architecture, index, QUANTIZERS[step.method])
    linears, layer = work.linears(block), moe_layer(architecture, block)
    grams: dict[str, Gram] = {}
    routed: RoutedTokens | None = None
    if work.quantizer.needs_gram:
        grams, routed = collect(index, block, stream, linears, layer)
    rows: list[LedgerRow] = []
    for name, linear in linears.items():
        rows.append(work.slim_linear_(name, linear.weight.device, grams.pop(name, None)))
    if layer is not None:
        size = _experts_at_once(layer)
        for first in range(0, layer.count, size):
            rows += work.slim_experts_(range(first, min(first + size, layer.count)), layer, routed)
    return rows


@dataclass
class _Work:
    saved: dict[str, Tensor]
    step: Quantize
    architecture: Architecture
    index: int
    quantizer: Quantizer

    def scheme(self, name: str) -> str:
        step = self.step
        schemes = {
            "experts": step.scheme,
            "attention": step.attention,
            "shared_experts": step.shared_experts,
            "dense": step.dense,
        }
        return schemes.get(self.architecture.component_of(name), "keep")

    def grid(self, scheme: str) -> Grid:
        return Grid(BITS[scheme], self.step.group_size or -1)

    def linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Return the block's linear layers that the step quantizes, by saved name without ``.weight``."""
        found: dict[str, nn.Linear] = {}
        for name, tensor in self.saved.items():
            is_matrix = name.endswith(".weight") and tensor.dim() == 2 and not name.endswith("_gate.weight")
            if is_matrix and self.architecture.component_of(name) != "experts" and self.scheme(name) != "keep":
                module = block.get_submodule(name.split(".", 3)[3].removesuffix(".weight"))
                assert isinstance(module, nn.Linear), f"{name} is not a linear layer in the stock class"
                found[name.removesuffix(".weight")] = module
        return found

    def slim_linear_(self, name: str, device: torch.device, gram: Gram | None) -> LedgerRow:
        weight_EOI = self.saved[f"{name}.weight"].to(device)[None]
        scheme = self.scheme(f"{name}.weight")
        gram_EII = None if gram is None else gram.value_EII
        quantized, damping_E = self.quantizer.run(weight_EOI, gram_EII, self.grid(scheme))
        error_E = _relative_error(weight_EOI, quantized, gram_EII)
        self._replace_(name, quantized, 0, BITS[scheme])
        return self._row(name, scheme, gram, damping_E, error_E, 0)

    def slim_experts_(self, experts: range, layer: MoELayer, routed: RoutedTokens | None) -> list[LedgerRow]:
        gate, up, down = self.architecture.gate_up_down
        prefix = self.architecture.experts_prefix(self.index)
        dtype = self.saved[f"{prefix}.{experts[0]}.{gate}.weight"].dtype
        chunk = slice(experts.start, experts.stop)
        gate_up_EOI, down_EOI = layer.experts.gate_up_proj.data[chunk], layer.experts.down_proj.data[chunk]
        device = gate_up_EOI.device

        gram = None if routed is None else routed.input_gram(experts, device)
        both, rows = self._slim_stack(gate_up_EOI.to(dtype), gram, [gate, up], experts)
        # What enters down_proj then comes from the gate and up that will really be served.
        gate_up_EOI.copy_(dequantize(both.codes_EOI, both.scale_EOG))
        del gram
        inner = None if routed is None else routed.inner_gram(experts, layer, device)
        _, down_rows = self._slim_stack(down_EOI.to(dtype), inner, [down], experts)
        return rows + down_rows

    def _slim_stack(
        self, weight_EOI: Tensor, gram: Gram | None, matrices: list[str], experts: range
    ) -> tuple[Quantized, list[LedgerRow]]:
        """Quantize matrices that lie one below the other in the stack and share one Gram matrix."""
        gram_EII = None if gram is None else gram.value_EII
        quantized, damping_E = self.quantizer.run(weight_EOI, gram_EII, self.grid(self.step.scheme))
        rows: list[LedgerRow] = []
        height = weight_EOI.shape[1] // len(matrices)
        for number, matrix in enumerate(matrices):
            part = slice(number * height, (number + 1) * height)
            alone = Quantized(quantized.codes_EOI[:, part], quantized.scale_EOG[:, part])
            error_E = _relative_error(weight_EOI[:, part], alone, gram_EII)
            for place, expert in enumerate(experts):
                name = f"{self.architecture.experts_prefix(self.index)}.{expert}.{matrix}"
                self._replace_(name, alone, place, BITS[self.step.scheme])
                rows.append(self._row(name, self.step.scheme, gram, damping_E, error_E, place))
        return quantized, rows

    def _replace_(self, name: str, quantized: Quantized, place: int, bits: int) -> None:
        codes_OI = quantized.codes_EOI[place]
        del self.saved[f"{name}.weight"]
        self.saved[f"{name}.weight_packed"] = pack(codes_OI, bits).cpu()
        self.saved[f"{name}.weight_scale"] = quantized.scale_EOG[place].cpu()
        self.saved[f"{name}.weight_shape"] = torch.tensor(codes_OI.shape, dtype=torch.int64)

    def _row(self, name: str, scheme: str, gram: Gram | None, damping_E: Tensor, error_E: Tensor, place: int) -> LedgerRow:
        damping = float(damping_E[place])
        used = self.quantizer.name if damping < float("inf") else "rtn"
        return LedgerRow(
            tensor=f"{name}.weight",
            scheme=scheme,
            method_asked=self.step.method,
            method_used=used,
            tokens=None if gram is None else int(gram.tokens_E[place]),
            damping=damping if used != "rtn" else None,
            error=float(error_E[place]),
            error_of="outputs" if gram is not None else "weights",
        )


def _experts_at_once(layer: MoELayer) -> int:
    """Return how many experts' Gram matrices fit into a quarter of free memory; one at least."""
    weight = layer.experts.down_proj
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else psutil.virtual_memory().available
    one_expert = 4 * max(weight.shape[1], weight.shape[2]) ** 2
    return max(1, min(layer.count, min(free // 4, _GRAM_BYTES) // one_expert))


def _relative_error(weight_EOI: Tensor, quantized: Quantized, gram_EII: Tensor | None) -> Tensor:
    if gram_EII is not None:
        return output_error(weight_EOI, quantized, gram_EII)
    lost_EOI = weight_EOI.float() - dequantize(quantized.codes_EOI, quantized.scale_EOG).float()
    size_E = weight_EOI.float().square().sum((1, 2), dtype=torch.float64)
    return lost_EOI.square().sum((1, 2), dtype=torch.float64) / size_E.clamp(min=torch.finfo(torch.float64).tiny)
