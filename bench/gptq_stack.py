"""GPTQ on a whole stack of experts against the same code one expert at a time, and against the arithmetic limit.

    OMP_NUM_THREADS=1 python -m bench.gptq_stack             64 experts of 256 x 512: same codes, ratio of times
    OMP_NUM_THREADS=1 python -m bench.gptq_stack --limit     several shapes against the limit of their arithmetic

Run from the repository's root. Weights and inputs are random, the inputs correlated. Processor time of one thread,
medians of interleaved rounds; scales are searched beforehand and timed apart, since both ways need the same ones.

The limit is E O I^2 + E I^3 / 3 floating-point operations (repairs, factor) at the speed of one large float32 product on
this machine, measured in the same rounds.

Shapes: E experts, O output features, I input features, T tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from compression.slimming.gptq import quantize
from compression.slimming.grid import Grid, search_scales

GRID = Grid(bits=4, group_size=64)
STACK = (64, 256, 512)
LIMIT_SHAPES = (STACK, (8, 768, 256), (128, 256, 128), (4, 1536, 2048), (4, 2048, 768), (1, 2048, 4096))
PRODUCT = 2048
"""Rows and columns of the product that stands for the machine's speed."""


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", action="store_true", help="compare with the arithmetic limit instead")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.limit:
        compare_with_limit(arguments.rounds)
    else:
        compare_with_loop(arguments.rounds)


def compare_with_loop(rounds: int) -> None:
    """Solve one stack both ways, check that the codes are the same, and print both times and their ratio."""
    weight_EOI, gram_EII = random_stack(*STACK)
    scale_EOG = search_scales(weight_EOI, GRID)

    def stacked() -> Tensor:
        return quantize(weight_EOI, gram_EII, GRID, scale_EOG=scale_EOG)[0].codes_EOI

    def one_by_one() -> Tensor:
        parts = [slice(expert, expert + 1) for expert in range(len(weight_EOI))]
        return torch.cat([quantize(weight_EOI[e], gram_EII[e], GRID, scale_EOG=scale_EOG[e])[0].codes_EOI for e in parts])

    same = torch.equal(stacked(), one_by_one())
    times = interleaved(rounds, stacked, one_by_one, lambda: search_scales(weight_EOI, GRID))
    ratios = sorted(loop / stack for stack, loop in zip(times[0], times[1], strict=True))
    print(f"{'x'.join(map(str, STACK))} (experts x outputs x inputs), {rounds} rounds, processor ms, median (least .. most)")
    for name, seconds in zip(("stacked", "one by one", "scale search, either way"), times, strict=True):
        print(f"  {name:26s}{spread(seconds, 1e3, 0)}")
    print(f"  {'one by one / stacked':26s}{spread(ratios, 1, 2)}")
    print(f"  {'same codes':26s}{'yes' if same else 'NO'}")
    if not same:
        raise SystemExit(1)


def compare_with_limit(rounds: int) -> None:
    """Print, for several shapes, the solver's time beside that of its arithmetic alone."""
    square = torch.randn(PRODUCT, PRODUCT)
    print(f"{'experts x outputs x inputs':28s}{'ms':>8s}{'limit ms':>10s}{'limit/ms':>10s}{'GFLOP/s':>9s}   {rounds} rounds")
    for experts, outputs, inputs in LIMIT_SHAPES:
        weight_EOI, gram_EII = random_stack(experts, outputs, inputs)
        scale_EOG = search_scales(weight_EOI, GRID)
        solves, products = interleaved(
            rounds,
            lambda w=weight_EOI, g=gram_EII, s=scale_EOG: quantize(w, g, GRID, scale_EOG=s),
            lambda: square @ square,
        )
        speed = 2 * PRODUCT**3 / median(products)
        limit = (experts * outputs * inputs**2 + experts * inputs**3 / 3) / speed
        taken = median(solves)
        shape = f"{experts} x {outputs} x {inputs}"
        print(f"{shape:28s}{taken * 1e3:8.0f}{limit * 1e3:10.0f}{limit / taken:10.2f}{speed / 1e9:9.0f}")


def random_stack(experts: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Return weights, and Gram matrices of correlated inputs that differ in loudness."""
    generator = torch.Generator().manual_seed(0)
    weight_EOI = 0.02 * torch.randn(experts, outputs, inputs, generator=generator)
    gram_EII = torch.empty(experts, inputs, inputs)
    for expert in range(experts):
        mix_II = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5
        loudness_I = (0.5 * torch.randn(inputs, generator=generator)).exp()
        x_TI = torch.randn(2 * inputs, inputs, generator=generator) @ mix_II * loudness_I
        product_II = x_TI.T @ x_TI / len(x_TI)
        gram_EII[expert] = (product_II + product_II.T) / 2
    return weight_EOI, gram_EII


def interleaved(rounds: int, *functions: Callable[[], object]) -> list[list[float]]:
    """Return the processor seconds of each function in each round; one more round before them warms up and is dropped."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for seconds, function in zip(times, functions, strict=True):
            start = time.process_time()
            function()
            seconds.append(time.process_time() - start)
    return [seconds[1:] for seconds in times]


def spread(values: list[float], unit: float, digits: int) -> str:
    """Return the median with the extremes behind it."""
    middle, least, most = (unit * value for value in (median(values), min(values), max(values)))
    return f"{middle:.{digits}f} ({least:.{digits}f} .. {most:.{digits}f})"


if __name__ == "__main__":
    main()
