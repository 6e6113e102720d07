"""How long an artifact takes to be closed once its last block is solved, as a share of the whole run.

    python -m bench.saving ../shared/models/mixtral-docs ../shared/data/docs [--rounds 3]

The clock runs from the model's folder to the closed artifact; what is evaluated or verified afterwards does not count.
Without arguments it says what it needs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import compression.compress
from bench._trained import arguments
from compression.checkpoint.reader import Reader
from compression.pipeline import Run
from compression.progress import Silent
from compression.request import Compression


def main() -> None:
    """Measure and print medians."""
    given = arguments(__doc__, _settings)
    if given is None:
        return
    runs = [one_run(given.model, given.text) for _ in range(given.rounds)]
    whole, closing = (median(column) for column in zip(*runs, strict=True))
    share = median(closing / whole for whole, closing in runs)
    print(f"whole run {whole:.2f} s; from the last block solved to the artifact closed {closing:.3f} s; share {share:.2%}")


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)


def one_run(model: Path, text: Path) -> tuple[float, float]:
    """Return the seconds of a run up to the closed artifact, and those since its last block was solved."""
    calibration, held_out = ((text / name).resolve().as_uri() for name in ("calibration.txt", "heldout.txt"))
    request = Compression.model_validate(
        {
            "model": model.resolve().as_uri(),
            "recipe": {"steps": [{"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 64}]},
            "calibration": {"source": calibration, "samples": 64, "sequence_length": 256},
            "evaluation": {"perplexity": {"source": held_out, "samples": 1, "sequence_length": 256}},
        }
    )
    solved = 0.0
    slim_ = compression.compress.slim_

    def noted(*args: Any, **settings: Any) -> Any:
        nonlocal solved
        rows = slim_(*args, **settings)
        solved = time.perf_counter()
        return rows

    with tempfile.TemporaryDirectory() as folder, patch("compression.compress.slim_", noted):
        start = time.perf_counter()
        run = Run(request, Reader(model), Path(folder) / "out", Silent(), 2**40)
        run.plan_and_load_text()
        run.study_and_choose()
        run.compress_blocks()
        closed = time.perf_counter()
    return closed - start, closed - solved


if __name__ == "__main__":
    main()
