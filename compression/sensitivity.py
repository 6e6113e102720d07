"""The sensitivity sweep: what every lever costs, in divergence from the original, on streams that fork from the clean one.

    for each block:
        every stream that has forked so far goes through the clean block: what came before is all that it changed
        one stream forks for each drop: the input passed on, or the block without its MoE layer
        each setting of a lever makes the block's weights anew, moves its own stream, and is shown the clean input

At the end a stream per setting has met the setting in every block, a stream per drop has met that drop alone, and each one's
divergence from the clean stream is its price (``planner/prices.py`` says what becomes of it). Weights are read once; one altered
copy of a block is alive at a time. A second sweep does the same for pairs of drops, which only the first can choose.

Settings below 16 bits are solved by GPTQ, with Gram matrices of the calibration tokens as they enter the untouched block, and
also rounded to nearest, which is what plans are later tried with (``tryout.py``).

Shapes: B sequences in a micro-batch, S tokens each, D width.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compression.altered import rounded_to, slimmed_experts, slimmed_linears
from compression.architectures import Architecture, Component
from compression.block import Blocks, Shell
from compression.checkpoint.reader import Reader, refuse_non_finite
from compression.collect import Collected, collect
from compression.evaluation.divergence import divergences
from compression.linears import find_linears
from compression.memory import give_back
from compression.moe import attention_module, moe_layer, without_layer
from compression.observer import Observer
from compression.planner.levers import Levers
from compression.planner.prices import Count, Drop, DropPrice, Lever, PairPrice, Prices, SchemeOf, Setting
from compression.recipe import ExpertDrop
from compression.slimming.hessian import Gram
from compression.study import Study
from compression.sweep import OnBlock, Stream
from compression.trimming import Cuts, Routing, expert_drop
from compression.trimming.surgery import cut_block, cut_config

_METHODS = ("gptq", "rtn")


class _Count(NamedTuple):
    criterion: str
    experts_kept: int


class _Scheme(NamedTuple):
    lever: Lever
    scheme: str
    method: str


class Sensitivity:
    """Streams that have forked from the clean one, and what they met."""

    def __init__(self, reader: Reader, levers: Levers, routing: Routing, clean: Stream, probe: Stream) -> None:
        """``clean``: the tokens that prices are taken on; ``probe``: those that show a block's errors, some of them will do."""
        self._reader, self._architecture = reader, reader.architecture
        self._levers, self._routing, self._clean, self._probe = levers, routing, clean, probe
        counts = [_Count(criterion, kept) for criterion in levers.criteria for kept in levers.counts]
        schemes = [_Scheme(lever, s, m) for lever, named in levers.schemes.items() for s in named for m in _METHODS]
        self._wholes: dict[_Count | _Scheme, Stream] = {key: clean.fork() for key in (*counts, *schemes)}
        self._errors: defaultdict[_Count | _Scheme, dict[int, float]] = defaultdict(dict)
        self._alone: dict[Drop, Stream] = {}
        self._trimmed: dict[int, Blocks] = {}

    def visit(self, index: int, block: nn.Module, saved: Mapping[str, Tensor], collected: Collected, study: Study) -> None:
        """Take every stream through a live block, and fork those that begin here; ``collected`` is of the calibration tokens."""
        right = [output_BSD for _, output_BSD in self._probe.peek(index, block)]
        for stream in self._alone.values():
            stream.push(index, block)
        for drop in (Drop("block", index), Drop("layer", index)):
            if drop in self._levers.drops:
                self._alone[drop] = _dropped(self._clean, drop, block, self._architecture)
        altered: set[_Count | _Scheme] = set()
        for keys, changed in self._changes(index, block, saved, collected, study):
            error = self._error(index, changed, right)
            for key in keys:
                self._errors[key][index] = error
                self._wholes[key].push(index, changed)
            altered.update(keys)
        for key in self._wholes.keys() - altered:  # this block has no such lever
            self._wholes[key].push(index, block)
        self._clean.push(index, block)
        self._probe.hidden = [output_BSD.cpu() for output_BSD in right]

    def linears(self, saved: Mapping[str, Tensor], block: nn.Module) -> dict[str, nn.Linear]:
        """Return all linear layers of a block that some lever quantizes, by saved name."""
        parts: list[Component] = [part for parts in self._levers.components.values() for part in parts]
        return find_linears(saved, block, self._architecture, parts)

    def prices(self, shell: Shell) -> Prices:
        """Return what everything costs, once the last block is behind; ``shell`` is that of the clean stream."""
        loss, found = divergences(shell, self._clean, {**self._wholes, **self._alone})
        settings = {key: Setting(whole=float(found[key].mean()), errors=self._errors[key]) for key in self._wholes}
        counts = [key for key in settings if isinstance(key, _Count)]
        schemes = [key for key in settings if isinstance(key, _Scheme) and key.method == "gptq"]
        return Prices(
            measured=True,
            tokens=sum(ids_BS.numel() for ids_BS in self._clean.ids),
            text=text_hash(torch.cat(self._clean.ids)),
            loss=loss,
            group_size=self._levers.group_size,
            counts=tuple(Count(criterion=k.criterion, experts_kept=k.experts_kept, price=settings[k]) for k in counts),
            schemes=tuple(
                SchemeOf(lever=k.lever, scheme=k.scheme, price=settings[k], rounded=settings[k._replace(method="rtn")])
                for k in schemes
            ),
            drops=tuple(DropPrice(drop=drop, loss=float(found[drop].mean())) for drop in self._alone),
        )

    def _changes(
        self, index: int, block: nn.Module, saved: Mapping[str, Tensor], collected: Collected, study: Study
    ) -> Generator[tuple[Sequence[_Count | _Scheme], nn.Module]]:
        """Yield the block as each setting leaves it, with all settings that leave it so."""
        if index in study.experts:
            yield from self._with_fewer_experts(index, saved, study)
        layer = moe_layer(self._architecture, block)
        for lever, schemes in self._levers.schemes.items():
            linears = find_linears(saved, block, self._architecture, self._levers.components[lever])
            for scheme in schemes if linears or (lever == "experts" and layer is not None) else ():
                for method in _METHODS:
                    treatment = rounded_to(scheme, self._levers.group_size, method)
                    if lever == "experts" and layer is not None:
                        with slimmed_experts(layer, treatment, collected.routed, self._clean.stored):
                            yield [_Scheme(lever, scheme, method)], block
                    else:
                        with slimmed_linears(linears, treatment, collected, self._clean.stored):
                            yield [_Scheme(lever, scheme, method)], block

    def _with_fewer_experts(
        self, index: int, saved: Mapping[str, Tensor], study: Study
    ) -> Generator[tuple[list[_Count | _Scheme], nn.Module]]:
        everyone = Cuts((index,), {index: tuple(range(self._routing.experts))})
        by_kept: defaultdict[tuple[int, ...], list[_Count | _Scheme]] = defaultdict(list)
        for criterion in self._levers.criteria:
            for kept in self._levers.counts:
                step = ExpertDrop.model_validate({"criterion": criterion, "experts_kept": kept})
                by_kept[expert_drop.choose(study, step, everyone, self._routing).experts[index]].append(_Count(criterion, kept))
        for kept, keys in by_kept.items():
            shell = self._trimmed_shell(len(kept))
            cut = cut_block(saved, self._architecture, Cuts(tuple(range(self._clean.blocks)), {index: kept}), index)
            with shell.live(index, cut) as block:
                yield keys, self._clean.convert_(block)

    def _trimmed_shell(self, kept: int) -> Blocks:
        if kept not in self._trimmed:
            blocks = tuple(range(self._clean.blocks))
            mixtures = [b for b in blocks if self._architecture.router_name(b) in self._reader.dense.tensors]
            cuts = Cuts(blocks, {block: tuple(range(kept)) for block in mixtures})
            self._trimmed[kept] = Blocks(cut_config(self._reader.config, self._architecture, cuts), self._clean.device)
        return self._trimmed[kept]

    def _error(self, index: int, block: nn.Module, right: Sequence[Tensor]) -> float:
        """Return the mean over tokens of the squared error in the block's output over the squared output, on the clean input."""
        total, tokens = 0.0, 0
        for batch, output_BSD in self._probe.peek(index, block):
            right_BSD = right[batch].float()
            lost_BS = (output_BSD.float() - right_BSD).square().sum(-1) / right_BSD.square().sum(-1).clamp(min=1e-30)
            total, tokens = total + float(lost_BS.sum(dtype=torch.float64)), tokens + lost_BS.numel()
        return total / tokens


