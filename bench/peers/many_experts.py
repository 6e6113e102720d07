"""A checkpoint with many small experts per layer, of random weights, for timing alone: Qwen3-MoE from the stock class.

    python -m bench.peers.many_experts FOLDER [--experts 64] [--blocks 4] [--width 512] [--expert-width 256]

Its tokenizer is that of another checkpoint (--tokenizer MODEL).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write(
    folder: Path, tokenizer: Path, *, experts: int = 64, blocks: int = 4, width: int = 512, expert_width: int = 256
) -> Path:
    """Write the checkpoint in bf16 with the tokenizer of another one; eight experts work on every token."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    config = Qwen3MoeConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        hidden_size=width,
        intermediate_size=4 * width,
        moe_intermediate_size=expert_width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    return folder


def main() -> None:
    """Write the checkpoint that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/models/mixtral-docs"))
    for name, value in (("experts", 64), ("blocks", 4), ("width", 512), ("expert-width", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = vars(parser.parse_args())
    print(write(given.pop("folder"), given.pop("tokenizer"), **given))


if __name__ == "__main__":
    main()
