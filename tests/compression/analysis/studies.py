"""Hand-written studies: whatever is not given is zero."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from compression.moe import MoELayer
from compression.study import RATIO_BINS, ExpertStatistics, Sample, Study


def statistics(experts: int, *, used: int = 2, domains: int = 1, width: int = 4, **given) -> ExpertStatistics:
    sizes = {"M": domains, "E": experts, "K": used, "D": width, "B": RATIO_BINS}
    zeros = {
        entry.name: torch.zeros([sizes[letter] for letter in entry.name.rsplit("_", 1)[1]], dtype=torch.float64)
        for entry in fields(ExpertStatistics)
        if "_" in entry.name
    }
    return ExpertStatistics(**{**zeros, "parameters": 1, **given})


def counted(ids_TK: Tensor, experts: int, **given) -> ExpertStatistics:
    """Count, token by token, what one domain's tokens chose."""
    count_E, together_EE = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, experts, dtype=torch.float64)
    for ids in ids_TK.tolist():
        for one in ids:
            count_E[one] += 1
            for other in ids:
                together_EE[one, other] += 1
    tokens = len(ids_TK)
    known = {"tokens_M": torch.tensor([float(tokens)]), "count_ME": count_E[None], "together_MEE": together_EE[None]}
    return statistics(experts, used=ids_TK.shape[1], **{**known, "layer_cosine_M": torch.tensor([0.5 * tokens]), **given})


def a_study(*layers: ExpertStatistics, domains: tuple[str, ...] = ("text",), parts=frozenset({"tokens"})) -> Study:
    tokens_M = layers[0].tokens_M
    cosine_M = {block: layer.layer_cosine_M for block, layer in enumerate(layers)}
    return Study(domains=domains, parts=parts, tokens_M=tokens_M, cosine_M=cosine_M, experts=dict(enumerate(layers)))


def sample_of(output_SED: Tensor) -> Sample:
    count, experts, _ = output_SED.shape
    gram_SEE = output_SED @ output_SED.mT
    zeros_SE = torch.zeros(count, experts)
    return Sample(torch.zeros(count, dtype=torch.int64), zeros_SE, zeros_SE, gram_SEE, {})


def live(gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> MoELayer:
    """Return a layer of the commonest layout."""
    gate_up_EOD = torch.cat([gate_EFD, up_EFD], dim=1)
    return MoELayer(SimpleNamespace(gate_up_proj=gate_up_EOD, down_proj=down_EDF, is_transposed=False, is_concatenated=True))


def random_layer(experts: int = 4, width: int = 48, hidden: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    gate, up, down = (torch.randn(shape, generator=generator) for shape in shapes)
    return gate, up, down


def a_router(experts: int, hidden: int, seed: int = 0) -> nn.Linear:
    router = nn.Linear(hidden, experts, bias=False)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(seed))
    return router
