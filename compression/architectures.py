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
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from compression.errors import BrokenCheckpoint, NotAMoE, UnsupportedArchitecture

Component = Literal["experts", "attention", "router", "shared_experts", "dense", "embeddings", "other"]
COMPONENTS: tuple[Component, ...] = ("experts", "attention", "router", "shared_experts", "dense", "embeddings", "other")

Refusable = Literal["quantize", "awq", "attention", "shared_experts", "dense", "block_drop", "layer_drop", "prune"]

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
    embed_tokens: str = "embed_tokens"
    """The token embedding beside the list of blocks in saved names."""
    final_norm: str = "norm"
    """The norm behind the last block, beside the list of blocks in saved names."""
    text_config: tuple[str, ...] = ()
    """Where config.json keeps the settings of the language model: keys from the outside in, none where they lie on top."""
    running_language_model: str = ""
    """Path, inside the live stock model, of the part that makes logits of tokens; empty where it is the whole."""
    router: str = "gate"
    """The router below the MoE layer in saved names."""
    beside_router: tuple[str, ...] = ()
    """Tensors below a block that count experts in their last dimension and are cut with the router."""
    top_k_key: str = "num_experts_per_tok"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Saved names of an expert's three matrices."""
    running_experts: str = "mlp.experts"
    """Path of the experts module inside a live block; called with tokens, chosen experts, routing weights."""
    running_router: str = "mlp.gate"
    layer_returns: int = 1
    """How many values a live MoE layer returns; the first is what it adds to the residual stream."""
    fused_on_disk: bool = False
    fused_matrices: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    """Below the MoE layer, the two tensors that hold all experts where they are saved fused."""
    fused_layouts: tuple[Literal["inputs first", "outputs first"], ...] = ("inputs first",)
    """How fused tensors are saved, behind the dimension that counts experts."""
    attention: tuple[str, ...] = ("self_attn",)
    """Modules below a block that mix tokens, one of them in each block: attention proper, and what stands in for it."""
    running_names: tuple[tuple[str, str], ...] = ()
    """Modules below a block that a live block names otherwise than the files, besides the MoE layer: saved and running."""
    varied_blocks: bool = False
    """Whether blocks differ in more than their feed-forward half: attention of several kinds, norms of mixtures alone."""
    shared_experts: tuple[str, ...] = ()
    """Modules below the MoE layer that run for every token."""
    shared_beside: tuple[str, ...] = ()
    """Modules below the block that do."""
    group_keys: tuple[str, str] | None = None
    """Config keys of group-limited routing: number of groups, groups used per token."""
    group_members: int = 1
    """Experts whose scores make up a group's own score; a group must keep that many."""
    per_layer_lists: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    """Config lists with one entry per block, cut with it."""
    period_keys: tuple[str, ...] = ()
    """Config keys of the periods after which blocks repeat, where no list names the kind of each."""
    dense_prefix_key: str | None = None
    """Config key counting the dense blocks at the start."""
    dense_prefix: int = 0
    """How many they are where config.json does not say so."""
    dense_types_key: str | None = None
    """Config key listing "dense" or "sparse" for every block; where it is absent, the count holds."""
    dense_list_key: str | None = None
    """Config key listing the indices of dense blocks."""
    sparse_step_key: str | None = None
    """Config key saying that every n-th block is a mixture."""
    dense_matrices: str = r"mlp\.(gate|up|down)_proj"
    """Pattern of the linear layers of a dense block, by saved and by running name."""
    mixture_period: tuple[tuple[str, int], tuple[str, int]] | None = None
    """Config keys, with what holds in their absence, of how far mixtures are apart and of the first of them."""
    expert_width_key: str = "moe_intermediate_size"
    gating: Literal["exact", "clamped"] = "exact"
    """Whether a scale on ``up_proj`` passes through act(gate) * up unchanged."""
    gate_and_up: Literal["halves", "alternating"] = "halves"
    """How the rows of gate and up lie in a fused matrix."""
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    """How the router turns its logits into probabilities."""
    feed_forward_norm: str = "post_attention_layernorm"
    """The norm that goes with the MoE layer or dense layer: they alone read it, or it alone reads them."""
    layer_entry: str | None = None
    """Live module that is given the residual stream as it is before the MoE layer; the norm above where there is no other."""
    parallel: bool = False
    """Whether attention and MoE layer stand side by side: both read one norm, and both are added to the residual stream."""
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

    tied: bool = False
    """Whether the head is the embedding where config.json does not say so."""
    untouched: tuple[str, ...] = ()
    """Running names of modules that hold linear layers of no component: other towers, norms with a gate."""
    refuses: Mapping[Refusable, str] = field(default_factory=dict[Refusable, str])
    """What is not done to this family, each with the reason."""

    def component_of(self, name: str) -> Component:
        """Return the component that a saved tensor belongs to."""
        block = self.block_of(name)
        if block is None:
            return "embeddings" if name.startswith((f"{self.embedding}.", f"{self.head}.")) else "other"
        rest = self.place_of(name)
        if rest in self.beside_router:
            return "router"
        if rest.startswith(tuple(f"{module}." for module in self.attention)):
            return "attention"
        if rest in self.fused_places:
            return "experts"
        if rest.startswith(f"{self.moe}.experts."):
            return "experts"
        if rest.startswith(f"{self.moe}.{self.router}."):
            return "router"
        shared = (*(f"{self.moe}.{module}." for module in self.shared_experts), *(f"{module}." for module in self.shared_beside))
        if rest.startswith(shared):
            return "shared_experts"
        return "dense" if rest.startswith(("mlp.", f"{self.moe}.")) else "other"

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

    def expert_axis(self, name: str) -> int:
        """Return which dimension of a router's tensor, or of all experts' in one, counts the experts."""
        return -1 if self.place_of(name) in self.beside_router else 0

    @property
    def fused_places(self) -> tuple[str, ...]:
        """The names below a block of the tensors that hold all experts; none where each expert has its own."""
        return tuple(f"{self.moe}.{matrix}" for matrix in self.fused_matrices) if self.fused_on_disk else ()

    @property
    def running_moe(self) -> str:
        """Path of the MoE layer inside a live block."""
        return self.running_experts.removesuffix(".experts")

    def running_place(self, name: str) -> str:
        """Return the path inside a live block of what is saved under this name."""
        place = self.place_of(name)
        for written, running in (*self.running_names, (self.moe, self.running_moe)):
            if place.startswith(f"{written}."):
                return f"{running}{place[len(written) :]}"
        return place

    def names_of(self, module: str) -> tuple[str, ...]:
        """Return the last part of a module's name, as it is saved and as it is called in a live block."""
        running = {written.split(".")[-1]: name.split(".")[-1] for written, name in self.running_names}
        return (module, running[module]) if module in running else (module,)

    def experts_prefix(self, block: int) -> str:
        """Return the saved name under which a block's experts are kept."""
        return f"{self.prefix(block)}{self.moe}.experts"

    @property
    def embedding(self) -> str:
        """The saved name of the token embedding, without ``.weight``."""
        return f"{self.layers.removesuffix('layers')}{self.embed_tokens}"

    @property
    def norm(self) -> str:
        """The saved name of the norm behind the last block, without ``.weight``."""
        return f"{self.layers.removesuffix('layers')}{self.final_norm}"

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
        match = re.search(rf"\.{re.escape(self.moe)}\.experts\.(\d+)\.", name)
        return int(match[1]) if match and not self.fused_on_disk else None


