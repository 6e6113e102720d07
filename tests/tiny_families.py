"""Settings of the tiny checkpoints beyond the eight families that every heavy test runs over.

Made by the rules of ``tiny_models.py``: rotary width 16 or more, a window shorter than the sequences, every kind of block
that the family has. Each function takes the number of blocks and returns what is special about the family's config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_WIDTH = 128
_DENSE = 192
_SHARED = 96
_EXPERTS = 8
_WINDOW = 8
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _pattern(kinds: tuple[str, ...], blocks: int) -> list[str]:
    return [kinds[block % len(kinds)] for block in range(blocks)]


def _one_dense(blocks: int) -> list[str]:
    return ["dense", *["sparse"] * (blocks - 1)]


def _windows(blocks: int) -> dict[str, Any]:
    return {"layer_types": _pattern(("sliding_attention", "full_attention"), blocks), "sliding_window": _WINDOW}


def _typed_rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {kind: {**_ROPE, **more} for kind in ("full_attention", "sliding_attention")}}


def _deepseek_like(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "n_routed_experts": _EXPERTS,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
    }


def _latent(blocks: int) -> dict[str, Any]:
    heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 4}
    return {**_deepseek_like(blocks), **heads, "q_lora_rank": 64, "kv_lora_rank": 64, "mlp_layer_types": _one_dense(blocks)}


def _glm4_moe(blocks: int) -> dict[str, Any]:
    return {**_deepseek_like(blocks), "head_dim": 32, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True}


def _dots1(blocks: int) -> dict[str, Any]:
    return {**_deepseek_like(blocks), "head_dim": 32, "first_k_dense_replace": 1, **_windows(blocks)}


def _solar_open(blocks: int) -> dict[str, Any]:
    special = {key: value for key, value in _deepseek_like(blocks).items() if key != "intermediate_size"}
    return {**special, "head_dim": 32}


def _deepseek_v32(blocks: int) -> dict[str, Any]:
    # Four keys of sixteen or more tokens: what the indexer leaves out is felt.
    return {**_latent(blocks), "index_topk": 4, "index_n_heads": 2, "index_head_dim": 32}


def _axk2(blocks: int) -> dict[str, Any]:
    return {**_deepseek_v32(blocks), "gated_norm_rank": 16}


def _exaone_moe(blocks: int) -> dict[str, Any]:
    special = {**_deepseek_like(blocks), "num_experts": _EXPERTS, "num_shared_experts": 1, "mlp_layer_types": _one_dense(blocks)}
    del special["n_routed_experts"], special["n_shared_experts"]
    return {**special, **_windows(blocks), "head_dim": 32}


def _mimo_v2_flash(blocks: int) -> dict[str, Any]:
    special = {**_deepseek_like(blocks), "mlp_layer_types": _one_dense(blocks), **_windows(blocks), **_typed_rope()}
    del special["n_shared_experts"]
    return {**special, "head_dim": 32, "v_head_dim": 16}


def _minimax_m2(blocks: int) -> dict[str, Any]:
    return {"intermediate_size": _WIDTH, "num_local_experts": _EXPERTS, "head_dim": 32}


def _minimax(blocks: int) -> dict[str, Any]:
    special = {"intermediate_size": _WIDTH, "num_local_experts": _EXPERTS, "head_dim": 32, "block_size": 16}
    return {**special, "layer_types": _pattern(("full_attention", "linear_attention"), blocks)}


def _ernie4_5_moe(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "moe_num_experts": _EXPERTS,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "use_bias": True,
    }


def _hy_v3(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "num_shared_experts": 1,
        "head_dim": 32,
        "mlp_layer_types": _one_dense(blocks),
    }


def _laguna(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "shared_expert_intermediate_size": _SHARED,
        "head_dim": 32,
        "mlp_layer_types": _one_dense(blocks),
        "num_attention_heads_per_layer": [4 if block % 2 else 2 for block in range(blocks)],
        **_windows(blocks),
        **_typed_rope(partial_rotary_factor=1.0),
    }


def _afmoe(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "head_dim": 32,
        "route_scale": 1.5,
        **_windows(blocks),
    }


def _kolibri1(blocks: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "shared_expert_intermediate_size": _SHARED,
        "head_dim": 32,
        **_windows(blocks),
    }


def _linear_kimi(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "num_expert_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "layer_types": _pattern(("linear_attention", "full_attention"), blocks),
        "mlp_layer_types": _one_dense(blocks),
    }


def _kimi_linear(blocks: int) -> dict[str, Any]:
    return {**_linear_kimi(blocks), "linear_head_dim": 16, "linear_num_heads": 4}


def _bailing_hybrid(blocks: int) -> dict[str, Any]:
    return {**_linear_kimi(blocks), "head_dim": 32, "first_k_dense_replace": 1}


def _lfm2_moe(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "num_dense_layers": 1,
        "layer_types": _pattern(("conv", "full_attention"), blocks),
    }


def _jamba(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }


def _cohere2_moe(blocks: int) -> dict[str, Any]:
    special = {"intermediate_size": _WIDTH, "num_experts": _EXPERTS, "num_shared_experts": 1, "head_dim": 32}
    return {**special, "mlp_layer_types": _one_dense(blocks), **_windows(blocks)}


def _hunyuan_v1_moe(blocks: int) -> dict[str, Any]:
    return {"intermediate_size": _WIDTH, "num_experts": _EXPERTS, "moe_topk": 2, "head_dim": 32, "attention_bias": True}


def _flex_olmo(blocks: int) -> dict[str, Any]:
    return {"intermediate_size": _WIDTH, "num_experts": _EXPERTS}


def _mellum(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "head_dim": 32,
        "mlp_layer_types": _one_dense(blocks),
        **_windows(blocks),
        **_typed_rope(),
    }


def _flint(blocks: int) -> dict[str, Any]:
    return {
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "shared_expert_intermediate_size": _SHARED,
        "head_dim": 32,
        "mlp_only_layers": [0],
        **_windows(blocks),
    }


def _qwen3_next(blocks: int) -> dict[str, Any]:
    return {**_qwen3_5_moe_text(blocks), "intermediate_size": _DENSE}


def _qwen3_5_moe_text(blocks: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": _WIDTH,
        "num_experts": _EXPERTS,
        "shared_expert_intermediate_size": _SHARED,
        "head_dim": 64,  # a quarter of it is rotary
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": _pattern(("linear_attention", "full_attention"), blocks),
    }


def _granitemoe(blocks: int) -> dict[str, Any]:
    scales = {"embedding_multiplier": 1.5, "attention_multiplier": 0.3, "residual_multiplier": 0.8, "logits_scaling": 2.0}
    return {"intermediate_size": _WIDTH, "num_local_experts": _EXPERTS, **scales}


def _granitemoeshared(blocks: int) -> dict[str, Any]:
    return {**_granitemoe(blocks), "shared_intermediate_size": _SHARED}


def _granitemoehybrid(blocks: int) -> dict[str, Any]:
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
    return {**_granitemoeshared(blocks), **mamba, "layer_types": _pattern(("linear_attention", "full_attention"), blocks)}


def _granitemoe_swa(blocks: int) -> dict[str, Any]:
    # A base of 0 switches rotation off: the list must be cut with the blocks.
    return {
        **_granitemoeshared(blocks),
        **_windows(blocks),
        "layer_rope_theta": [(5000.0, 10000.0, 0.0)[b % 3] for b in range(blocks)],
    }


def _qwen3_vl_moe(blocks: int) -> dict[str, Any]:
    return {"text_config": _tower_text(blocks), "vision_config": _VISION, **_VISION_TOKENS}


def _qwen3_5_moe(blocks: int) -> dict[str, Any]:
    text = {**_tower_text(blocks), **_qwen3_5_moe_text(blocks)}
    del text["mlp_only_layers"], text["intermediate_size"]
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25}
    vision = {key: value for key, value in _VISION.items() if key != "deepstack_visual_indexes"}
    return {"text_config": text, "vision_config": vision, **_VISION_TOKENS}


def _qwen3_omni_moe(blocks: int) -> dict[str, Any]:
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "output_dim": 64,
        "num_mel_bins": 16,
        "downsample_hidden_size": 16,
        "max_source_positions": 32,
    }
    tokens = {"image_token_id": 380, "video_token_id": 381, "audio_token_id": 379, "vision_start_token_id": 382}
    thinker = {"text_config": _tower_text(blocks), "vision_config": _VISION, "audio_config": audio, **tokens}
    return {"thinker_config": {**thinker, "audio_start_token_id": 378}, "enable_audio_output": False}


_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_VISION_TOKENS = {"image_token_id": 380, "video_token_id": 381, "vision_start_token_id": 382, "vision_end_token_id": 383}


def _tower_text(blocks: int) -> dict[str, Any]:
    return {
        "vocab_size": 384,
        "hidden_size": 64,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": _EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": _DENSE,
        "moe_intermediate_size": _WIDTH,
        "mlp_only_layers": [0],
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    }


FAMILIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "glm4_moe": _glm4_moe,
    "dots1": _dots1,
    "solar_open": _solar_open,
    "glm4_moe_lite": _latent,
    "axk1": _latent,
    "deepseek_v32": _deepseek_v32,
    "axk2": _axk2,
    "exaone_moe": _exaone_moe,
    "mimo_v2_flash": _mimo_v2_flash,
    "minimax_m2": _minimax_m2,
    "minimax": _minimax,
    "ernie4_5_moe": _ernie4_5_moe,
    "hy_v3": _hy_v3,
    "laguna": _laguna,
    "afmoe": _afmoe,
    "kolibri1": _kolibri1,
    "kimi_linear": _kimi_linear,
    "bailing_hybrid": _bailing_hybrid,
    "lfm2_moe": _lfm2_moe,
    "jamba": _jamba,
    "cohere2_moe": _cohere2_moe,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "flex_olmo": _flex_olmo,
    "mellum": _mellum,
    "flint": _flint,
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe_text": _qwen3_5_moe_text,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoeshared,
    "granitemoehybrid": _granitemoehybrid,
    "granitemoe_swa": _granitemoe_swa,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_omni_moe": _qwen3_omni_moe,
    "qwen3_5_moe": _qwen3_5_moe,
}
