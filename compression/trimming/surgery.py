"""The cuts: slice experts and router, drop layers and blocks, renumber, and make the config say so.

Tensors are cut as they are saved, by their saved names, so what stays keeps its very bytes.

Shapes: E experts, the first dimension of everything that is cut; D width, W width of a dense layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compression.architectures import Architecture
from compression.block import stock_config
from compression.planner.sizes import MOE_LAYER
from compression.trimming import Cuts
from compression.trimming.dense_layers import WIDTH_KEY, dense_blocks, dense_spelling
from compression.trimming.shape import cut_entries, expert_entries


def cut_block(
    saved: Mapping[str, Tensor], architecture: Architecture, cuts: Cuts, index: int, *, zero_width: int | None = None
) -> dict[str, Tensor]:
    """Return the tensors of the artifact's block ``index``, cut from those of the block that it was.

    ``zero_width``: the width of the dense layers of zeros that stand for dropped MoE layers; None where nothing does.
    """
    source = cuts.blocks[index]
    if source in cuts.layers_dropped:
        cut = _without_layer(saved, architecture, source, zero_width)
    else:
        cut = _with_experts(saved, architecture, cuts.experts.get(source))
    return {name.replace(architecture.prefix(source), architecture.prefix(index), 1): tensor for name, tensor in cut.items()}


def cut_config(
    config: Mapping[str, Any],
    architecture: Architecture,
    cuts: Cuts,
    *,
    zero_width: int | None = None,
) -> dict[str, Any]:
    """Return config.json for what stays, true in every spelling that the architecture knows.

    ``zero_width``: as in ``cut_block``; stock classes can then open a model with dropped MoE layers.
    """
    settings, changes = architecture.settings(config), dict[str, Any]()
    stays_whole = len(cuts.blocks) == architecture.block_count(config)
    if not stays_whole:
        changes["num_hidden_layers"] = len(cuts.blocks)
        changes |= _per_layer_lists(config, architecture, cuts.blocks)
    dense = set(dense_blocks(architecture, config))
    zeros = cuts.layers_dropped if zero_width is not None else frozenset[int]()
    if zeros or not stays_whole:
        changes |= dense_spelling(architecture, config, cuts.blocks, dense | zeros)
    if zeros:
        assert not dense & set(cuts.blocks) or zero_width == settings[WIDTH_KEY], "all dense layers have one width"
        changes[WIDTH_KEY] = zero_width
    counts, opening = expert_entries(config, architecture, cuts, layers_are_dense=zero_width is not None)
    after = architecture.changed(config, changes | counts)
    after.pop("auto_map", None)  # no code travels but ours
    return after | opening


def cut_to_window(config: Mapping[str, Any], architecture: Architecture, window: range) -> dict[str, Any]:
    """Return the config.json of an artifact's few blocks, which are opened as the small model that they are."""
    return cut_entries(cut_config(config, architecture, Cuts(tuple(window), {})), window)


def _with_experts(saved: Mapping[str, Tensor], architecture: Architecture, experts: Sequence[int] | None) -> dict[str, Tensor]:
    if experts is None:
        return dict(saved)
    cut: dict[str, Tensor] = {}
    place = {expert: new for new, expert in enumerate(experts)}
    for name, tensor in saved.items():
        expert = architecture.expert_of(name)
        if architecture.component_of(name) not in ("experts", "router"):
            cut[name] = tensor
        elif expert in place:
            cut[name.replace(f".experts.{expert}.", f".experts.{place[expert]}.", 1)] = tensor
        elif expert is None and experts:  # the router, or all experts in one tensor
            axis = architecture.expert_axis(name)
            whole = len(experts) == tensor.shape[axis]
            cut[name] = tensor if whole else tensor.index_select(axis, torch.tensor(experts)).contiguous()
    return cut


def _without_layer(
    saved: Mapping[str, Tensor], architecture: Architecture, block: int, zero_width: int | None
) -> dict[str, Tensor]:
    norm = f"{architecture.prefix(block)}{architecture.feed_forward_norm}."
    cut = {name: tensor for name, tensor in saved.items() if architecture.component_of(name) not in MOE_LAYER}
    if zero_width is None:
        return {name: tensor for name, tensor in cut.items() if not name.startswith(norm)}
    like = max(saved.values(), key=Tensor.numel)
    zeros_WD = like.new_zeros(zero_width, saved[f"{norm}weight"].shape[0])
    shapes = {"gate_proj": zeros_WD, "up_proj": zeros_WD.clone(), "down_proj": zeros_WD.mT.contiguous()}
    return cut | {f"{architecture.prefix(block)}mlp.{name}.weight": zeros for name, zeros in shapes.items()}


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
