"""What lies beside the weights and is opened by stock classes: refused before a block is read, where it would not open.

A tokenizer is opened with the text (``calibration.py``). What a run never opens, such as a chat template, is copied as it is.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig

from compression.errors import BrokenCheckpoint

GENERATION = "generation_config.json"


def check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that no stock class opens: the artifact would carry it, and not open either."""
    if not (folder / GENERATION).is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the values in it make the stock class raise
        raise BrokenCheckpoint(f"{GENERATION} does not open: {str(error)[:500]}; mend it, or leave it out") from error


def check_token_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse a tokenizer that makes tokens which the model has no embedding for."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise BrokenCheckpoint(
            f"the tokenizer makes token {int(ids.max())}, and the model has embeddings for {vocabulary}: they do not match"
        )
