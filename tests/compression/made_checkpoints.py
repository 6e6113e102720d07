"""Checkpoints made of headers alone: tensor names and shapes as stock classes save them, and no weights.

``mixtral()``, ``qwen()``, ``deepseek()`` and ``gpt_oss()`` return config and tensors; ``checkpoint`` turns them into
what ``read_checkpoint`` returns, ``write_safetensors`` into a file, by the format's own definition.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from compression.checkpoint.headers import DTYPE_BITS, Checkpoint, TensorHeader
from compression.request import Compression

Config = dict[str, Any]
Tensors = dict[str, tuple[str, tuple[int, ...]]]

CONFIG: Config = {"model_type": "mixtral"}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def checkpoint(config: Config, tensors: Tensors) -> Checkpoint:
    """Return the checkpoint that one file with these tensors would be read as."""
    headers: dict[str, TensorHeader] = {}
    start = 1000
    for name, (dtype, shape) in tensors.items():
        stop = start + prod(shape) * DTYPE_BITS[dtype] // 8
        headers[name] = TensorHeader(name, dtype, shape, "model.safetensors", start, stop)
        start = stop
    return Checkpoint(config, headers)


def request(*steps: Mapping[str, Any], **settings: Any) -> Compression:
    """Return a request for these steps."""
    return Compression.model_validate({"model": "owner/name", "recipe": {"steps": list(steps)}, **settings})


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a file of zeros with the header that these tensors ask for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    write_raw(path, json.dumps(header).encode(), end)


def write_raw(path: Path, header: bytes, data: int) -> None:
    """Write a header as given and so many zero bytes after it."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data)


