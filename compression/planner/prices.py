"""What every lever costs one model: KL from the original in nats per token, one currency for all of them.

A setting of a lever (a count of experts, a scheme) is priced once, on every block that has the lever, end to end; blocks
share that price in proportion to the error that the setting alone makes in their outputs. A drop is priced end to end by
itself, and so are pairs of drops, because drops alone do not add up. What is measured here, ``sensitivity.py`` measures.

The price of a plan is the sum of the prices of its settings and drops, and of what each pair of drops costs beyond its two:
never less, since a solver would take blocks out together on the strength of whatever the model gets wrong (decision 0021).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

Lever = Literal["experts", "attention", "others"]
"""What a scheme is for: routed experts, attention, or what else a block multiplies with: shared experts, dense layers."""
LEVERS: tuple[Lever, ...] = ("experts", "attention", "others")
DropKind = Literal["block", "layer"]


class Drop(NamedTuple):
    """A block, or the MoE layer of a block, that goes."""

    kind: DropKind
    block: int


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(_Part):
    """One setting of a lever on every block that has it."""

    whole: float
    """KL of the model with the setting everywhere."""
    errors: dict[int, float]
    """By block: mean over tokens of the squared error in its output over the squared output, fed as in the original."""

    def of(self, block: int) -> float:
        """Return the block's share of the price; 0 where it does not have the lever."""
        total = sum(self.errors.values())
        return max(0.0, self.whole) * self.errors.get(block, 0.0) / total if total > 0 else 0.0


class Count(_Part):
    """Every MoE layer with so many experts, chosen by a criterion."""

    criterion: str
    experts_kept: int
    price: Setting


class SchemeOf(_Part):
    """One scheme for all matrices of a lever."""

    lever: Lever
    scheme: str
    price: Setting
    """By the method that writes artifacts."""
    rounded: Setting
    """By rounding to nearest: what a trial measures without calibration."""


class DropPrice(_Part):
    """One drop by itself."""

    drop: Drop
    loss: float


class PairPrice(_Part):
    """Two drops in different blocks, together."""

    first: Drop
    second: Drop
    loss: float


class Prices(_Part):
    """Everything a plan can be made of, priced."""

    measured: bool
    """False for prices that were not taken on this model but are usual; a plan from them is provisional."""
    tokens: int
    text: str
    """sha256 of the tokens that prices are taken on."""
    loss: float
    """Mean next-token loss of the original on the text that prices are taken on, in nats; 0 where nothing was measured."""
    group_size: int
    counts: tuple[Count, ...]
    schemes: tuple[SchemeOf, ...]
    drops: tuple[DropPrice, ...]
    pairs: tuple[PairPrice, ...] = ()

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria by which counts were priced."""
        return tuple(dict.fromkeys(count.criterion for count in self.counts))

    def of_count(self, block: int, criterion: str, experts_kept: int) -> float:
        """Return what keeping so many experts costs in one block; no less than keeping more of them does."""
        priced = [count for count in self.counts if count.criterion == criterion and count.experts_kept >= experts_kept]
        return max((count.price.of(block) for count in priced), default=0.0)

    def of_scheme(self, block: int, lever: Lever, scheme: str, *, rounded: bool = False) -> float:
        """Return what a scheme costs in one block; ``rounded``: without calibration."""
        setting = self._schemes[lever, scheme]
        return (setting.rounded if rounded else setting.price).of(block)

    def of_drop(self, drop: Drop) -> float:
        """Return what a drop costs by itself."""
        return self._drops[drop]

    def beyond(self, first: Drop, second: Drop) -> float | None:
        """Return what two drops cost beyond each by itself, at least 0; None where that was not measured."""
        loss = self._pairs.get(frozenset((first, second)))
        return None if loss is None else max(0.0, loss - self.of_drop(first) - self.of_drop(second))

    @cached_property
    def _schemes(self) -> Mapping[tuple[Lever, str], SchemeOf]:
        return {(scheme.lever, scheme.scheme): scheme for scheme in self.schemes}

    @cached_property
    def _drops(self) -> Mapping[Drop, float]:
        return {price.drop: max(0.0, price.loss) for price in self.drops}

    @cached_property
    def _pairs(self) -> Mapping[frozenset[Drop], float]:
        return {frozenset((pair.first, pair.second)): pair.loss for pair in self.pairs}

    def with_pairs(self, pairs: Iterable[PairPrice]) -> Prices:
        """Return the prices with more pairs measured."""
        return self.model_copy(update={"pairs": (*self.pairs, *pairs)})
