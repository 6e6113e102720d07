"""What can become of one block: every way that the profile allows, with its exact bytes and its price.

Bytes include the block's key-value cache, which a dropped block saves and a dropped MoE layer does not. The portable
profile has one expert count and one expert scheme for the whole model: a ``Common`` fixes them, and there is a list of options
for each. In the custom profile everything may differ from block to block, but for the criterion that ranks experts.

An option that another of its block beats in bytes and in price is left out. Drops are left to themselves: what they cost
together with other drops is not in their price, so none may push another option out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, TypeVar

from compression.planner.inventory import Inventory
from compression.planner.levers import levers_of
from compression.planner.prices import Drop, Lever, Prices
from compression.planner.sizes import Cut, block_cache, planned_tensors
from compression.planner.weights import KEEP, Line, layerless, weights_of
from compression.recipe import Profile
from compression.request import Serving

Action = Literal["keep", "drop_block", "drop_layer"]
_ACTIONS: Mapping[str, Action] = {"block": "drop_block", "layer": "drop_layer"}


class Option(NamedTuple):
    """One way for one block. A scheme is None where the block has no matrix that could take one."""

    block: int
    action: Action
    experts_kept: int | None
    experts: str | None
    attention: str | None
    others: str | None
    """Of shared experts or dense layers; without its MoE layer, of the zeros that stand there."""
    bytes: int
    """Tensors and key-value cache."""
    cost: float
    """In nats per token, without what drops cost together."""
    rounded_cost: float
    """The same with weights rounded to nearest."""

    @property
    def drop(self) -> Drop | None:
        """What goes, if anything does."""
        if self.action == "keep":
            return None
        return Drop("block" if self.action == "drop_block" else "layer", self.block)

    @property
    def quantizes_experts(self) -> bool:
        """Whether routed experts take fewer bits."""
        return self.experts not in (None, KEEP)

    @property
    def kind(self) -> tuple[Action, int | None, str | None]:
        """What two plans must differ in before both are worth a trial."""
        return self.action, self.experts_kept, self.experts


class Common(NamedTuple):
    """What all blocks of a plan share; None: each for itself. With the scheme "keep" nothing at all is quantized."""

    criterion: str | None
    experts_kept: int | None
    scheme: str | None


@dataclass(frozen=True)
class Selection:
    """A plan: one option for every block."""

    options: tuple[Option, ...]
    criterion: str | None
    """What ranks experts; None where all stay."""
    bytes: int
    """Tensors of the artifact, key-value cache and overhead."""
    loss: float
    """Predicted rise in nats per token."""
    rounded_loss: float
    """The same if weights were rounded to nearest."""
    gap: float = 0.0
    """By which part of its price a better plan might be cheaper: what the solver left open."""

    @cached_property
    def drops(self) -> tuple[Drop, ...]:
        """What goes, in the order of blocks."""
        return tuple(option.drop for option in self.options if option.drop is not None)


class _Piece(NamedTuple):
    """A choice for some of a block's levers."""

    schemes: tuple[str | None, ...]
    """In the order of ``LEVERS``."""
    experts_kept: int | None
    bytes: int
    cost: float
    rounded: float


class _Sized(Protocol):
    @property
    def bytes(self) -> int: ...


_Choice = TypeVar("_Choice", bound=_Sized)


