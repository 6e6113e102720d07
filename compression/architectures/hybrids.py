"""Families whose blocks are not all alike, or whose experts are saved as Granite saves them, a row each.

What stands in for attention in some blocks is linear attention, a convolution or a state-space layer.
"""

from __future__ import annotations

from typing import Any

from compression.architectures.families import MIXED, NORM_READERS, TYPED
from compression.architectures.record import Architecture

_CENTRED = "its norms multiply by one more than their weight, so a scale cannot be taken out of them"
_LINEAR: tuple[str, ...] = ("self_attn", "linear_attn")
_GRANITE: dict[str, Any] = {
    "moe": "block_sparse_moe",
    "router": "router.layer",
    "running_experts": "block_sparse_moe.experts",
    "running_router": "block_sparse_moe.router",
    "fused_on_disk": True,
    "fused_matrices": ("input_linear.weight", "output_linear.weight"),
    "fused_layouts": ("outputs first",),
    "expert_width_key": "intermediate_size",
    "refuses": {"prune": "all experts of a layer lie in one 3-D tensor of a layout in which nothing is pruned"},
}
_FUSED_SHARED: dict[str, Any] = {**_GRANITE, "shared_beside": ("shared_mlp",)}
_GRANITE_SWA: dict[str, Any] = {
    **_FUSED_SHARED,
    "router": "router",
    "fused_matrices": ("experts.gate_up_proj", "experts.down_proj"),
}
_QWEN_NEXT: dict[str, Any] = {
    "moe": "mlp",
    "shared_experts": ("shared_expert", "shared_expert_gate"),
    "attention": _LINEAR,
    "varied_blocks": True,
    "refuses": {"awq": _CENTRED, "attention": MIXED},
}
_KIMI: dict[str, Any] = {
    "shared_experts": ("shared_experts",),
    "group_keys": ("num_expert_group", "topk_group"),
    "group_members": 2,
    "top_k_key": "num_experts_per_token",
    "router_scores": "sigmoid",
    "latent_attention": True,
    "varied_blocks": True,
    "refuses": {"quantize": "the stock loader cannot join its convolutions once experts are packed"},
    **TYPED,
}

HYBRIDS: tuple[Architecture, ...] = (
    Architecture(
        "minimax",
        ("num_local_experts",),
        moe="block_sparse_moe",
        gate_up_down=("w1", "w3", "w2"),
        expert_width_key="intermediate_size",
        varied_blocks=True,
        layer_entry="mlp",
        refuses={
            "awq": NORM_READERS,
            "attention": MIXED,
            "layer_drop": "what its norm gives is also what is carried on, so it cannot go with the MoE layer",
        },
    ),
    Architecture(
        "kimi_linear", ("num_experts",), moe="block_sparse_moe", gate_up_down=("w1", "w3", "w2"), dense_prefix=1, **_KIMI
    ),
    Architecture(
        "bailing_hybrid",
        ("num_experts",),
        moe="mlp",
        attention=("attention",),
        running_names=(("attention", "self_attn"),),
        embed_tokens="word_embeddings",
        dense_prefix=2,
        **_KIMI,
    ),
    Architecture(
        "lfm2_moe",
        ("num_experts",),
        moe="feed_forward",
        running_experts="feed_forward.experts",
        running_router="feed_forward.gate",
        beside_router=("feed_forward.expert_bias",),
        gate_up_down=("w1", "w3", "w2"),
        final_norm="embedding_norm",
        attention=("self_attn", "conv"),
        varied_blocks=True,
        dense_prefix_key="num_dense_layers",
        dense_prefix=2,
        router_scores="sigmoid",
        feed_forward_norm="ffn_norm",
        tied=True,
        dense_matrices=r"feed_forward\.w[123]",
        refuses={"awq": NORM_READERS, "attention": MIXED},
    ),
    Architecture(
        "jamba",
        ("num_experts",),
        moe="feed_forward",
        router="router",
        running_experts="feed_forward.experts",
        running_router="feed_forward.router",
        final_norm="final_layernorm",
        attention=("self_attn", "mamba"),
        varied_blocks=True,
        mixture_period=(("expert_layer_period", 2), ("expert_layer_offset", 1)),
        dense_matrices=r"feed_forward\.(gate|up|down)_proj",
        per_layer_lists=(),
        feed_forward_norm="pre_ff_layernorm",
        period_keys=("attn_layer_period", "expert_layer_period"),
        expert_width_key="intermediate_size",
        refuses={
            "awq": NORM_READERS,
            "attention": MIXED,
            "block_drop": "its config says by a period of which kind a block is, and none is left once a block is gone",
        },
    ),
    Architecture(
        "qwen3_next", ("num_experts",), dense_list_key="mlp_only_layers", sparse_step_key="decoder_sparse_step", **_QWEN_NEXT
    ),
    Architecture("qwen3_5_moe_text", ("num_experts",), **_QWEN_NEXT),
    Architecture(
        "qwen3_5_moe",
        ("num_experts",),
        layers="model.language_model.layers",
        text_config=("text_config",),
        untouched=("visual",),
        **_QWEN_NEXT,
    ),
    Architecture("granitemoe", ("num_local_experts",), **_GRANITE),
    Architecture("granitemoeshared", ("num_local_experts",), **_FUSED_SHARED),
    Architecture(
        "granitemoehybrid", ("num_local_experts",), **_FUSED_SHARED, attention=("self_attn", "mamba"), varied_blocks=True
    ),
    Architecture(
        "granitemoe_swa",
        ("num_local_experts",),
        per_layer_lists=("layer_types", "layer_rope_theta"),
        **_GRANITE_SWA,
    ),
)
