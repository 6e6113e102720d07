"""A model in a folder, opened whole as whoever downloads it would: by the stock class, or by the loader that ships in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from compression.block import quiet, stock_class
from compression.checkpoint.writer import needs_runtime
from compression.runtime.slimtrim_runtime import open_model


def device_of_run() -> torch.device:
    """Return the accelerator where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needs_own_loader(folder: Path) -> bool:
    """Say whether no stock class opens the folder, but the loader that ships in it."""
    return needs_runtime(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def open_whole(folder: Path) -> Any:
    """Return the model in its own dtype, on the accelerator where there is one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    from_pretrained: Any = open_model if needs_runtime(config) else stock_class(config).from_pretrained
    with quiet():
        model = from_pretrained(folder, local_files_only=True)
    return model.to(device_of_run()).eval()


def engine() -> str:
    """Return what computes, with its version."""
    return f"transformers {transformers.__version__}, eager"
