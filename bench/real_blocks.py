"""Seconds and peak memory of slimming the experts of one real-sized block: Qwen3-30B-A3B and Mixtral-8x7B, random weights.

    python -m bench.real_blocks                     on a GPU: whole blocks, as many tokens as 512 x 2048 send to each expert
    OMP_NUM_THREADS=1 python -m bench.real_blocks   without one: a few experts and tokens, extrapolated, and said to be

Per matrix stack: Gram matrices from bf16 tokens, GPTQ with its scale search, packing. Making tokens and weights is not timed;
reading, forward passes and writing are not part of it. --experts N takes N of a block's experts, --tokens N shows N tokens
to each.

Shapes: E experts, O output features, I input features, T tokens.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from compression.checkpoint.packing import pack
from compression.slimming.gptq import quantize
from compression.slimming.grid import Grid
from compression.slimming.hessian import Gram

GRID = Grid(bits=4, group_size=128)
CALIBRATION_TOKENS = 512 * 2048
TOKENS_ON_CPU = 512
TOKENS_AT_ONCE = 2**13
STEPS = ("gram", "solve", "pack")


@dataclass(frozen=True)
class Model:
    """A model's block, and what others publish for the whole model."""

    name: str
    blocks: int
    experts: int
    used: int
    """Experts per token."""
    stacks: dict[str, tuple[int, int]]
    """Name of a stack -> output and input features of one expert's matrix."""
    on_cpu: int
    """Experts taken where there is no GPU."""
    published: tuple[str, ...]


MODELS = (
    Model(
        "Qwen3-30B-A3B",
        blocks=48,
        experts=128,
        used=8,
        stacks={"gate_up": (1536, 2048), "down": (2048, 768)},
        on_cpu=4,
        published=(
            "llm-compressor 0.10, GPTQ W4A16, 1 GPU: 14207 s, 6.56 GB, of which saving 748 s (its docs, distributed_oneshot.md)",
            'llm-compressor 0.14: "~30x" of 0.10 end to end on mixtures (its pull request #3128)',
        ),
    ),
    Model(
        "Mixtral-8x7B",
        blocks=32,
        experts=8,
        used=2,
        stacks={"gate_up": (28672, 4096), "down": (4096, 14336)},
        on_cpu=1,
        published=(
            "GPTQ, one A800: 73 min (MoEQuant, arXiv:2505.03804, rebuttal)",
            "auto-round W4g128, A100-80G, loading and packing excluded: 28 min, 46 GB (its documentation)",
        ),
    ),
)


def main() -> None:
    """Measure each model's block and print it beside the published totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, help="experts per block; all on a GPU, a few without")
    parser.add_argument("--tokens", type=int, help="tokens shown to each expert")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS], default=[model.name for model in MODELS])
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for model in (model for model in MODELS if model.name in given.models):
        experts = min(given.experts or (model.experts if device.type == "cuda" else model.on_cpu), model.experts)
        full_tokens = CALIBRATION_TOKENS * model.used // model.experts
        tokens = given.tokens or (full_tokens if device.type == "cuda" else TOKENS_ON_CPU)
        print(f"\n{model.name}, one block of {model.blocks}: {experts} of {model.experts} experts, {tokens} tokens each; {where}")
        costs = {name: measure(experts, *shape, tokens, device) for name, shape in model.stacks.items()}
        show(model, costs, experts=experts, tokens=tokens, full_tokens=full_tokens)


@dataclass
class Costs:
    """What one stack took."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    peak: int = 0

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        """Add the time of what is done inside; a GPU is waited for at both ends."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(experts: int, outputs: int, inputs: int, tokens: int, device: torch.device) -> Costs:
    """Slim one stack of random matrices and return what it took; weights and codes are on the device throughout."""
    costs = Costs(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator(device).manual_seed(0)
    warm_up(device)
    weight_EOI = torch.empty(experts, outputs, inputs, dtype=torch.bfloat16, device=device)
    for weight_OI in weight_EOI:
        weight_OI.normal_(std=0.02, generator=generator)
    gram = Gram(experts, inputs, device)
    for expert in range(experts):
        for start in range(0, tokens, TOKENS_AT_ONCE):
            rows = min(TOKENS_AT_ONCE, tokens - start)
            x_TI = torch.randn(rows, inputs, generator=generator, device=device, dtype=torch.bfloat16)
            with costs.step("gram"):
                gram.add_rows(expert, x_TI)
    with costs.step("gram"):
        gram_EII = gram.value
    with costs.step("solve"):
        quantized, _ = quantize(weight_EOI, gram_EII, GRID)
    with costs.step("pack"):
        for codes_OI in quantized.codes_EOI:
            pack(codes_OI, GRID.bits)
    costs.peak = peak_memory(device)
    return costs


def warm_up(device: torch.device) -> None:
    """Solve something small once: libraries load and pick their kernels on first use."""
    weight_EOI = torch.randn(2, 128, 128, device=device)
    quantize(weight_EOI, torch.eye(128, device=device).expand(2, 128, 128).contiguous(), GRID)


def peak_memory(device: torch.device) -> int:
    """Return the bytes that were allocated at most: on a GPU since the last reset, else by this process in its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(model: Model, costs: dict[str, Costs], *, experts: int, tokens: int, full_tokens: int) -> None:
    """Print seconds per step, the whole model's total, and what others publish."""
    print(f"  {'seconds':10s}" + "".join(f"{name:>9s}" for name in (*STEPS, "sum")) + f"{'peak GB':>9s}")
    for name, cost in costs.items():
        numbers = (*cost.seconds.values(), sum(cost.seconds.values()))
        print(f"  {name:10s}" + "".join(f"{seconds:9.2f}" for seconds in numbers) + f"{cost.peak / 1e9:9.2f}")
    gram = sum(cost.seconds["gram"] for cost in costs.values())
    rest = sum(sum(cost.seconds.values()) for cost in costs.values()) - gram
    times = model.blocks * model.experts / experts
    total, notes = times * (gram * full_tokens / tokens + rest), []
    if experts < model.experts:
        notes.append(f"extrapolated from {experts} of {model.experts} experts (the peak is theirs, not the block's)")
    if tokens < full_tokens:
        notes.append(f"Gram time extrapolated from {tokens} to {full_tokens} tokens per expert")
    print(f"  times {model.blocks} blocks{''.join(f'; {note}' for note in notes)}:")
    print(f"    {total:.0f} s, of which {times * rest:.0f} s without Gram matrices")
    print("  published, for whole runs on a GPU, forward passes included:")
    print("".join(f"    {line}\n" for line in model.published), end="")


if __name__ == "__main__":
    main()