_DEEPSEEK: dict[str, Any] = {
    "moe": "mlp",
    "shared_experts": ("shared_experts",),
    "group_keys": ("n_group", "topk_group"),
    "dense_prefix_key": "first_k_dense_replace",
    "latent_attention": True,
}
_NORM_READERS = "what else reads its norms is not on record, and a scale moved out of a norm must reach all of it"
_CENTRED = "its norms multiply by one more than their weight, so a scale cannot be taken out of them"
_MIXED = "its attention is not made of linear layers alone; leave it as it is"
_NEVER_CALLED = "its stock class never makes the call in which linear layers are unpacked; leave it as it is"
_LINEAR: tuple[str, ...] = ("self_attn", "linear_attn")
_TYPED: dict[str, Any] = {"dense_prefix_key": "first_k_dense_replace", "dense_types_key": "mlp_layer_types"}
_SIGMOID: dict[str, Any] = {"router_scores": "sigmoid", "refuses": {"awq": _NORM_READERS}}
_SHARED: dict[str, Any] = {"moe": "mlp", "shared_experts": ("shared_experts",)}
_GROUPS: dict[str, Any] = {"group_keys": ("n_group", "topk_group"), "group_members": 2}
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
    "refuses": {"awq": _CENTRED, "attention": _MIXED},
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
    **_TYPED,
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
            layer_returns=2,
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
        Architecture(
            "glm4_moe", ("n_routed_experts",), dense_prefix_key="first_k_dense_replace", **_SHARED, **_GROUPS, **_SIGMOID
        ),
        Architecture("dots1", ("n_routed_experts",), dense_prefix_key="first_k_dense_replace", **_SHARED, **_GROUPS, **_SIGMOID),
        Architecture("solar_open", ("n_routed_experts",), **_SHARED, **_GROUPS, **_SIGMOID),
        Architecture(
            "glm4_moe_lite",
            ("n_routed_experts",),
            dense_types_key="mlp_layer_types",
            dense_prefix=1,
            latent_attention=True,
            **_SHARED,
            **_GROUPS,
            **_SIGMOID,
        ),
        Architecture(
            "axk1",
            ("n_routed_experts",),
            dense_prefix=1,
            latent_attention=True,
            varied_blocks=True,
            **_SHARED,
            **_GROUPS,
            **_TYPED,
            router_scores="sigmoid",
            refuses={"awq": _NORM_READERS, "layer_drop": "a norm of its own stands inside the MoE layer of its live blocks"},
        ),
        Architecture(
            "deepseek_v32",
            ("n_routed_experts",),
            dense_prefix=3,
            latent_attention=True,
            router_scores="sigmoid",
            refuses={"awq": _NORM_READERS, "attention": _MIXED},
            **_SHARED,
            **_GROUPS,
            **_TYPED,
        ),
        Architecture(
            "axk2",
            ("n_routed_experts",),
            dense_prefix=1,
            latent_attention=True,
            varied_blocks=True,
            router_scores="sigmoid",
            untouched=("input_layernorm", "post_attention_layernorm"),
            refuses={"awq": _NORM_READERS, "attention": _MIXED},
            **_SHARED,
            **_GROUPS,
            **_TYPED,
        ),
        Architecture(
            "exaone_moe",
            ("num_experts",),
            beside_router=("mlp.e_score_correction_bias",),
            dense_prefix=1,
            **_SHARED,
            **_GROUPS,
            **_SIGMOID,
            **_TYPED,
        ),
        Architecture(
            "mimo_v2_flash",
            ("n_routed_experts",),
            moe="mlp",
            dense_types_key="mlp_layer_types",
            dense_prefix=1,
            varied_blocks=True,
            **_GROUPS,
            **_SIGMOID,
        ),
        Architecture(
            "minimax_m2",
            ("num_local_experts",),
            moe="block_sparse_moe",
            beside_router=("block_sparse_moe.e_score_correction_bias",),
            gate_up_down=("w1", "w3", "w2"),
            expert_width_key="intermediate_size",
            **_SIGMOID,
        ),
        Architecture(
            "minimax",
            ("num_local_experts",),
            moe="block_sparse_moe",
            gate_up_down=("w1", "w3", "w2"),
            expert_width_key="intermediate_size",
            varied_blocks=True,
            layer_entry="mlp",
            refuses={
                "awq": _NORM_READERS,
                "attention": _MIXED,
                "layer_drop": "what its norm gives is also what is carried on, so it cannot go with the MoE layer",
            },
        ),
        Architecture(
            "ernie4_5_moe",
            ("moe_num_experts",),
            beside_router=("mlp.moe_statics.e_score_correction_bias",),
            top_k_key="moe_k",
            dense_prefix_key="moe_layer_start_index",
            dense_prefix=1,
            tied=True,
            refuses={"awq": _NORM_READERS},
            **_SHARED,
        ),
        Architecture(
            "hy_v3",
            ("num_experts",),
            moe="mlp",
            router="router.gate",
            beside_router=("mlp.expert_bias",),
            shared_experts=("shared_mlp",),
            dense_types_key="mlp_layer_types",
            dense_prefix=1,
            router_scores="sigmoid",
            running_names=(("mlp.shared_mlp", "mlp.shared_experts"),),
            refuses={"awq": _NORM_READERS},
        ),
        Architecture(
            "laguna",
            ("num_experts",),
            moe="mlp",
            beside_router=("mlp.experts.e_score_correction_bias",),
            shared_experts=("shared_expert",),
            per_layer_lists=("layer_types", "mlp_layer_types", "num_attention_heads_per_layer"),
            dense_types_key="mlp_layer_types",
            dense_prefix=1,
            router_scores="sigmoid",
            varied_blocks=True,
            running_names=(("mlp.shared_expert", "mlp.shared_experts"),),
            refuses={"awq": _NORM_READERS},
        ),
        Architecture(
            "afmoe",
            ("num_experts",),
            moe="mlp",
            router="router.gate",
            running_router="mlp.router",
            beside_router=("mlp.expert_bias",),
            shared_experts=("shared_experts",),
            dense_prefix_key="num_dense_layers",
            dense_prefix=1,
            router_scores="sigmoid",
            feed_forward_norm="pre_mlp_layernorm",
            refuses={"awq": _NORM_READERS},
        ),
        Architecture(
            "kolibri1",
            ("num_experts", "num_local_experts"),
            beside_router=("moe.router.expert_bias",),
            **_SHARED,
            **_SIGMOID,
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
            refuses={"awq": _NORM_READERS, "attention": _MIXED},
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
                "awq": _NORM_READERS,
                "attention": _MIXED,
                "block_drop": "its config says by a period of which kind a block is, and none is left once a block is gone",
            },
        ),
        Architecture(
            "cohere2_moe",
            ("num_experts",),
            expert_width_key="intermediate_size",
            tied=True,
            feed_forward_norm="input_layernorm",
            parallel=True,
            refuses={"awq": _NORM_READERS, "layer_drop": "its MoE layer shares its norm with attention, which still needs it"},
            **_SHARED,
            **_TYPED,
        ),
        Architecture(
            "hunyuan_v1_moe",
            ("num_experts",),
            moe="mlp",
            router="gate.wg",
            shared_experts=("shared_mlp",),
            top_k_key="moe_topk",
            per_layer_lists=("layer_types", "moe_topk", "num_shared_expert", "moe_intermediate_size"),
            expert_width_key="intermediate_size",
            refuses={"awq": _NORM_READERS},
        ),
        Architecture(
            "flex_olmo",
            ("num_experts",),
            moe="mlp",
            expert_width_key="intermediate_size",
            feed_forward_norm="post_feedforward_layernorm",
            layer_entry="mlp",
            refuses={"awq": _NORM_READERS},
        ),
        Architecture(
            "mellum",
            ("num_experts", "num_local_experts"),
            moe="mlp",
            dense_types_key="mlp_layer_types",
            refuses={"awq": _NORM_READERS},
        ),
        Architecture(
            "flint",
            ("num_experts",),
            shared_experts=("shared_expert",),
            router_scores="sigmoid",
            refuses={"awq": _NORM_READERS},
            **_QWEN,
        ),
        Architecture(
            "qwen3_next", ("num_experts",), dense_list_key="mlp_only_layers", sparse_step_key="decoder_sparse_step", **_QWEN_NEXT
        ),
        Architecture("qwen3_5_moe_text", ("num_experts",), **_QWEN_NEXT),
        Architecture(
            "qwen3_vl_moe",
            ("num_experts", "num_local_experts"),
            layers="model.language_model.layers",
            text_config=("text_config",),
            fused_on_disk=True,
            fused_layouts=("inputs first", "outputs first"),
            refuses={"prune": "all experts of a layer lie in one 3-D tensor, of which there are two layouts"},
            **_QWEN,
        ),
        Architecture(
            "qwen3_omni_moe",
            ("num_experts", "num_local_experts"),
            layers="thinker.model.layers",
            head="thinker.lm_head",
            text_config=("thinker_config", "text_config"),
            running_language_model="thinker",
            untouched=("visual", "audio_tower", "talker", "code2wav"),
            refuses={"awq": _NORM_READERS, "attention": _NEVER_CALLED, "dense": _NEVER_CALLED},
            **_QWEN,
        ),
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
}


