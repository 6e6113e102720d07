"""Small checkpoints written byte by byte, so that these tests need neither torch nor safetensors.

The headers are those of a Mixtral with few, small tensors; the weights are zeros.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

BLOCKS, EXPERTS, TOP_K, HIDDEN, WIDTH, HEADS, VOCABULARY = 4, 8, 2, 128, 128, 4, 96

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def mixtral_shapes() -> dict[str, tuple[int, ...]]:
    """Return saved name -> shape of every tensor."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (HIDDEN,)
        for projection in "qkvo":
            shapes[f"{prefix}.self_attn.{projection}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for matrix, shape in (("w1", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH)), ("w3", (WIDTH, HIDDEN))):
                shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{matrix}.weight"] = shape
    return shapes


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of bfloat16 zeros."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def write_mixtral(folder: Path, **config: Any) -> Path:
    """Write a whole model into a folder and return the folder; ``config`` overrides members of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write_safetensors(folder / "model.safetensors", mixtral_shapes())
    return folder


def write_sharded(folder: Path) -> Path:
    """Write the same model in two shards with an index."""
    write_mixtral(folder)
    (folder / "model.safetensors").unlink()
    shapes = list(mixtral_shapes().items())
    halves = {"model-00001-of-00002.safetensors": shapes[:40], "model-00002-of-00002.safetensors": shapes[40:]}
    for name, half in halves.items():
        write_safetensors(folder / name, dict(half))
    places = {tensor: name for name, half in halves.items() for tensor, _ in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def tensor_bytes() -> int:
    """Return the bytes of all the model's tensors."""
    return sum(2 * prod(shape) for shape in mixtral_shapes().values())
