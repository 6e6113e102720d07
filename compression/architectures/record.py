"""The record that describes a family: where its files and its stock class keep blocks, router and experts.

Names are those in saved files (below a block) unless they are called running, which means the
attribute path inside a live stock block. transformers merges per-expert matrices into one fused parameter
when it loads them; ``fused_on_disk`` marks the families that save the fused tensors themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

from compression.errors import BrokenCheckpoint

Component = Literal["experts", "attention", "router", "shared_experts", "dense", "embeddings", "other"]
COMPONENTS: tuple[Component, ...] = ("experts", "attention", "router", "shared_experts", "dense", "embeddings", "other")

Refusable = Literal["quantize", "awq", "attention", "shared_experts", "dense", "block_drop", "layer_drop", "prune"]

EXPERT_COUNT_SPELLINGS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Every spelling of the expert count that engines read; whichever a source config holds is kept true."""
_NUMBER = re.compile(r"\.(\d+)\.")


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
    router_in_batches: bool = False
    """Whether the running router takes tokens as [batch, sequence, width] alone, and not as rows."""
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
        match = _NUMBER.match(name, len(self.layers)) if name.startswith(self.layers) else None
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
        match = None if self.fused_on_disk else _expert_pattern(self.moe).search(name)
        return int(match[1]) if match else None


@cache
def _expert_pattern(moe: str) -> re.Pattern[str]:
    return re.compile(rf"\.{re.escape(moe)}\.experts\.(\d+)\.")
