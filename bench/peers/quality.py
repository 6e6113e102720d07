"""Perplexity of checkpoints on held-out tokens, opened by stock transformers, in float32 on every side.

The peer saves a Mixtral's experts under names that the stock class does not look for (gate_proj, up_proj, down_proj instead of
w1, w3, w2); a copy with the names put right is what gets measured, and the row says how many tensors were missing before.

Shapes: N samples, S tokens per sample, V vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging

MIXTRAL_NAMES = {".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}


def judge(checkpoint: Path, ids_NS: Tensor, scratch: Path) -> dict[str, Any]:
    """Return the perplexity of a checkpoint, of a renamed copy of it where it does not open as it was written."""
    model, missing = _open(checkpoint)
    if missing:
        model, still_missing = _open(renamed_copy(checkpoint, scratch / f"{checkpoint.name}-renamed"))
        if still_missing:
            return {"missing_as_written": len(missing), "perplexity": None}
    return {"missing_as_written": len(missing), "perplexity": perplexity(model, ids_NS)}


@torch.no_grad()
def perplexity(model: Any, ids_NS: Tensor, *, batch: int = 8) -> float:
    """Return the exponential of the mean loss over every token that has one before it."""
    loss = 0.0
    for ids_BS in ids_NS.split(batch):
        logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        loss += cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / (ids_NS.shape[0] * (ids_NS.shape[1] - 1)))


def renamed_copy(checkpoint: Path, copy: Path) -> Path:
    """Return a copy whose expert tensors bear a saved Mixtral's names; the original stays as it is."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    for file in copy.glob("*.safetensors"):
        save_file({_renamed(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    for file in copy.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {_renamed(name): shard for name, shard in index["weight_map"].items()}
        file.write_text(json.dumps(index))
    return copy


def _renamed(name: str) -> str:
    if ".experts." in name:
        for theirs, stock in MIXTRAL_NAMES.items():
            name = name.replace(theirs, stock)
    return name


def _open(checkpoint: Path) -> tuple[Any, list[str]]:
    packed = "quantization_config" in json.loads((checkpoint / "config.json").read_text())
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    logging.set_verbosity_error()  # that tensors are missing is said in the table
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True, local_files_only=True, **more
    )
    return model.eval(), sorted(name for name in info["missing_keys"] if name != "lm_head.weight")
