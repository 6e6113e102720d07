"""Perplexity and divergence by sweep: held-out text through the original and through the artifact.

Loss is the mean negative log-likelihood of the next token. Divergence is KL(original || artifact) between the two
next-token distributions, which is never negative and sees damage that the loss on one text can hide.

Shapes: B sequences, S tokens each, V vocabulary, T = S - 1 predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from compression.block import Shell
from compression.checkpoint.reader import Model
from compression.measured import Quality, RandomDrop
from compression.sweep import OnBlock, Push, Stream, sweep, working_dtype

_ROWS = 512
"""Positions whose distributions are held in float32 at a time: 0.6 GB for two of 152 064 words."""


def measure(
    original: Model,
    artifact: Model,
    ids_NS: Tensor,
    *,
    device: torch.device,
    on_block: OnBlock,
    lots: tuple[Model, int] | None = None,
) -> Quality:
    """Return what the artifact lost against the original on the token sequences [N, S].

    ``lots``: the original trimmed at random, and with which seed; measured beside the two.
    """
    models = {"original": original, "artifact": artifact, **({} if lots is None else {"random drop": lots[0]})}
    swept: list[_Swept] = []
    for place, (name, blocks) in enumerate(models.items()):
        swept.append(_Swept(blocks, ids_NS, device, _part(on_block, place, len(models), name)))
    sums = torch.zeros(len(swept), 4, dtype=torch.float64)
    tokens = 0
    for ids_BS, before_BSV, *others in zip(swept[0].stream.ids, *(model.logits() for model in swept), strict=True):
        for place, after_BSV in enumerate(others, start=1):
            for ids_S, before_SV, after_SV in zip(ids_BS, before_BSV, after_BSV, strict=True):
                sums[place] += compare(ids_S.to(device), before_SV, after_SV)
        tokens += ids_BS.numel() - len(ids_BS)
    _, (loss_before, loss_after, divergence, agreement), *rest = (sums / tokens).tolist()
    return Quality(
        tokens=tokens,
        loss_before=loss_before,
        loss_after=loss_after,
        divergence=divergence,
        top1_agreement=agreement,
        random_drop=None if lots is None else _baseline(rest[0], lots[1]),
    )


def _baseline(means: Sequence[float], seed: int) -> RandomDrop:
    _, loss, divergence, agreement = means
    return RandomDrop(seed=seed, loss=loss, divergence=divergence, top1_agreement=agreement)


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
