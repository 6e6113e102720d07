"""Open checkpoints with the stock loader and let each continue the same line.

python -m examples.demo.generate FOLDER...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "Return a new"
_TOKENS = 32


def main(folders: list[str]) -> int:
    """Print what each model makes of the prompt; return the exit status."""
    console = Console()
    transformers.utils.logging.disable_progress_bar()
    for folder in folders:
        console.print(f"[bold]{folder}[/]: {continuation(Path(folder), PROMPT)!r}", highlight=False, soft_wrap=True)
    return 0


@torch.no_grad()
def continuation(folder: Path, prompt: str) -> str:
    """Return the prompt and what the model says next, always its likeliest token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids_1T = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    said_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=_TOKENS, do_sample=False)
    return tokenizer.decode(said_1T[0], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
