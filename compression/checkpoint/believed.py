"""How many tensors a config.json stands for, so that what a model's headers may cost is bounded before they are parsed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression.architectures import expert_count, find_architecture
from compression.errors import BrokenCheckpoint

MARKS_PER_TENSOR = 10
"""Brackets and commas that describe one tensor in a header, with some to spare."""
_MOST = 250_000
"""The largest known checkpoint has about 210 000."""
_OUTSIDE = 10_000
"""Tensors that no count in config.json speaks of: towers for images and sound, heads, all that lies outside the blocks."""
_MOST_BLOCKS, _MOST_EXPERTS = 1024, 4096
"""Beyond these, config.json is not believed."""
_PER_EXPERT = 16
"""Three matrices of up to five tensors each where the source is quantized, rounded up."""
_BESIDE_EXPERTS = 64
"""The rest of a block, counted in experts."""


def believed_tensors(config: Mapping[str, Any]) -> int:
    """Return how many tensors are read of a checkpoint with this config.json: few where it counts nothing, or absurdly much.

    Raises UnsupportedArchitecture, NotAMoE: what is refused in any case is not read at all.
    """
    architecture = find_architecture(config)
    try:
        blocks, experts = architecture.settings(config).get("num_hidden_layers"), expert_count(architecture, config)
    except BrokenCheckpoint:
        return _OUTSIDE
    if not isinstance(blocks, int) or not 0 < blocks <= _MOST_BLOCKS or experts > _MOST_EXPERTS:
        return _OUTSIDE
    return min(_MOST, _OUTSIDE + blocks * _PER_EXPERT * (experts + _BESIDE_EXPERTS))
