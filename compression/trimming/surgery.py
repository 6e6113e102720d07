"""The cuts: slice experts and router, drop blocks, renumber, and make the config say so.

Tensors are cut as they are saved, by their saved names, so what stays keeps its very bytes.

Shapes: E experts, the first dimension of everything that is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compression.architectures import EXPERT_COUNT_SPELLINGS, Architecture
from compression.block import stock_config
from compression.trimming import Cuts


def cut_block(
    saved: Mapping[str, Tensor], architecture: Architecture, *, source: int, index: int, experts: Sequence[int] | None
) -> dict[str, Tensor]:
    """Return block ``source``'s tensors with only these experts, renumbered from 0, under block ``index``."""
    cut: dict[str, Tensor] = {}
    place = None if experts is None else {expert: new for new, expert in enumerate(experts)}
    for name, tensor in saved.items():
        renamed = name.replace(architecture.prefix(source), architecture.prefix(index), 1)
        expert = architecture.expert_of(name)
        if place is None or experts is None or architecture.component_of(name) not in ("experts", "router"):
            cut[renamed] = tensor
        elif expert is None:  # the router, or all experts in one tensor
            axis = architecture.expert_axis(name)
            whole = len(experts) == tensor.shape[axis]
            cut[renamed] = tensor if whole else tensor.index_select(axis, torch.tensor(experts)).contiguous()
        elif expert in place:
            cut[renamed.replace(f".experts.{expert}.", f".experts.{place[expert]}.", 1)] = tensor
    return cut


def cut_config(
    config: Mapping[str, Any], architecture: Architecture, cuts: Cuts, *, experts: int | None = None
) -> dict[str, Any]:
    """Return config.json for what stays, true in every spelling that the architecture knows.

    ``experts`` is the uniform expert count of the artifact; None leaves the count alone.
    """
    settings = architecture.settings(config)
    changes: dict[str, Any] = {}
    if len(cuts.blocks) != architecture.block_count(config):
        changes["num_hidden_layers"] = len(cuts.blocks)
        changes |= _per_layer_lists(config, architecture, cuts.blocks)
        changes |= _dense_blocks(settings, architecture, cuts.blocks)
    if experts is not None:
        spellings = {key for key in EXPERT_COUNT_SPELLINGS if key in settings}
        changes |= dict.fromkeys([*architecture.expert_count_keys, *sorted(spellings)], experts)
    after = architecture.changed(config, changes)
    after.pop("auto_map", None)  # no code travels
    return after


def _per_layer_lists(config: Mapping[str, Any], architecture: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    # Some classes derive these lists from the block's index: after a cut only the list itself is true.
    stock: Any = stock_config(config)
    for key in architecture.text_config:
        stock = getattr(stock, key)
    settings, blocks = architecture.settings(config), architecture.block_count(config)
    lists: dict[str, Any] = {}
    for key in architecture.per_layer_lists:
        values = settings.get(key) or getattr(stock, key, None)
        if isinstance(values, list) and len(values) == blocks:
            lists[key] = [values[block] for block in kept]
    return lists


def _dense_blocks(config: Mapping[str, Any], architecture: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    if architecture.dense_prefix_key is not None:
        stated = config.get(architecture.dense_prefix_key)
        prefix = int(architecture.dense_prefix if stated is None else stated)
        return {architecture.dense_prefix_key: sum(block < prefix for block in kept)}
    if architecture.dense_list_key is not None and architecture.sparse_step_key is not None:
        listed, step = config.get(architecture.dense_list_key) or [], int(config.get(architecture.sparse_step_key) or 1)
        dense = [new for new, block in enumerate(kept) if block in listed or (block + 1) % step != 0]
        return {architecture.dense_list_key: dense, architecture.sparse_step_key: 1}
    return {}
