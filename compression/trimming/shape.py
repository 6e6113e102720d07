"""What config.json says of the experts that are left: one number where one is true, else each block's own.

Stock classes know one expert count for all blocks. Where blocks differ, have lost a layer or skip experts, the section
``"slimtrim"`` says so to the loader that ships in the artifact (``runtime/slimtrim_runtime.py``), and the keys that other
projects have proposed say it to whoever reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compression.architectures import EXPERT_COUNT_SPELLINGS, Architecture, expert_count
from compression.runtime.slimtrim_runtime import declared
from compression.trimming import Cuts

_PER_LAYER = ("per_layer_num_experts", "per_layer_config")


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
        entries |= _per_layer(counts, one, architecture.expert_count_keys)
    skip = [cuts.skip.get(block) for block in cuts.blocks]
    if set(mixtures) == {one} and not any(beta is not None for beta in skip):
        return entries, {}
    return entries, declared({"profile": "custom", "experts": counts, "skip": skip, **family_facts(architecture)})


def cut_entries(config: Mapping[str, Any], window: Sequence[int]) -> dict[str, Any]:
    """Return an artifact's config.json with what it says block by block about experts cut to a window of its blocks."""
    after = {key: value for key, value in config.items() if key not in _PER_LAYER}
    section = config.get("slimtrim", {})
    if "experts" in section:
        after["slimtrim"] = {**section, **{key: [section[key][block] for block in window] for key in ("experts", "skip")}}
    return after


def _count(cuts: Cuts, block: int, *, layers_are_dense: bool) -> int | None:
    if block in cuts.layers_dropped:
        return None if layers_are_dense else -1
    kept = cuts.experts.get(block)
    return None if kept is None else len(kept)


def _per_layer(counts: Sequence[int | None], one: int, keys: Sequence[str]) -> dict[str, Any]:
    left = [None if count is None else max(count, 0) for count in counts]
    others = {str(place): dict.fromkeys(keys, count) for place, count in enumerate(left) if count not in (None, one)}
    return {"per_layer_num_experts": left, "per_layer_config": others}


def family_facts(architecture: Architecture) -> dict[str, Any]:
    """Return what a loader must know of a family to give its blocks another shape."""
    return {
        "layer": architecture.running_moe,
        "experts_module": architecture.running_experts,
        "router": architecture.running_router,
        "norm": architecture.feed_forward_norm,
        "count_keys": list(architecture.expert_count_keys),
        "top_k_key": architecture.top_k_key,
        "layer_returns": architecture.layer_returns,
    }