_HANDS_ON = "its blocks hand each other more than hidden states, and a block on its own cannot be given that"
_TOWERS = "where its language model lies among its towers is not described, nor proved against the stock class"
_BESIDE = "its experts work beside a dense layer in the same block, and what may be cut there is not described"

REFUSED: dict[str, str] = {
    "aria": _TOWERS,
    "aria_text": "its experts are stored turned in one 3-D tensor, in a layout that is not described",
    "beam": "a block scales what it adds by its own index, so it computes something else once its place has changed",
    "deepseek_ocr2": _TOWERS,
    "deepseek_v4": "some of its routers look experts up by token in a table, which cannot be cut to fewer experts",
    "diffusion_gemma": "it writes by diffusion, so it has no logits of a next token to be measured by",
    "dots3_note": _TOWERS,
    "dots3_note_text": "its expert counts may differ from block to block, and what is cut with a block is not described",
    "ernie4_5_vl_moe": "every block has two routers with experts of different widths, for text and for pictures",
    "gemma4": _BESIDE,
    "gemma4_text": _BESIDE,
    "glm4v_moe": _TOWERS,
    "glm5_next": _HANDS_ON,
    "glm_moe_dsa": _HANDS_ON,
    "hy_v4": _HANDS_ON,
    "inkling2": _TOWERS,
    "inkling2_text": "its blocks lie under another name than the stock class gives them, and its router is not described",
    "inkling_mm_model": _TOWERS,
    "inkling_text": "convolutions stand between the parts of a block, and its files are not described",
    "minimax_m3_vl": _TOWERS,
    "minimax_m3_vl_text": "gate and up lie in one matrix in dense layers and shared experts too, a layout that is not described",
    "mistral4": "transformers does not list it among language models, by which a checkpoint is opened here",
    "mistral_large4": _HANDS_ON,
    "muse_spark": "every expert has a norm of its own behind it, which the experts' formula does not know",
    "nemotron_h": "its experts have no gate matrix, which every method here takes for granted",
    "openai_privacy_filter": "it sorts tokens into classes, so it has no logits of a next token to be measured by",
    "qwen3_omni_moe_thinker": "it is stored as part of qwen3_omni_moe, which is supported",
    "qwen4_exp": _TOWERS,
    "qwen4_exp_text": "its blocks read an embedding of token sequences beside the hidden states, which is not described",
    "unlimited_ocr": _TOWERS,
    "zaya": _HANDS_ON,
}
"""Mixtures that transformers knows and that are not in the table, each with what is in the way."""


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the row for a config.json.

    Raises UnsupportedArchitecture for a mixture without a row, NotAMoE for a model without experts.
    """
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is not None:
        return row
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UnsupportedArchitecture(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
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
