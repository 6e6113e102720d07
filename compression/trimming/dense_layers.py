"""How a family says that a block is dense, by which stock classes can be told of a dropped MoE layer.

A dropped MoE layer adds nothing to the residual stream. No config.json says that, but most families can say of a block
that it is dense; a dense layer whose weights are all zero adds nothing either, and every engine reads it. What it costs
is three small matrices of zeros, and the norm, which stays. ``settings`` are the language model's, out of config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from compression.architectures import Architecture
from compression.planner.inventory import config_count, expected_mixtures

Spelling = Literal["list", "prefix", "types"]
WIDTH_KEY = "intermediate_size"
_NARROWEST = 16
_STOCK_MATRICES = Architecture.__dataclass_fields__["dense_matrices"].default


def stock_layer_drop(architecture: Architecture, settings: Mapping[str, Any]) -> Spelling | None:
    """Return how stock classes can be told of a dropped MoE layer; None where they cannot.

    By a "list" of dense blocks or by "types", any block can go; as a "prefix", the first MoE layers alone.
    """
    if architecture.dense_matrices != _STOCK_MATRICES or architecture.varied_blocks:
        return None
    if _types_key(architecture, settings) is not None:
        return "types"
    if architecture.dense_list_key is not None:
        return "list"
    return "prefix" if architecture.dense_prefix_key is not None else None


def _types_key(architecture: Architecture, settings: Mapping[str, Any]) -> str | None:
    """Return the key under which config.json lists the kind of every block; None where it lists none."""
    key = architecture.dense_types_key
    return key if key is not None and isinstance(settings.get(key), list) else None


def dense_blocks(architecture: Architecture, settings: Mapping[str, Any]) -> frozenset[int]:
    """Return the blocks that config.json declares dense."""
    mixtures = expected_mixtures(architecture, settings, int(settings["num_hidden_layers"]))
    return frozenset(block for block, is_mixture in enumerate(mixtures) if not is_mixture)


def zero_dense_width(
    architecture: Architecture, settings: Mapping[str, Any], kept: Iterable[int], *, tensor_parallel: int = 1
) -> int:
    """Return the width of the dense layer of zeros that stands for a dropped MoE layer, beside the blocks that are kept.

    One width holds for every dense layer of a model: that of the dense blocks that stay, else as little as can be divided.
    """
    if dense_blocks(architecture, settings) & set(kept):
        return config_count(settings, WIDTH_KEY)
    return _NARROWEST * tensor_parallel


def dense_spelling(
    architecture: Architecture, settings: Mapping[str, Any], kept: Iterable[int], dense: set[int]
) -> dict[str, Any]:
    """Return the entries of config.json that say which of the kept blocks, by the source's indices, are dense."""
    places = [block in dense for block in kept]
    if (types := _types_key(architecture, settings)) is not None:
        return {types: ["dense" if is_dense else "sparse" for is_dense in places]}
    if architecture.dense_prefix_key is not None:
        assert places == sorted(places, reverse=True), f"{architecture.model_type} can have dense blocks at the start alone"
        return {architecture.dense_prefix_key: sum(places)}
    if architecture.dense_list_key is not None:
        listed = [place for place, is_dense in enumerate(places) if is_dense]
        return {architecture.dense_list_key: listed, str(architecture.sparse_step_key): 1}
    assert not any(places), f"{architecture.model_type} has no dense blocks"
    return {}
