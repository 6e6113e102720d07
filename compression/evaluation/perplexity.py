"""Perplexity and divergence by sweep: held-out text through the original and through the artifact.

Loss is the mean negative log-likelihood of the next token. Divergence is KL(original || artifact) between the two
next-token distributions, which is never negative and sees damage that the loss on one text can hide.

Shapes: B sequences, S tokens each, V vocabulary, T = S - 1 predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compression.block import Shell
from compression.checkpoint.reader import Model
from compression.measured import DomainQuality, Quality, QuantizedOnly, RandomDrop
from compression.sweep import OnBlock, Push, Stream, sweep, working_dtype

_ROWS = 512
"""Positions whose distributions are held in float32 at a time: 0.6 GB for two of 152 064 words."""


@dataclass(frozen=True)
class Beside:
    """Other ways to the same size, measured on the same tokens."""

    lots: tuple[Model, int] | None = None
    """The original trimmed at random, and with which seed."""
    quantized: tuple[Model, int] | None = None
    """The original quantized alone, and the bytes of its tensors."""


def measure(
    original: Model,
    artifact: Model,
    ids_NS: Tensor,
    *,
    device: torch.device,
    on_block: OnBlock,
    domains: tuple[str, ...] = (),
    domain_N: Tensor | None = None,
    beside: Beside | None = None,
) -> Quality:
    """Return what the artifact lost against the original on the token sequences [N, S].

    ``domain_N``: index into ``domains`` of each sequence; without domains, there are figures for the whole alone.
    """
    beside = beside or Beside()
    models: dict[str, Model] = {"original": original, "artifact": artifact}
    models |= {} if beside.lots is None else {"random drop": beside.lots[0]}
    models |= {} if beside.quantized is None else {"quantized only": beside.quantized[0]}
    swept: dict[str, _Swept] = {}
    for place, (name, blocks) in enumerate(models.items()):
        swept[name] = _Swept(blocks, ids_NS, device, _part(on_block, place, len(models), name))
    by_N = torch.zeros(len(ids_NS), dtype=torch.int64) if domain_N is None else domain_N
    sums, tokens_D = _sums(list(swept.values()), by_N, max(1, len(domains)), device)
    whole = dict(zip(models, (sums.sum(dim=1) / tokens_D.sum()).tolist(), strict=True))
    rows = [_domain(name, sums[1, place], int(tokens_D[place])) for place, name in enumerate(domains) if tokens_D[place]]
    return Quality(
        tokens=int(tokens_D.sum()),
        **_paired(whole["artifact"]),
        domains=tuple(sorted(rows, key=lambda row: row.retention)),
        random_drop=None if beside.lots is None else RandomDrop(seed=beside.lots[1], **_baseline(whole["random drop"])),
        quantized_only=None
        if beside.quantized is None
        else QuantizedOnly(bytes=beside.quantized[1], **_baseline(whole["quantized only"])),
    )


def _sums(swept: Sequence[_Swept], domain_N: Tensor, domains: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sums of ``compare`` per model and domain [models, D, 4], those of the original left zero, and tokens [D]."""
    sums, tokens_D = torch.zeros(len(swept), domains, 4, dtype=torch.float64), torch.zeros(domains, dtype=torch.int64)
    following = iter(domain_N.tolist())
    for ids_BS, *logits in zip(swept[0].stream.ids, *(model.logits() for model in swept), strict=True):
        for row, ids_S in enumerate(ids_BS):
            domain = next(following)
            for place, after_BSV in enumerate(logits[1:], start=1):
                sums[place, domain] += compare(ids_S.to(device), logits[0][row], after_BSV[row])
            tokens_D[domain] += len(ids_S) - 1
    return sums, tokens_D


def _domain(name: str, sums: Tensor, tokens: int) -> DomainQuality:
    return DomainQuality(name=name, tokens=tokens, **_paired((sums / tokens).tolist()))


def _paired(means: Sequence[float]) -> dict[str, float]:
    return dict(zip(("loss_before", "loss_after", "divergence", "top1_agreement"), means, strict=True))


def _baseline(means: Sequence[float]) -> dict[str, Any]:
    return dict(zip(("loss", "divergence", "top1_agreement"), means[1:], strict=True))


def _part(on_block: OnBlock, place: int, models: int, name: str) -> OnBlock:
    return lambda done, blocks, text: on_block(place * blocks + done, models * blocks, f"{name}: {text}")


def compare(ids_S: Tensor, before_SV: Tensor, after_SV: Tensor) -> Tensor:
    """Return the sums over one sequence's predicted tokens: loss before, loss after, divergence, agreements [4]."""
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(ids_S) - 1, _ROWS):
        stop = min(start + _ROWS, len(ids_S) - 1)
        next_T1 = ids_S[start + 1 : stop + 1, None]
        before_TV = log_softmax(before_SV[start:stop].float(), dim=-1)
        after_TV = log_softmax(after_SV[start:stop].float(), dim=-1)
        sums[0] -= before_TV.gather(1, next_T1).sum(dtype=torch.float64).cpu()
        sums[1] -= after_TV.gather(1, next_T1).sum(dtype=torch.float64).cpu()
        sums[2] += kl_div(after_TV, before_TV, log_target=True, reduction="none").sum(dtype=torch.float64).cpu()
        sums[3] += (before_TV.argmax(-1) == after_TV.argmax(-1)).sum().cpu()
    return sums


class _Swept:
    def __init__(self, blocks: Model, ids_NS: Tensor, device: torch.device, on_block: OnBlock) -> None:
        self._shell = Shell(blocks.config, blocks.outside(), device)
        self.stream = Stream(self._shell, ids_NS, dtype=working_dtype(device, self._shell.dtype))
        sweep(self._shell, blocks, self.stream, Push(), on_block)

    def logits(self) -> Iterator[Tensor]:
        return self.stream.logits(self._shell)