def measure_prices(
    shell: Shell, reader: Reader, calibration: Stream, observer: Observer, sensitivity: Sensitivity, on_block: OnBlock
) -> Prices:
    """Walk the blocks once: fill the observer's study from the calibration tokens, and price every lever."""
    architecture, blocks = reader.architecture, len(shell.blocks)
    for index in range(blocks):
        saved = reader.block(index)
        refuse_non_finite(saved)
        with shell.live(index, saved) as block:
            calibration.convert_(block)
            linears = sensitivity.linears(saved, block)
            collected = collect(index, block, calibration, linears, new=Gram, architecture=architecture, advance=False)
            with calibration.repeated(attention_module(architecture, block)):
                observer.visit(index, block, calibration)
            sensitivity.visit(index, block, saved, collected, observer.study)
        del block, saved, collected
        give_back()
        on_block(index + 1, blocks, f"block {index + 1} of {blocks} is studied and its levers are priced")
    return sensitivity.prices(shell)


def measure_pairs(
    shell: Shell, reader: Reader, clean: Stream, pairs: Sequence[tuple[Drop, Drop]], on_block: OnBlock
) -> tuple[PairPrice, ...]:
    """Walk the blocks once more and return what each pair of drops costs together; the first of a pair lies before the second."""
    architecture, blocks = reader.architecture, len(shell.blocks)
    alone: dict[Drop, Stream] = {}
    both: dict[tuple[Drop, Drop], Stream] = {}
    for index in range(blocks):
        saved = reader.block(index)
        refuse_non_finite(saved)
        with shell.live(index, saved) as block:
            clean.convert_(block)
            for stream in both.values():
                stream.push(index, block)
            for pair in pairs:
                if pair[1].block == index:
                    both[pair] = _dropped(alone[pair[0]], pair[1], block, architecture)
            alone = {drop: stream for drop, stream in alone.items() if any(a == drop and b.block > index for a, b in pairs)}
            for stream in alone.values():
                stream.push(index, block)
            for drop in dict.fromkeys(first for first, _ in pairs if first.block == index):
                alone[drop] = _dropped(clean, drop, block, architecture)
            clean.push(index, block)
        del block, saved
        give_back()
        on_block(index + 1, blocks, f"block {index + 1} of {blocks}: pairs of drops are priced")
    _, found = divergences(shell, clean, both)
    return tuple(PairPrice(first=first, second=second, loss=float(loss_N.mean())) for (first, second), loss_N in found.items())


def _dropped(stream: Stream, drop: Drop, block: nn.Module, architecture: Architecture) -> Stream:
    """Return what becomes of a stream at a block that goes, or whose MoE layer does."""
    fork = stream.fork()
    if drop.kind == "layer":
        with without_layer(architecture, block):
            fork.push(drop.block, block)
    return fork


def text_hash(ids_NS: Tensor) -> str:
    """Return the sha256 of tokens, by which prices know what they were taken on."""
    return hashlib.sha256(ids_NS.cpu().numpy().astype("<i8").tobytes()).hexdigest()
