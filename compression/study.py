"""The first visitor, and the Study it leaves: what every trimming criterion, every analysis and the planner need, in one pass.

Sums are kept per calibration domain and in float64, so any mixture of domains is exact arithmetic afterwards and
a split calibration set gives the same statistic. Experts run once on each of their own tokens, as the model runs them: the
statistics are taken from that very run. What costs more than a few reductions is a part of its own, gathered when asked:

* ``sample``: a few tokens shown to every expert, for the search over subsets and for how alike outputs are;
* ``likeness``: how alike the experts' matrices are, without any token;
* ``trials``: the error of every matrix at trial settings of slimming;
* ``prices``: what every lever costs in divergence, which ``sensitivity.py`` measures beside this visitor.

Shapes: M domains, E experts, T tokens, K experts per token, D width, L blocks, P token-expert pairs, B bins, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compression.planner.prices import Prices

Part = Literal["weights", "tokens", "sample", "likeness", "trials", "prices"]
"""``weights``: sums over each expert's weights, which every study holds; alone, it needs no text."""
RATIO_BINS = 4096
"""Bins of [0, 1] in which the ratios for expert skipping are counted: a median is known to 1/4096."""


@dataclass
class Sample:
    """Some tokens of one MoE layer, each shown to every expert: all that a search over subsets needs."""

    domain_S: Tensor
    logits_SE: Tensor
    """The router's own, over all experts."""
    weights_SE: Tensor
    """Routing weights as the model used them; zero where an expert was not chosen."""
    gram_SEE: Tensor
    """Inner products of the experts' outputs, token by token."""
    router: dict[str, Tensor]
    """What else the router holds for each expert [E], such as a bias by which it chooses: by name, or by place as an argument."""


@dataclass
class Likeness:
    """How alike one MoE layer's experts are, by their matrices: cosines between experts."""

    matrix_3EE: Tensor
    """Of whole matrices: gate, up, down."""
    average_3EE: Tensor
    """Of each matrix averaged over its neurons."""
    router_EE: Tensor
    """Of the router's rows."""
    pairs_P2: Tensor
    """Pairs of experts whose neurons were matched one to one."""
    tau_P: Tensor
    """Kendall's tau of the best matching of gate neurons: near one where neurons are aligned already."""
    aligned_P: Tensor
    """Mean cosine of gate neurons in the order in which they are saved."""
    matched_P: Tensor
    """Mean cosine of the same neurons in the best matching."""


@dataclass
class Trials:
    """What settings of slimming would do to a block's matrices, rounded or pruned plainly: mean squares over tokens.

    Settings are named as in ``settings``; a matrix is named by its saved name below the block, with ``*`` for the expert.
    """

    settings: tuple[str, ...]
    error: dict[str, Tensor]
    """Mean squared error of the matrix's outputs, per setting and expert [settings, E]."""
    energy: dict[str, Tensor]
    """Mean square of the outputs themselves [E]."""


