"""Open a downloaded artifact with stock transformers and let it continue a line.

    python examples/serve_with_transformers.py FOLDER ["once upon a time"] [--tokens 32] [--own-loader]

Artifacts of the profile ``portable`` need nothing else. Those of ``custom`` may hold what no stock config can say; they bring
their loader along, one file that you can read, which runs with --own-loader only. Transformers unpacks quantized experts to bf16
as it loads them: what that takes is ``memory.transformers`` of the plan and of the report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(arguments: list[str]) -> int:
    """Print what the model makes of the line; return the exit code."""
    parser = argparse.ArgumentParser(description="Open an artifact with stock transformers and let it continue a line.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens at most")
    parser.add_argument("--own-loader", action="store_true", help="run the loader that the artifact brings along")
    options = parser.parse_args(arguments)
    print(continuation(options.folder, options.prompt, options.tokens, own_loader=options.own_loader))
    return 0


@torch.inference_mode()
def continuation(folder: Path, prompt: str, tokens: int, *, own_loader: bool) -> str:
    """Return the prompt and what the model says next, always its likeliest token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_loader).eval()
    given = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(said[0], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
