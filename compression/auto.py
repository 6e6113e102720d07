"""Recipe "auto": price every lever on this model, search for the plans that fit, try the best few, follow one.

    measured_study   one sweep prices levers and fills the study, a second one prices pairs of drops
    settled          the search, pairs that it wants and that are unknown, trials of plans that differ in kind, the choice

Prices are taken, and plans tried, on windows of the calibration text beyond its samples: what Gram matrices were not made of.
The evaluation text is never looked at.

Shapes: N sequences, S tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compression.block import Shell
from compression.calibration import TokenSet
from compression.checkpoint.reader import Reader
from compression.methods import Choice, choose_cuts
from compression.observer import Observer
from compression.plan import Plan, PlanTrial, best_of, plan_selection, search_for
from compression.planner.choice import Tried, settle
from compression.planner.inventory import Inventory
from compression.planner.levers import Levers, levers_of
from compression.planner.options import Option, Selection
from compression.planner.pairs import pairs_to_measure, unmeasured_pairs
from compression.planner.prices import LEVERS, Drop, Lever, PairPrice, Prices
from compression.planner.search import Search
from compression.planner.weights import KEEP
from compression.request import Compression
from compression.sensitivity import Sensitivity, measure_pairs, measure_prices, text_hash
from compression.study import Part, Study
from compression.sweep import OnBlock, Stream, working_dtype
from compression.trimming import Cuts, Routing
from compression.tryout import Trial, try_plans

_PRICED_TOKENS, _TRIED_TOKENS = 4096, 6144
_LONGEST = 512
"""Tokens of a window that are used: what comes later tells little more for its cost."""
_FEWEST, _MOST = 8, 32
"""Windows for prices, and for trials."""
_MOST_PAIRS = 300
_RIVALS = 6
_ROUNDS = 2
"""Times that pairs are measured anew because the plan found holds some that are not known."""


class PricingText(NamedTuple):
    """What prices are taken on, and what plans are tried on."""

    priced_NS: Tensor
    tried_NS: Tensor
    note: str | None
    """What the reader should know about it."""


def pricing_text(calibration: TokenSet) -> PricingText:
    """Return windows beyond the samples where the text has enough, and else some of the samples themselves."""
    windows_NS, note = calibration.spare_NS[:, :_LONGEST], None
    if len(windows_NS) < _FEWEST:
        windows_NS = calibration.ids_NS[:, :_LONGEST]
        note = (
            "the calibration text has too few windows beyond its samples, so plans are priced and tried on samples: bits look "
            "cheaper than they are"
        )
    priced, tried = (min(_MOST, max(_FEWEST, tokens // windows_NS.shape[1])) for tokens in (_PRICED_TOKENS, _TRIED_TOKENS))
    if len(windows_NS) < priced + tried:
        priced = max(1, len(windows_NS) * priced // (priced + tried))
    rest_NS = windows_NS[priced : priced + tried]
    return PricingText(windows_NS[:priced], rest_NS if len(rest_NS) else windows_NS[:priced], note)


def parts_to_study(inventory: Inventory) -> frozenset[Part]:
    """Return what a study must hold for recipe "auto"."""
    parts: set[Part] = {"tokens", "prices"}
    if "reconstruction" in levers_of(inventory).criteria:
        parts.add("sample")
    return frozenset(parts)


@dataclass(frozen=True)
class Pricing:
    """One model, and the text that it is priced on."""

    reader: Reader
    inventory: Inventory
    calibration: TokenSet
    device: torch.device
    pairs_at_once: int

    @property
    def text(self) -> PricingText:
        """The windows for prices and trials."""
        return pricing_text(self.calibration)

    def is_of(self, prices: Prices | None) -> bool:
        """Say whether prices were taken on this text."""
        return prices is not None and prices.text == text_hash(self.text.priced_NS)

    def measured_study(self, parts: frozenset[Part], routing: Routing, on_block: OnBlock) -> Study:
        """Look at the untouched model: fill a study, and price every lever and the pairs of drops that matter."""
        calibration, reader = self.calibration, self.reader
        observer = Observer(reader.architecture, calibration.domains, calibration.domain_N, parts)
        shell, clean = self._stream(self.text.priced_NS)
        probe = Stream(shell, self.text.priced_NS[: max(2, len(self.text.priced_NS) // 4)], dtype=clean.dtype)
        sensitivity = Sensitivity(reader, levers_of(self.inventory), routing, clean, probe)
        stream = Stream(shell, calibration.ids_NS, dtype=clean.dtype)
        prices = measure_prices(shell, reader, stream, observer, sensitivity, _part(on_block, 0, of=2))
        pairs = pairs_to_measure(prices, min(_MOST_PAIRS, self.pairs_at_once))
        observer.study.prices = prices.with_pairs(self.priced_pairs(pairs, _part(on_block, 1, of=2)))
        return observer.study

    def priced_pairs(self, pairs: Sequence[tuple[Drop, Drop]], on_block: OnBlock) -> tuple[PairPrice, ...]:
        """Return what these pairs of drops cost together."""
        if not pairs:
            return ()
        shell, clean = self._stream(self.text.priced_NS)
        return measure_pairs(shell, self.reader, clean, pairs, on_block)

    def tried(self, trials: Sequence[Trial], levers: Levers, on_block: OnBlock) -> list[Tensor]:
        """Return what plans lose when they are tried, sequence by sequence [N]."""
        shell, clean = self._stream(self.text.tried_NS)
        return try_plans(shell, self.reader, clean, trials, levers, on_block)

    def _stream(self, ids_NS: Tensor) -> tuple[Shell, Stream]:
        shell = Shell(self.reader.config, self.reader.outside(), self.device)
        return shell, Stream(shell, ids_NS, dtype=working_dtype(self.device, shell.dtype))


def settled(
    request: Compression, pricing: Pricing, study: Study, whole: Cuts, choice: Choice, on_block: OnBlock
) -> tuple[Plan, Prices]:
    """Return the plan to follow, and the prices with whatever pairs had to be measured for it."""
    assert study.prices is not None, "a study for recipe auto holds prices"
    assert request.target_memory is not None, "the request's class demands it with recipe auto"
    prices = study.prices
    search = search_for(request, pricing.inventory, prices)
    for place in range(_ROUNDS):
        unknown = unmeasured_pairs(prices, best_of(search, request).drops)[: pricing.pairs_at_once]
        if not unknown:
            break
        prices = prices.with_pairs(pricing.priced_pairs(unknown, _part(on_block, place, of=_ROUNDS + 1)))
        search = search_for(request, pricing.inventory, prices)
    rivals = search.rivals(request.target_memory, _RIVALS)
    trials = [_trial(search, selection, study, whole, choice) for selection in rivals]
    levers = levers_of(pricing.inventory, request.serving, request.profile)
    losses = pricing.tried(trials, levers, _part(on_block, _ROUNDS, of=_ROUNDS + 1))
    tried = [Tried(s.loss, s.rounded_loss, tuple(loss_N.tolist())) for s, loss_N in zip(rivals, losses, strict=True)]
    best = settle(tried)
    notes = [_note(search, rivals[i], tried[i], chosen=i == best) for i in range(len(rivals))]
    return plan_selection(request, pricing.inventory, search, rivals[best], notes), prices


def _trial(search: Search, selection: Selection, study: Study, whole: Cuts, choice: Choice) -> Trial:
    cuts = choose_cuts(search.steps_of(selection), study, whole, choice)
    return Trial(cuts, {option.block: schemes_of(option) for option in selection.options})


def schemes_of(option: Option) -> dict[Lever, str]:
    """Return the schemes of an option's levers, without those that stay as they are."""
    found: dict[Lever, str | None] = {"experts": option.experts, "attention": option.attention, "others": option.others}
    return {lever: scheme for lever in LEVERS if (scheme := found[lever]) not in (None, KEEP) and scheme is not None}


def _note(search: Search, selection: Selection, tried: Tried, *, chosen: bool) -> PlanTrial:
    return PlanTrial(
        bytes=selection.bytes,
        steps=tuple(step.model_dump(mode="json") for step in search.steps_of(selection)),
        predicted_loss=selection.loss,
        measured_loss=tried.loss,
        standard_error=tried.error,
        chosen=chosen,
    )


def _part(on_block: OnBlock, place: int, *, of: int) -> OnBlock:
    """Return what tells of one sweep of several, so that progress goes forward over all of them."""
    return lambda done, blocks, text: on_block(place * blocks + done, of * blocks, text)