@dataclass
class ExpertStatistics:
    """What one MoE layer did with the calibration tokens. g is a routing weight as used, f an expert's output before it."""

    tokens_M: Tensor
    count_ME: Tensor
    """Tokens routed to each expert."""
    weight_ME: Tensor
    """Sum of g."""
    probability_ME: Tensor
    """Sum over all tokens of what the router thought of every expert, chosen or not."""
    norm_ME: Tensor
    """Sum of |f|."""
    square_ME: Tensor
    """Sum of |f|^2."""
    weighted_norm_ME: Tensor
    """Sum of g |f|."""
    weighted_square_ME: Tensor
    """Sum of (g |f|)^2."""
    largest_ME: Tensor
    """Largest magnitude of a number in f."""
    together_MEE: Tensor
    """Tokens routed to both experts."""
    together_norm_MEE: Tensor
    """Sum over these tokens of the product of the two g |f|."""
    output_MED: Tensor
    """Sum of f."""
    rank_MKK: Tensor
    """Pairs by the place of their g among the token's (rows) and the place of their |f| (columns), largest first."""
    ratio_MB: Tensor
    """Tokens by the ratio of the lower half of their g to the upper half."""
    layer_cosine_M: Tensor
    """Sum of cos(x', x' + MoE(norm x')), x' being what enters the norm before the MoE layer."""
    absolute_E: Tensor
    """Sum of the magnitudes of each expert's weights."""
    magnitude_E: Tensor
    """Sum of their squares."""
    parameters: int
    """Weights in one expert's matrices."""
    sample: Sample | None = None
    likeness: Likeness | None = None

    @property
    def tokens(self) -> float:
        """Tokens seen, over all domains."""
        return float(self.tokens_M.sum())

    @property
    def layer_cosine(self) -> float:
        """Mean over tokens of the cosine between the residual stream before and after the MoE layer."""
        return float(self.layer_cosine_M.sum()) / self.tokens

    def total(self, name: str) -> Tensor:
        """Return a sum over all domains: ``total("count")`` is [E]."""
        return next(getattr(self, f.name) for f in fields(self) if f.name.startswith(f"{name}_M")).sum(0)

    def median_ratio(self) -> float:
        """Return the median over tokens of lower half to upper half of the routing weights, to one bin."""
        counts_B = self.total("ratio")
        middle = torch.searchsorted(counts_B.cumsum(0), counts_B.sum() / 2)
        return float((middle + 0.5) / RATIO_BINS)


@dataclass
class Study:
    """The statistics of an untouched model, by block index."""

    domains: tuple[str, ...] = ("text",)
    parts: frozenset[Part] = frozenset()
    tokens_M: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    cosine_M: dict[int, Tensor] = field(default_factory=dict)
    """Sum over tokens of cos(block input, block output), per domain."""
    experts: dict[int, ExpertStatistics] = field(default_factory=dict)
    """Of the blocks that are mixtures."""
    trials: dict[int, Trials] = field(default_factory=dict)
    span_MLL: Tensor | None = None
    """Sum over sampled tokens of cos(input of block i, output of block j); zero where j < i."""
    sampled_M: Tensor | None = None
    """Tokens in ``span_MLL``."""
    prices: Prices | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of each part; of ``tokens``, the whole pass with the model's own work."""

    def cosine(self, block: int) -> float:
        """Return the mean cosine between a block's input and output."""
        return float(self.cosine_M[block].sum() / self.tokens_M.sum())

    def span_cosine(self, first: int, last: int) -> float:
        """Return the mean cosine between the input of one block and the output of another, over the sampled tokens."""
        assert self.span_MLL is not None, "the pass over tokens leaves it"
        assert self.sampled_M is not None
        return float(self.span_MLL[:, first, last].sum() / self.sampled_M.sum())

    def mixed(self, weights: Mapping[str, float]) -> Study:
        """Return the study of another mixture of the same domains, as if each token counted ``weights[domain]`` times."""
        weight_M = torch.tensor([float(weights.get(domain, 0.0)) for domain in self.domains], dtype=torch.float64)
        return replace(
            self,
            domains=("mixture",),
            tokens_M=_mix(self.tokens_M, weight_M),
            cosine_M={block: _mix(sum_M, weight_M) for block, sum_M in self.cosine_M.items()},
            experts={block: _mixed_layer(layer, weight_M) for block, layer in self.experts.items()},
            span_MLL=None if self.span_MLL is None else _mix(self.span_MLL, weight_M),
            sampled_M=None if self.sampled_M is None else _mix(self.sampled_M, weight_M),
        )


def _mixed_layer(layer: ExpertStatistics, weight_M: Tensor) -> ExpertStatistics:
    changed: dict[str, Any] = {}
    for entry in fields(layer):
        value = getattr(layer, entry.name)
        if isinstance(value, Tensor) and "_M" in entry.name:
            seen = value[weight_M > 0]
            changed[entry.name] = seen.amax(0, keepdim=True) if entry.name == "largest_ME" else _mix(value, weight_M)
    return replace(layer, **changed)


def _mix(sum_M: Tensor, weight_M: Tensor) -> Tensor:
    return torch.einsum("m,m...->...", weight_M, sum_M)[None]
