"""The table of all rows by ``model_type``, and what is looked up in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression.architectures.families import FAMILIES
from compression.architectures.hybrids import HYBRIDS
from compression.architectures.record import EXPERT_COUNT_SPELLINGS, Architecture
from compression.architectures.refused import REFUSED
from compression.errors import BrokenCheckpoint, NotAMoE, UnsupportedArchitecture

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in (*FAMILIES, *HYBRIDS)}


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
    supported, model_type = ", ".join(sorted(ARCHITECTURES)), str(model_type)[:100]
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