class Options:
    """All options for a model, a way of serving it, a profile and prices."""

    def __init__(self, inventory: Inventory, serving: Serving, profile: Profile, prices: Prices) -> None:
        self.inventory, self.profile, self.prices = inventory, profile, prices
        self.levers = levers_of(inventory, serving, profile)
        priced = {price.drop for price in prices.drops}
        self.drops = tuple(drop for drop in self.levers.drops if drop in priced)
        self.most_drops = max(0, len(inventory.droppable) - 1)
        """So many of the alike blocks may go or lose their MoE layer; one must stay whole."""
        outside = sum(tensor.bytes for tensor in planned_tensors(inventory, Cut(inventory.experts), None))
        self.fixed = outside + serving.overhead
        """The bytes that are there whatever becomes of the blocks."""
        kinds = {kind: weights_of(inventory, self.levers, inventory.blocks[kind]) for kind in set(inventory.kinds)}
        self._weights = [kinds[kind] for kind in inventory.kinds]
        self._layerless = layerless(inventory, self.levers, serving, profile)
        self._caches = _caches(inventory, serving)
        self._scheme_prices: dict[tuple[int, Lever, str], tuple[float, float]] = {}
        self._count_prices: dict[tuple[int, str, int], float] = {}

    def commons(self) -> tuple[Common, ...]:
        """Return everything that the blocks of a model can agree on."""
        criteria, schemes = self.prices.criteria, self._schemes("experts")
        if self.profile == "custom":
            choices = (KEEP, None) if schemes else (KEEP,)
            return tuple(Common(criterion, None, scheme) for criterion in criteria or (None,) for scheme in choices)
        counts = [(None, self.inventory.experts), *((name, kept) for name in criteria for kept in self._counts(name))]
        return tuple(Common(criterion, kept, scheme) for scheme in (KEEP, *schemes) for criterion, kept in counts)

    def of(self, common: Common) -> list[list[Option]]:
        """Return the options of every block, smallest first."""
        return [self._of_block(block, common) for block in range(len(self._weights))]

    @cached_property
    def untouched(self) -> Selection:
        """The plan that leaves everything as it is."""
        common = Common(None, self.inventory.experts, KEEP)
        kept = [_option(self._whole(block, common)[0], block, "keep") for block in range(len(self._weights))]
        return Selection(tuple(kept), None, self.fixed + sum(option.bytes for option in kept), 0.0, 0.0)

    def _of_block(self, block: int, common: Common) -> list[Option]:
        whole = self._whole(block, common)
        options = [_option(piece, block, "keep") for piece in whole]
        for drop in self.drops:
            if drop.block == block:
                pieces = unbeaten(self._dropped(drop, common), _cost)
                options += [_option(piece, block, _ACTIONS[drop.kind]) for piece in pieces if not _beaten(piece, whole)]
        return sorted(options, key=lambda option: (option.bytes, option.cost))

    def _whole(self, block: int, common: Common) -> list[_Piece]:
        """Return the choices for a block that loses at most experts and bits."""
        found = unbeaten(self._experts(block, common), _cost)
        for lever in ("attention", "others"):
            more = list(self._slimmed(block, lever, common))
            found = unbeaten([_both(one, other) for one in found for other in more], _cost)
        return found

    def _experts(self, block: int, common: Common) -> Iterator[_Piece]:
        """Yield the choices for experts, with all that is no lever's."""
        weights, everyone = self._weights[block], self.inventory.experts
        counts: Sequence[int | None] = (None,)
        if self.inventory.blocks[block].is_mixture:
            counts = (everyone, *self._counts(common.criterion)) if common.experts_kept is None else (common.experts_kept,)
        for scheme, line in self._open(block, "experts", common):
            cost, rounded = self._scheme_price(block, "experts", scheme)
            for kept in counts:
                lost = 0.0 if kept in (None, everyone) else self._count_price(block, common.criterion, kept)
                size = self._caches[block] + weights.rest.at(kept or 0) + line.at(kept or 0)
                yield _Piece((scheme,), kept, size, cost + lost, rounded + lost)

    def _slimmed(self, block: int, lever: Lever, common: Common) -> Iterator[_Piece]:
        for scheme, line in self._open(block, lever, common):
            yield _Piece((scheme,), None, line.fixed, *self._scheme_price(block, lever, scheme))

    def _dropped(self, drop: Drop, common: Common) -> Iterator[_Piece]:
        loss = self.prices.of_drop(drop)
        if drop.kind == "block":
            yield _Piece((None, None, None), None, 0, loss, loss)
            return
        open_schemes = {scheme for scheme, _ in self._open(drop.block, "attention", common)}
        for (attention, standing), size in self._layerless.items():
            if attention in open_schemes and (standing in (None, KEEP) or common.scheme != KEEP):
                cost, rounded = self._scheme_price(drop.block, "attention", attention)
                whole = size + self._caches[drop.block]
                yield _Piece((None, attention, standing), None, whole, loss + cost, loss + rounded)

    def _open(self, block: int, lever: Lever, common: Common) -> Iterator[tuple[str | None, Line]]:
        """Yield the schemes that a lever may take in a block."""
        lines = self._weights[block].levers[lever]
        fixed = common.scheme if lever == "experts" or common.scheme == KEEP else None
        for scheme, line in lines.items():
            if scheme is None or scheme == fixed or (fixed is None and scheme in (KEEP, *self._schemes(lever))):
                yield scheme, line

    def _schemes(self, lever: Lever) -> tuple[str, ...]:
        return tuple(scheme for scheme in self.levers.schemes.get(lever, ()) if (lever, scheme) in self._priced_schemes)

    @cached_property
    def _priced_schemes(self) -> frozenset[tuple[Lever, str]]:
        return frozenset((scheme.lever, scheme.scheme) for scheme in self.prices.schemes)

    def _counts(self, criterion: str | None) -> tuple[int, ...]:
        priced = {count.experts_kept for count in self.prices.counts if count.criterion == criterion}
        return tuple(kept for kept in self.levers.counts if kept in priced)

    def _scheme_price(self, block: int, lever: Lever, scheme: str | None) -> tuple[float, float]:
        if scheme is None or scheme == KEEP:
            return 0.0, 0.0
        key = (block, lever, scheme)
        if key not in self._scheme_prices:
            prices = self.prices
            both = prices.of_scheme(block, lever, scheme), prices.of_scheme(block, lever, scheme, rounded=True)
            self._scheme_prices[key] = both
        return self._scheme_prices[key]

    def _count_price(self, block: int, criterion: str | None, kept: int) -> float:
        assert criterion is not None, "fewer experts are kept by some criterion"
        key = (block, criterion, kept)
        if key not in self._count_prices:
            self._count_prices[key] = self.prices.of_count(block, criterion, kept)
        return self._count_prices[key]


def _caches(inventory: Inventory, serving: Serving) -> list[int]:
    """Return the key-value cache of each block, of all sequences that are served at once."""
    if serving.context_tokens == 0:
        return [0] * len(inventory.blocks)
    return [block_cache(inventory, block, serving.context_tokens) * serving.batch_size for block in inventory.blocks]


def _option(piece: _Piece, block: int, action: Action) -> Option:
    experts, attention, others = piece.schemes
    return Option(block, action, piece.experts_kept, experts, attention, others, piece.bytes, piece.cost, piece.rounded)


def _both(one: _Piece, other: _Piece) -> _Piece:
    return _Piece(
        one.schemes + other.schemes,
        one.experts_kept,
        one.bytes + other.bytes,
        one.cost + other.cost,
        one.rounded + other.rounded,
    )


def unbeaten(choices: Iterable[_Choice], price: Callable[[_Choice], float]) -> list[_Choice]:
    """Return the choices that no other beats in both bytes and price, smallest first."""
    found: list[_Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.bytes, price(choice))):
        if not found or price(choice) < price(found[-1]):
            found.append(choice)
    return found


def _cost(piece: _Piece) -> float:
    return piece.cost


def _beaten(piece: _Piece, others: Iterable[_Piece]) -> bool:
    return any(other.bytes <= piece.bytes and other.cost <= piece.cost for other in others)
