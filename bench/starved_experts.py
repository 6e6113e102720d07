"""How few tokens GPTQ can live with, and what topping up starved experts is worth: held-out loss by calibration size.

    python -m bench.starved_experts ../shared/models/mixtral-docs ../shared/data/docs [--seeds 3] [--scheme W3A16]

Rows are calibration sizes, columns ways to treat experts that see few of the tokens: rounded always (rtn), solved from
their own tokens however few (own), topped up to twice the input width and solved (topped up). What is printed is the rise
in held-out loss, in nats per token, as mean and standard deviation over calibration seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev
from unittest.mock import patch

from bench._trained import arguments
from compression.checkpoint.reader import Reader
from compression.pipeline import Run
from compression.progress import Silent
from compression.request import Compression

SIZES = (1, 2, 4, 16, 64)
LENGTH = 64
WAYS = {"own": (0, 0), "topped up": (0, 2)}
"""Tokens per input below which an expert is rounded, and up to which it is topped up."""


def main() -> None:
    """Measure and print the table."""
    given = arguments(__doc__, _settings)
    if given is None:
        return
    print(f"rounded: {loss_rise(given, 'rtn', 1, 0):.4f}")
    print(f"{'tokens':>8s}" + "".join(f"{way:>22s}" for way in WAYS))
    for samples in given.sizes:
        cells: list[str] = []
        for least, enough in WAYS.values():
            with patch("compression.stacks.LEAST", least), patch("compression.collect.ENOUGH", enough):
                rises = [loss_rise(given, "gptq", samples, seed) for seed in range(given.seeds)]
            cells.append(f"{mean(rises):.4f} +- {stdev(rises) if len(rises) > 1 else 0:.4f}")
        print(f"{samples * LENGTH:8d}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", default="W3A16")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)


def loss_rise(given: argparse.Namespace, method: str, samples: int, seed: int) -> float:
    """Return how much the held-out loss rises when the experts are quantized so."""
    text = given.text.resolve()
    request = Compression.model_validate(
        {
            "model": given.model.resolve().as_uri(),
            "profile": "custom",
            "recipe": {"steps": [{"step": "quantize", "method": method, "scheme": given.scheme, "group_size": 64}]},
            "calibration": {
                "source": (text / "calibration.txt").as_uri(),
                "samples": samples,
                "sequence_length": LENGTH,
                "seed": seed,
            },
            "evaluation": {"perplexity": {"source": (text / "heldout.txt").as_uri(), "samples": 32, "sequence_length": 256}},
        }
    )
    with tempfile.TemporaryDirectory() as out:
        run = Run(request, Reader(given.model), Path(out) / "out", Silent(), 2**40)
        run.plan_and_load_text()
        run.study_and_choose()
        run.compress_blocks()
        run.evaluate()
    return run.measured.quality.loss_after - run.measured.quality.loss_before


if __name__ == "__main__":
    main()
