"""Whether a trimmed model is faster: prefill and decode in stock transformers, each model in a process of its own.

    python -m bench.dropped_speed MODEL ARTIFACT [ARTIFACT ...] [--rounds 5]

Prefill is one forward pass over a batch of 512-token prompts, decode 64 greedy steps behind them with a cache; tokens per
second, medians of several rounds, models taking turns. Stock artifacts are opened with AutoModelForCausalLM, those of the custom
profile with ``trust_remote_code=True``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

PROMPT, STEPS = 512, 64


def main() -> None:
    """Measure, and print a row per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--once", action="store_true", help="measure one model in this process, and print JSON")
    given = parser.parse_args()
    if given.once:
        print(json.dumps(_once(given.models[0], given.batch)))
        return
    if len(given.models) < 2:
        print("NOT MEASURED: name the folder of a model, and of what was made of it")
        return
    found: dict[Path, list[dict[str, float]]] = {model: [] for model in given.models}
    for _ in range(given.rounds):
        for model in given.models:
            command = [sys.executable, "-m", "bench.dropped_speed", str(model), "--once", "--batch", str(given.batch)]
            found[model].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    first = {kind: median(row[kind] for row in found[given.models[0]]) for kind in ("prefill", "decode")}
    print(f"batch {given.batch}, prompts of {PROMPT} tokens, {STEPS} steps, median of {given.rounds} fresh processes")
    for model, rows in found.items():
        cells = {kind: median(row[kind] for row in rows) for kind in first}
        text = ", ".join(f"{kind} {value:8.1f} tokens/s ({value / first[kind]:.2f})" for kind, value in cells.items())
        print(f"{model.name:32s} {text}")


@torch.no_grad()
def _once(folder: Path, batch: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(3, model.config.get_text_config().vocab_size - 1, (batch, PROMPT), generator=generator)
    model(ids_BS[:, :32], use_cache=False)  # kernels and pages are warm from here on
    start = time.perf_counter()
    answer = model(ids_BS, use_cache=True, logits_to_keep=1)
    prefill = batch * PROMPT / (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(STEPS):
        answer = model(answer.logits[:, -1:].argmax(-1), past_key_values=answer.past_key_values, use_cache=True)
    return {"prefill": prefill, "decode": batch * STEPS / (time.perf_counter() - start)}


if __name__ == "__main__":
    main()
