"""Do the report's figures hold for whoever opens the artifact?

    python -m bench.evaluation_agrees ../shared/models/mixtral-docs ../shared/data/docs

Compresses MODEL (an eighth of its experts dropped, the rest in 4 bits, portable profile), then

* computes the perplexity of original and artifact anew, with AutoModelForCausalLM and a plain loop over the same tokens;
* makes a multiple choice from the held-out text, the true continuation of a passage among three others, runs it with the job,
  and runs the command that the report names on the artifact.

TEXTS is a folder with calibration.txt and heldout.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from compression.calibration import load_evaluation
from compression.pipeline import compress
from compression.request import Compression, Perplexity
from tests.compression.evaluation.made_tasks import a_choice

STEPS = [
    {"step": "expert_drop", "criterion": "reap", "fraction_dropped": 0.125},
    {"step": "quantize", "method": "gptq", "scheme": "W4A16", "group_size": 64},
]
LENGTH, SAMPLES, QUESTIONS = 256, 32, 120


def main() -> int:
    """Print a line of JSON per agreement; return 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("texts", type=Path, metavar="TEXTS")
    given = parser.parse_args()
    calibration, heldout = given.texts.resolve() / "calibration.txt", given.texts.resolve() / "heldout.txt"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tasks, out = scratch / "tasks", scratch / "out"
        tasks.mkdir()
        write_task(heldout, tasks, scratch / "questions.jsonl")
        perplexity = {"source": heldout.as_uri(), "samples": SAMPLES, "sequence_length": LENGTH}
        request = Compression.model_validate(
            {
                "model": given.model.resolve().as_uri(),
                "recipe": {"steps": STEPS},
                "calibration": {"source": calibration.as_uri(), "samples": 64, "sequence_length": LENGTH},
                "evaluation": {"perplexity": perplexity, "benchmarks": ["continuation"]},
            }
        )
        begin = time.perf_counter()
        report = compress(request, given.model, out, tasks=tasks)
        seconds = time.perf_counter() - begin
        assert report.benchmarks is not None
        print(json.dumps({"bytes": [report.bytes_before, report.bytes_after], "seconds": round(seconds, 1)}))
        ids_NS = load_evaluation(Perplexity.model_validate(perplexity), given.model, sequence_length=LENGTH).ids_NS
        agree = [
            told("perplexity of the original", report.quality.perplexity_before, stock_perplexity(given.model, ids_NS)),
            told("perplexity of the artifact", report.quality.perplexity_after, stock_perplexity(out, ids_NS)),
        ]
        found = by_command(report.benchmarks.command, out, tasks)
        for row in report.benchmarks.rows:
            print(json.dumps({"metric": row.metric, "original": row.before, "chance": row.chance, "retention": row.retention}))
            agree.append(told(f"{row.task} {row.metric} of the artifact", row.after, found[row.task][row.metric]))
    return 0 if all(agree) else 1


def told(what: str, reported: float, anew: float) -> bool:
    """Print both and their relative difference; return whether it is below 0.1 %."""
    difference = abs(anew / reported - 1) if reported else abs(anew)
    print(json.dumps({"what": what, "reported": reported, "anew": anew, "difference": difference}), flush=True)
    return difference < 1e-3


def stock_perplexity(folder: Path, ids_NS: torch.Tensor) -> float:
    """Return the perplexity of the model in a folder, opened by stock transformers, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        losses = [cross_entropy(model(ids_S[None]).logits[0, :-1].float(), ids_S[1:]).item() for ids_S in ids_NS]
    return math.exp(sum(losses) / len(losses))


def write_task(text: Path, tasks: Path, data: Path) -> None:
    """Make questions from a text: which of four pieces follows the passage?"""
    lot = random.Random(0)
    words = text.read_text(encoding="utf-8").split()
    places = [lot.randrange(40, len(words) - 12) for _ in range(QUESTIONS)]
    ends = [" " + " ".join(words[place : place + 12]) for place in places]
    rows: list[dict[str, object]] = []
    for number, place in enumerate(places):
        choices = [ends[number], *lot.sample([end for end in ends if end != ends[number]], 3)]
        lot.shuffle(choices)
        passage = " ".join(words[place - 40 : place])
        rows.append({"q": passage, "choices": choices, "label": choices.index(ends[number])})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tasks / "continuation.yaml").write_text(a_choice("continuation", data, version=1.0))


def by_command(command: str, out: Path, tasks: Path) -> dict[str, dict[str, float]]:
    """Return the results of the report's command line, typed in the artifact's folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "SLIMTRIM_TASKS_DIR": str(tasks), "PATH": path}
    written = tasks.parent / "results"
    subprocess.run(f"{command} --output_path {written}", shell=True, cwd=out, env=environment, check=True, capture_output=True)
    (file,) = written.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


if __name__ == "__main__":
    sys.exit(main())
