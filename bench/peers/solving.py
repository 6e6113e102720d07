"""Both solvers alone: same weights, Gram matrices and scales, one thread, processor time, rounds in turn.

Ours is ``slimming.gptq.quantize``; the peer's is its kernel function, in one call for the stack and in one call per
matrix. Neither side's time holds a scale search, hooks or statistics.

Shapes: E experts, O output features, I input features, G groups of inputs.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from bench.gptq_stack import GRID, random_stack
from compression.slimming.gptq import quantize
from compression.slimming.grid import dequantize, search_scales

SHAPES = ((64, 256, 512), (8, 768, 256), (128, 256, 128))
WAYS = ("stacked", "loop")


def compare(peer: list[str], scratch: Path, *, rounds: int) -> list[dict[str, Any]]:
    """Return a row per shape: median processor seconds of each side, the ratios, and both output errors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Worker(peer, scratch / "solving.log") as worker:
            return [_compare_shape(shape, worker, scratch, rounds=rounds) for shape in SHAPES]
    finally:
        torch.set_num_threads(threads)


class Worker:
    """The peer's process, kept between rounds so that imports and warming up happen once."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command, self._log = command, log

    def __enter__(self) -> Self:
        """Start it; what it has to say that is no answer goes to the log."""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*self._command, "solve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close its input, at which it ends, and wait."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, line: str) -> float:
        """Give it one line of work; return the processor seconds it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the peer's process ended; see {self._log}")
        return json.loads(answer)["seconds"]


def _compare_shape(shape: tuple[int, int, int], worker: Worker, scratch: Path, *, rounds: int) -> dict[str, Any]:
    weight_EOI, gram_EII = random_stack(*shape)
    scale_EOG = search_scales(weight_EOI, GRID)
    file, result = scratch / "stack.safetensors", scratch / "solved.safetensors"
    save_file({"weight_EOI": weight_EOI, "gram_EII": gram_EII, "scale_EOG": scale_EOG}, file)
    worker.ask(f"load {file} {GRID.group_size}")
    times: dict[str, list[float]] = {"ours": [], **{way: [] for way in WAYS}}
    for _ in range(rounds + 1):  # the first one warms up
        start = time.process_time()
        quantized = quantize(weight_EOI, gram_EII, GRID, scale_EOG=scale_EOG)[0]
        times["ours"].append(time.process_time() - start)
        for way in WAYS:
            times[way].append(worker.ask(way))
    worker.ask(f"save {result}")
    medians = {name: median(seconds[1:]) for name, seconds in times.items()}
    stored_EOI = dequantize(quantized.codes_EOI, quantized.scale_EOG)
    return {
        "shape": "x".join(map(str, shape)),
        **{f"{name}_seconds": seconds for name, seconds in medians.items()},
        **{f"{way}_over_ours": medians[way] / medians["ours"] for way in WAYS},
        "ours_output_error": _output_error(weight_EOI, stored_EOI, gram_EII),
        "peer_output_error": _output_error(weight_EOI, load_file(result)["weight_EOI"], gram_EII),
    }


def _output_error(weight_EOI: torch.Tensor, stored_EOI: torch.Tensor, gram_EII: torch.Tensor) -> float:
    lost_EOI = weight_EOI - stored_EOI
    return (((lost_EOI @ gram_EII) * lost_EOI).sum() / ((weight_EOI @ gram_EII) * weight_EOI).sum()).item()