def write_model(folder: Path, config: Config, tensors: Tensors) -> Path:
    """Write a single-file checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


class MemoryFiles:
    """Files held in memory that remember what was read of them; ``claimed`` sizes may lie."""

    def __init__(self, files: dict[str, bytes], claimed: dict[str, int] | None = None) -> None:
        self.files = files
        self.claimed = claimed or {}
        self.reads: list[tuple[str, int, int]] = []

    def names(self) -> list[str]:
        return list(self.files)

    def size(self, name: str) -> int:
        return self.claimed.get(name, len(self.files[name]))

    def read(self, name: str, start: int, length: int) -> bytes:
        self.reads.append((name, start, length))
        return self.files[name][start : start + length]


def safetensors(header: object, data: int) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def single(header: object, data: int, config: object = CONFIG) -> MemoryFiles:
    return MemoryFiles({"config.json": json.dumps(config).encode(), "model.safetensors": safetensors(header, data)})


def sharded(weight_map: object, shards: dict[str, bytes]) -> MemoryFiles:
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return MemoryFiles({"config.json": json.dumps(CONFIG).encode(), "model.safetensors.index.json": index, **shards})


TWO_SHARDS = {
    "one.safetensors": safetensors({"a": A}, 24),
    "two.safetensors": safetensors({"b": {**B, "data_offsets": [0, 8]}}, 8),
}


def mixtral(
    *, blocks: int = 4, experts: int = 8, hidden: int = 64, width: int = 128, kv: int = 32, vocabulary: int = 96, top_k: int = 2
) -> tuple[Config, Tensors]:
    """Return a Mixtral of bf16 tensors; every block is a mixture."""
    config = {
        "model_type": "mixtral", "num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": width,
        "num_local_experts": experts, "num_experts_per_tok": top_k, "tie_word_embeddings": False, "sliding_window": None,
    }  # fmt: skip
    tensors = _outside(hidden, vocabulary)
    for index in range(blocks):
        block = _attention(hidden, kv)
        block["block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            block |= _matrices(f"block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), hidden, width)
        tensors |= _named(index, block)
    return config, tensors


def qwen(
    *, blocks: int = 4, experts: int = 8, hidden: int = 64, width: int = 128, dense: tuple[int, ...] = (0,)
) -> tuple[Config, Tensors]:
    """Return a Qwen2-MoE with shared experts, whose blocks in ``dense`` have no experts."""
    config = {
        "model_type": "qwen2_moe", "num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": 192,
        "moe_intermediate_size": width, "shared_expert_intermediate_size": 192, "num_experts": experts,
        "num_experts_per_tok": 2, "mlp_only_layers": list(dense), "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = _outside(hidden, 96)
    for index in range(blocks):
        block = _attention(hidden, 32)
        if index in dense:
            block |= _matrices("mlp", _NAMES, hidden, 192)
        else:
            block |= {"mlp.gate.weight": (experts, hidden), "mlp.shared_expert_gate.weight": (1, hidden)}
            block |= _matrices("mlp.shared_expert", _NAMES, hidden, 192)
            for expert in range(experts):
                block |= _matrices(f"mlp.experts.{expert}", _NAMES, hidden, width)
        tensors |= _named(index, block)
    return config, tensors


def deepseek(
    *,
    blocks: int = 4,
    experts: int = 16,
    hidden: int = 64,
    width: int = 128,
    top_k: int = 2,
    groups: int = 4,
    groups_used: int = 2,
    latent: int = 64,
    rotary: int = 16,
    mtp: int = 1,
) -> tuple[Config, Tensors]:
    """Return a DeepSeek-V3 with one dense block, group-limited routing and ``mtp`` blocks past the last."""
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": 192,
        "moe_intermediate_size": width, "n_routed_experts": experts, "num_experts_per_tok": top_k, "n_group": groups,
        "topk_group": groups_used, "first_k_dense_replace": 1, "kv_lora_rank": latent, "qk_rope_head_dim": rotary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = _outside(hidden, 96)
    for index in range(blocks + mtp):
        block = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (4 * 32, hidden), "self_attn.kv_a_proj_with_mqa.weight": (latent + rotary, hidden),
            "self_attn.kv_a_layernorm.weight": (latent,), "self_attn.kv_b_proj.weight": (4 * 48, latent),
            "self_attn.o_proj.weight": (hidden, 128),
        }  # fmt: skip
        if index == 0:
            block |= _matrices("mlp", _NAMES, hidden, 192)
        else:
            block["mlp.gate.weight"] = (experts, hidden)
            block |= _matrices("mlp.shared_experts", _NAMES, hidden, width)
            for expert in range(experts):
                block |= _matrices(f"mlp.experts.{expert}", _NAMES, hidden, width)
        tensors |= _named(index, block)
        if index:
            tensors[f"model.layers.{index}.mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
    return config, tensors


def gpt_oss(*, blocks: int = 4, experts: int = 8, hidden: int = 64, width: int = 128) -> tuple[Config, Tensors]:
    """Return a gpt_oss: experts saved as one tensor per matrix, sliding and full attention in turn."""
    config = {
        "model_type": "gpt_oss", "num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": width,
        "num_local_experts": experts, "num_experts_per_tok": 2, "tie_word_embeddings": False, "sliding_window": 8,
        "layer_types": ["full_attention" if index % 2 else "sliding_attention" for index in range(blocks)],
    }  # fmt: skip
    tensors = _outside(hidden, 96)
    for index in range(blocks):
        block = _attention(hidden, 32) | {
            "self_attn.sinks": (4,), "mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,),
            "mlp.experts.gate_up_proj": (experts, hidden, 2 * width), "mlp.experts.gate_up_proj_bias": (experts, 2 * width),
            "mlp.experts.down_proj": (experts, width, hidden), "mlp.experts.down_proj_bias": (experts, hidden),
        }  # fmt: skip
        tensors |= _named(index, block)
    return config, tensors


_NAMES = ("gate_proj", "up_proj", "down_proj")
_Shapes = dict[str, tuple[int, ...]]


def _outside(hidden: int, vocabulary: int) -> Tensors:
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    return {f"{name}.weight": ("BF16", shape) for name, shape in shapes.items()}


def _attention(hidden: int, kv: int) -> _Shapes:
    return {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden), "self_attn.o_proj.weight": (hidden, hidden),
    }  # fmt: skip


def _matrices(prefix: str, names: tuple[str, str, str], hidden: int, width: int) -> _Shapes:
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


def _named(index: int, block: _Shapes) -> Tensors:
    return {f"model.layers.{index}.{place}": ("BF16", shape) for place, shape in block.items()}
