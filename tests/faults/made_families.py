"""A small model of headers alone for every row of the architecture table, written from the row itself.

The planner's torch-free half accepts each of them, which makes them the ground on which hostile changes are tried.
"""

from __future__ import annotations

from typing import Any

from compression.architectures import ARCHITECTURES, Architecture
from compression.planner.inventory import expected_mixtures
from tests.compression.made_checkpoints import Config, Tensors

BLOCKS, EXPERTS, HIDDEN, WIDTH, VOCABULARY = 4, 8, 64, 64, 96
FAMILIES = tuple(sorted(ARCHITECTURES))


def made(model_type: str) -> tuple[Config, Tensors]:
    """Return config.json and the tensors of a small model of this family."""
    row = ARCHITECTURES[model_type]
    settings = _settings(row)
    tensors: dict[str, tuple[int, ...]] = {
        f"{row.embedding}.weight": (VOCABULARY, HIDDEN), f"{row.norm}.weight": (HIDDEN,),
        f"{row.head}.weight": (VOCABULARY, HIDDEN),
    }  # fmt: skip
    for block, mixture in enumerate(expected_mixtures(row, settings, BLOCKS)):
        places = _attention(row) | (_mixture(row) if mixture else _matrices(_dense_place(row), row))
        tensors |= {f"{row.prefix(block)}{place}": shape for place, shape in places.items()}
    config: dict[str, Any] = settings
    for key in reversed(row.text_config):
        config = {key: config}
    return {**config, "model_type": model_type}, {name: ("BF16", shape) for name, shape in tensors.items()}


def _settings(row: Architecture) -> Config:
    config: Config = {
        "hidden_size": HIDDEN, "intermediate_size": WIDTH, row.expert_width_key: WIDTH, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY, row.top_k_key: 2,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"] * (BLOCKS // 2),
    }  # fmt: skip
    config |= dict.fromkeys(row.expert_count_keys, EXPERTS)
    if row.group_keys is not None:
        config |= {row.group_keys[0]: 2, row.group_keys[1]: 1}
    if row.dense_prefix_key is not None:
        config[row.dense_prefix_key] = 1
    if row.dense_types_key is not None:
        config[row.dense_types_key] = ["dense", *["sparse"] * (BLOCKS - 1)]
    if row.dense_list_key is not None:
        config[row.dense_list_key] = [0]
    return config


def _attention(row: Architecture) -> dict[str, tuple[int, ...]]:
    own = row.attention[0]
    keys = {"kv_a_proj_with_mqa": 24, "indexer.wk": 8} if row.latent_attention else {"k_proj": 32, "v_proj": 32}
    places = {f"{own}.{name}.weight": (rows, HIDDEN) for name, rows in {"q_proj": HIDDEN, "o_proj": HIDDEN, **keys}.items()}
    return {**places, "input_layernorm.weight": (HIDDEN,), f"{row.feed_forward_norm}.weight": (HIDDEN,)}


def _mixture(row: Architecture) -> dict[str, tuple[int, ...]]:
    places: dict[str, tuple[int, ...]] = {f"{row.moe}.{row.router}.weight": (EXPERTS, HIDDEN)}
    places |= dict.fromkeys(row.beside_router, (EXPERTS,))
    if row.fused_on_disk:
        shapes = ((EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN))
        for place, (experts, inputs, outputs) in zip(row.fused_places, shapes, strict=True):
            straight = "inputs first" in row.fused_layouts
            places[place] = (experts, inputs, outputs) if straight else (experts, outputs, inputs)
    else:
        for expert in range(EXPERTS):
            places |= _matrices(f"{row.moe}.experts.{expert}", row)
    for module in (*(f"{row.moe}.{shared}" for shared in row.shared_experts), *row.shared_beside):
        places |= {f"{module}.weight": (1, HIDDEN)} if module.endswith("_gate") else _matrices(module, row)
    return places


def _dense_place(row: Architecture) -> str:
    return row.moe if row.moe == "feed_forward" else "mlp"


def _matrices(prefix: str, row: Architecture) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{prefix}.{name}.weight" for name in row.gate_up_down)
    return {gate: (WIDTH, HIDDEN), up: (WIDTH, HIDDEN), down: (HIDDEN, WIDTH)}
