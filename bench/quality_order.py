"""Which method loses least, on a trained model: held-out perplexity of every slimming method over calibration seeds.

    python -m bench.quality_order ../shared/models/mixtral-docs ../shared/data/docs [--seeds 3] [--json out.json]

Only experts are slimmed. Methods that need no calibration have one row and no spread; the others differ by which samples of
the calibration text they saw. Beside each calibrated method stands how many of its own standard deviations its mean lies
below that of the method it must beat: rounding for quantization, magnitude for pruning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

from bench._trained import arguments
from compression.checkpoint.reader import Reader
from compression.evaluation import perplexity
from compression.pipeline import Run
from compression.progress import Silent
from compression.request import Compression

SAMPLES, HELD_OUT, LENGTH, GROUP = 64, 64, 256, 64
PLAIN = ("rtn", "magnitude")


def settings() -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Return what is compared: a heading, the step without its method, and the methods, the plain one first."""
    schemes = [
        (scheme, {"step": "quantize", "scheme": scheme, "group_size": GROUP}, methods)
        for scheme, methods in (
            ("W2A16", ("rtn", "gptq")),
            ("W3A16", ("rtn", "gptq", "awq")),
            ("W4A16", ("rtn", "gptq", "awq")),
        )
    ]
    sparse = {"50 % unstructured": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
    return [
        (name, {"step": "prune", **setting}, ("magnitude", "wanda", "sparsegpt")) for name, setting in sparse.items()
    ] + schemes


def main() -> None:
    """Measure, and print a row as soon as it is known."""
    given = arguments(__doc__, _settings)
    if given is None:
        return
    found: dict[str, Any] = {}
    print(f"{SAMPLES} x {LENGTH} calibration tokens, {HELD_OUT} x {LENGTH} held-out tokens, groups of {GROUP}")
    for heading, step, methods in settings():
        if given.only and heading not in given.only:
            continue
        for method in methods:
            seeds = 1 if method in PLAIN else given.seeds
            runs = [perplexities(given, {**step, "method": method}, seed) for seed in range(seeds)]
            after = [run[1] for run in runs]
            found.setdefault("original", runs[0][0])
            found.setdefault(heading, {})[method] = after
            print(f"{heading:18s} {method:10s} {_cell(after, found[heading][methods[0]][0])}", flush=True)
    print(f"original: {found['original']:.4f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="headings to measure; all when it is not given")
    parser.add_argument("--json", type=Path)


def _cell(after: list[float], plain: float) -> str:
    if len(after) < 2:
        return f"{after[0]:10.4f}"
    spread = stdev(after)
    return f"{mean(after):10.4f} +- {spread:.4f}   {(plain - mean(after)) / spread:8.1f} deviations below"


_swept = perplexity._Swept
_originals: dict[Path, Any] = {}


def _swept_once(reader: Reader, ids_NS: Any, *rest: Any) -> Any:
    """Sweep the original once for all runs: it and the held-out tokens are the same."""
    if reader.folder.name == "out":
        return _swept(reader, ids_NS, *rest)
    if reader.folder not in _originals:
        _originals[reader.folder] = _swept(reader, ids_NS, *rest)
    return _originals[reader.folder]


def perplexities(given: argparse.Namespace, step: dict[str, Any], seed: int) -> tuple[float, float]:
    """Return held-out perplexity before and after one run."""
    calibration, held_out = ((given.text / name).resolve().as_uri() for name in ("calibration.txt", "heldout.txt"))
    request = Compression.model_validate(
        {
            "model": given.model.resolve().as_uri(),
            "profile": "custom" if step.get("scheme") in ("W3A16", "W2A16") else "portable",
            "recipe": {"steps": [step]},
            "calibration": {"source": calibration, "samples": SAMPLES, "sequence_length": LENGTH, "seed": seed},
            "evaluation": {"perplexity": {"source": held_out, "samples": HELD_OUT, "sequence_length": LENGTH}},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(request, Reader(given.model), Path(folder) / "out", Silent(), 2**40)
        run.plan_and_load_text()
        run.study_and_choose()
        run.compress_blocks()
        with patch.object(perplexity, "_Swept", _swept_once):
            run.evaluate()
    return run.measured.quality.perplexity_before, run.measured.quality.perplexity_after


if __name__ == "__main__":
    main()
