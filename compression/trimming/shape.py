"""What config.json says of the experts that are left: one number where one is true, else each block's own.

Stock classes know one expert count for all blocks. Where blocks differ, have lost a layer or skip experts, the section
``"slimtrim"`` says so to the loader that ships in the artifact (``runtime/slimtrim_runtime.py``), and a key that another
project has proposed says it to whoever reads that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compression.architectures import EXPERT_COUNT_SPELLINGS, Architecture, expert_count
from compression.checkpoint.schemes import in_window
from compression.runtime.slimtrim_runtime import declared
from compression.trimming import Cuts


def expert_entries(
    config: Mapping[str, Any], architecture: Architecture, cuts: Cuts, *, layers_are_dense: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the language model's settings about experts, and what the whole config.json says of how to open the model.

    ``layers_are_dense``: dropped MoE layers are spelled as dense ones, and no longer count as mixtures.
    """
    settings = architecture.settings(config)
    counts = [_count(cuts, block, layers_are_dense=layers_are_dense) for block in cuts.blocks]
    mixtures = [count for count in counts if count is not None]
    if not mixtures:
        return {}, {}
    before, most = expert_count(architecture, config), max(mixtures)
    one = most if most > 0 else before
    spellings = {key for key in EXPERT_COUNT_SPELLINGS if key in settings}
    entries: dict[str, Any] = dict.fromkeys([*architecture.expert_count_keys, *sorted(spellings)], one)
    if any(0 <= count < before for count in mixtures):
        entries["pruned_from_num_experts"] = settings.get("pruned_from_num_experts", before)
    if set(mixtures) != {one}:
        entries["per_layer_num_experts"] = [None if count is None else max(count, 0) for count in counts]
    skip = [cuts.skip.get(block) for block in cuts.blocks]
    if set(mixtures) == {one} and one >= _used(settings[architecture.top_k_key]) and not any(beta is not None for beta in skip):
        return entries, {}
    return entries, declared({"profile": "custom", "experts": counts, "skip": skip, **family_facts(architecture)})


def _used(top_k: int | list[int]) -> int:
    """Return how many experts a token uses, at most: some families list it block by block."""
    return max(top_k) if isinstance(top_k, list) else int(top_k)


def cut_entries(config: Mapping[str, Any], window: Sequence[int]) -> dict[str, Any]:
    """Return an artifact's config.json with what it says block by block of experts and schemes cut to a window of its blocks."""
    cut = dict(config)
    if "slimtrim" in config:
        section = dict(config["slimtrim"])
        section |= {key: [section[key][block] for block in window] for key in ("experts", "skip") if key in section}
        if packed := section.get("packed_experts"):
            section["packed_experts"] = {**packed, "bits": [packed["bits"][block] for block in window]}
        cut["slimtrim"] = section
    if stated := cut.pop("quantization_config", None):
        cut |= {"quantization_config": left} if (left := in_window(stated, window)) else {}
    return cut


def _count(cuts: Cuts, block: int, *, layers_are_dense: bool) -> int | None:
    if block in cuts.layers_dropped:
        return None if layers_are_dense else -1
    kept = cuts.experts.get(block)
    return None if kept is None else len(kept)


def family_facts(architecture: Architecture) -> dict[str, Any]:
    """Return what a loader must know of a family to give its blocks another shape."""
    return {
        "language_model": architecture.running_language_model,
        "layer": architecture.running_moe,
        "experts_module": architecture.running_experts,
        "router": architecture.running_router,
        "norm": architecture.feed_forward_norm,
        "beside": list(architecture.shared_beside),
        "count_keys": list(architecture.expert_count_keys),
        "top_k_key": architecture.top_k_key,
        "layer_returns": architecture.layer_returns,
    }
