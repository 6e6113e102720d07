"""The table: where each ``model_type`` keeps its blocks, router and experts, and how its config counts them.

An architecture is data: one frozen record, listed by hand, each proved by tests that run over the whole table.
Names are those in saved files (below a block) unless they are called running, which means the
attribute path inside a live stock block. transformers merges per-expert matrices into one fused parameter
when it loads them; ``fused_on_disk`` marks the families that save the fused tensors themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, cast

from compression.errors import BrokenCheckpoint, NotAMoE, UnsupportedArchitecture

Component = Literal["experts", "attention", "router", "shared_experts", "dense", "embeddings", "other"]
COMPONENTS: tuple[Component, ...] = ("experts", "attention", "router", "shared_experts", "dense", "embeddings", "other")

EXPERT_COUNT_SPELLINGS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Every spelling of the expert count that engines read; whichever a source config holds is kept true."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model family, as its files and its stock class lay it out."""

    model_type: str
    expert_count_keys: tuple[str, ...]
    """Always written to config.json; other spellings are kept true when the source has them."""
    moe: str
    """The MoE layer below a block in saved names; its experts sit at ``{moe}.experts``."""
    layers: str = "model.layers"
    """Saved name of the list of blocks; in a model of several towers, that of the language model."""
    head: str = "lm_head"
    text_config: tuple[str, ...] = ()
    """Where config.json keeps the settings of the language model: keys from the outside in, none where they lie on top."""
    router: str = "gate"
    """The router below the MoE layer in saved names."""
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Saved names of an expert's three matrices."""
    running_experts: str = "mlp.experts"
    """Path of the experts module inside a live block; called with tokens, chosen experts, routing weights."""
    running_router: str = "mlp.gate"
    fused_on_disk: bool = False
    shared_experts: tuple[str, ...] = ()
    """Modules below the MoE layer that run for every token."""
    group_keys: tuple[str, str] | None = None
    """Config keys of group-limited routing: number of groups, groups used per token."""
    group_members: int = 1
    """Experts whose scores make up a group's own score; a group must keep that many."""
    per_layer_lists: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    """Config lists with one entry per block, cut with it."""
    dense_prefix_key: str | None = None
    """Config key counting the dense blocks at the start."""
    dense_list_key: str | None = None
    """Config key listing the indices of dense blocks."""
    sparse_step_key: str | None = None
    """Config key saying that every n-th block is a mixture."""
    expert_width_key: str = "moe_intermediate_size"
    gating: Literal["exact", "clamped"] = "exact"
    """Whether a scale on ``up_proj`` passes through act(gate) * up unchanged."""
    gate_and_up: Literal["halves", "alternating"] = "halves"
    """How the rows of gate and up lie in a fused matrix."""
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    """How the router turns its logits into probabilities."""
    feed_forward_norm: str = "post_attention_layernorm"
    """The norm that router, experts, shared experts or dense layer read, and nothing else does."""
    attention_norms: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")),
        ("self_attn.q_a_layernorm", ("q_b_proj",)),
        ("self_attn.kv_a_layernorm", ("kv_b_proj",)),
    )
    """Norms with those projections of ``self_attn`` that read them, where the family has them, and nothing else does."""
    latent_attention: bool = False
    """Whether the key-value cache holds a compressed latent (multi-head latent attention)."""
    window: Literal["listed", "everywhere", "flagged"] = "listed"
    """Blocks that sliding_window holds for: those that layer_types lists, all, or all where use_sliding_window is set."""

    def component_of(self, name: str) -> Component:
        """Return the component that a saved tensor belongs to."""
        block = self.block_of(name)
        if block is None:
            return "embeddings" if name.startswith((f"{self.embedding}.", f"{self.head}.")) else "other"
        rest = self.place_of(name)
        if rest.startswith("self_attn."):
            return "attention"
        if rest.startswith(f"{self.moe}.experts."):
            return "experts"
        if rest.startswith(f"{self.moe}.{self.router}."):
            return "router"
        if any(rest.startswith(f"{self.moe}.{shared}.") for shared in self.shared_experts):
            return "shared_experts"
        return "dense" if rest.startswith("mlp.") else "other"

    def block_of(self, name: str) -> int | None:
        """Return the index of the block that a saved tensor belongs to; None outside the blocks."""
        match = re.match(r"\.(\d+)\.", name[len(self.layers) :]) if name.startswith(self.layers) else None
        return int(match[1]) if match else None

    def place_of(self, name: str) -> str:
        """Return the name, below its block, of a saved tensor that belongs to one."""
        return name[len(self.layers) + 1 :].split(".", 1)[1]

    def prefix(self, block: int) -> str:
        """Return what the saved names of a block's tensors begin with."""
        return f"{self.layers}.{block}."

    def router_name(self, block: int) -> str:
        """Return the saved name of a block's router weight [experts, width]."""
        return f"{self.prefix(block)}{self.moe}.{self.router}.weight"

    def experts_prefix(self, block: int) -> str:
        """Return the saved name under which a block's experts are kept."""
        return f"{self.prefix(block)}{self.moe}.experts"

    @property
    def embedding(self) -> str:
        """The saved name of the token embedding, without ``.weight``."""
        return f"{self.layers.removesuffix('layers')}embed_tokens"

    def settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the language model's settings out of a config.json."""
        found: object = config
        for key in self.text_config:
            found = cast("Mapping[str, object]", found).get(key)
            if not isinstance(found, Mapping):
                raise BrokenCheckpoint(f"config.json has no object {'.'.join(self.text_config)}")
        return cast("Mapping[str, Any]", found)

    def changed(self, config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a config.json with some of the language model's settings changed."""
        after = deepcopy(dict(config))
        inside: dict[str, Any] = after
        for key in self.text_config:
            inside = inside[key]
        inside.update(changes)
        return after

    def block_count(self, config: Mapping[str, Any]) -> int:
        """Return how many blocks a checked config.json declares."""
        return int(self.settings(config)["num_hidden_layers"])

    def expert_of(self, name: str) -> int | None:
        """Return which expert a saved tensor belongs to; None for all else, and for fused tensors."""
        match = re.search(rf"\.{self.moe}\.experts\.(\d+)\.", name)
        return int(match[1]) if match and not self.fused_on_disk else None


_DEEPSEEK: dict[str, Any] = {
    "moe": "mlp",
    "shared_experts": ("shared_experts",),
    "group_keys": ("n_group", "topk_group"),
    "dense_prefix_key": "first_k_dense_replace",
    "latent_attention": True,
}
_QWEN: dict[str, Any] = {"moe": "mlp", "dense_list_key": "mlp_only_layers", "sparse_step_key": "decoder_sparse_step"}

ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture(
            "mixtral",
            ("num_local_experts",),
            moe="block_sparse_moe",
            gate_up_down=("w1", "w3", "w2"),
            expert_width_key="intermediate_size",
            window="everywhere",
        ),
        Architecture("qwen2_moe", ("num_experts",), shared_experts=("shared_expert", "shared_expert_gate"), **_QWEN),
        # transformers 5.23 saves num_local_experts and drops num_experts, which older engines read: write both.
        Architecture("qwen3_moe", ("num_experts", "num_local_experts"), window="flagged", **_QWEN),
        Architecture("olmoe", ("num_experts",), moe="mlp", expert_width_key="intermediate_size"),
        Architecture("deepseek_v2", ("n_routed_experts",), **_DEEPSEEK),
        Architecture("deepseek_v3", ("n_routed_experts",), group_members=2, router_scores="sigmoid", **_DEEPSEEK),
        Architecture(
            "gpt_oss",
            ("num_local_experts",),
            moe="mlp",
            router="router",
            running_router="mlp.router",
            fused_on_disk=True,
            expert_width_key="intermediate_size",
            gating="clamped",
            gate_and_up="alternating",
        ),
        Architecture(
            "phimoe",
            ("num_local_experts",),
            moe="block_sparse_moe",
            running_router="mlp.router",
            gate_up_down=("w1", "w3", "w2"),
            expert_width_key="intermediate_size",
            window="everywhere",
        ),
    )
}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the row for a config.json.

    Raises UnsupportedArchitecture for a mixture without a row, NotAMoE for a model without experts.
    """
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is not None:
        return row
    supported = ", ".join(sorted(ARCHITECTURES))
    if any(key in config for key in EXPERT_COUNT_SPELLINGS):
        raise UnsupportedArchitecture(f"model_type {model_type!r} is not supported; supported: {supported}")
    raise NotAMoE(f"model_type {model_type!r} has no routed experts to compress; supported mixtures: {supported}")


def expert_count(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """Return the number of routed experts that the config declares."""
    for key in (*architecture.expert_count_keys, *EXPERT_COUNT_SPELLINGS):
        value = architecture.settings(config).get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    spellings = ", ".join(architecture.expert_count_keys)
    raise BrokenCheckpoint(f"config.json does not say how many experts there are ({spellings})")
