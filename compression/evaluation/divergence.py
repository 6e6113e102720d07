"""How far streams that forked from a clean one have come from it: KL between next-token distributions, sequence by sequence.

Shapes: N sequences, B sequences in a micro-batch, S tokens each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from compression.block import Shell
from compression.evaluation.perplexity import compare
from compression.sweep import Stream

Key = TypeVar("Key", bound=Hashable)


def divergences(shell: Shell, clean: Stream, others: Mapping[Key, Stream]) -> tuple[float, dict[Key, Tensor]]:
    """Return the clean stream's mean loss, and of every other stream its divergence from it in nats, sequence by sequence [N]."""
    loss, found = list[float](), {key: list[float]() for key in others}
    logits = {key: stream.logits(shell) for key, stream in others.items()}
    for ids_BS, clean_BSV in zip(clean.ids, clean.logits(shell), strict=True):
        predicted = ids_BS.shape[1] - 1
        for key, coming in logits.items():
            for ids_S, right_SV, other_SV in zip(ids_BS, clean_BSV, next(coming), strict=True):
                found[key].append(float(compare(ids_S.to(clean.device), right_SV, other_SV)[2]) / predicted)
        for ids_S, right_SV in zip(ids_BS, clean_BSV, strict=True):
            loss.append(float(compare(ids_S.to(clean.device), right_SV, right_SV)[0]) / predicted)
    return sum(loss) / len(loss), {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}
