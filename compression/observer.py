"""The visitor that fills a Study: it watches every block of the untouched model do its own work.

Nothing is computed twice for it: experts run once on each of their tokens, here rather than in the stock class, and the
statistics are sums over what they answered. Parts beyond that run after the block and are timed apart.

Shapes: M domains, E experts, T tokens, K experts per token, D width, F expert width, L blocks, P pairs, S sampled tokens.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compression.analysis.likeness import likeness
from compression.architectures import Architecture
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.collect import probability
from compression.memory import give_back
from compression.moe import MoELayer, Outputs, Routed, moe_layer
from compression.study import RATIO_BINS, ExpertStatistics, Part, Sample, Study
from compression.sweep import OnBlock, Stream
from compression.trials import trial_errors

_SAMPLED_TOKENS = 2048
"""Tokens of a layer that are shown to every expert, at most."""
_SAMPLE_NUMBERS = 2**22
"""Numbers in one layer's Gram matrices of sampled outputs, at most: with many experts, fewer tokens."""
_OUTPUT_NUMBERS = 2**27
"""Numbers in sampled outputs held at once, at most."""
_SPAN_TOKENS = 4096
"""Tokens on which spans of blocks are compared, at most."""
_HIDDEN_BYTES = 2**30
"""Bytes of sampled activations that wait for the blocks to come, at most."""


class Observer:
    """Watches every block of the untouched model and fills a Study."""

    def __init__(
        self, architecture: Architecture, domains: tuple[str, ...], domain_N: Tensor, parts: Iterable[Part] = ("tokens",)
    ) -> None:
        """``domain_N``: index into ``domains`` of each sequence; ``parts``: what to gather, see ``study.py``."""
        wanted = frozenset[Part]((*parts, "weights"))
        self.study = Study(domains=domains, parts=wanted)
        self._architecture = architecture
        self._domain_N = domain_N
        self._spans = _Spans(len(domains))

    @torch.no_grad()
    def visit(self, index: int, block: nn.Module, stream: Stream) -> None:
        """Push the stream through the block and add up what it shows."""
        layer = moe_layer(self._architecture, block)
        if "trials" in self.study.parts:
            with self._timed("trials"):
                self.study.trials[index] = trial_errors(index, block, stream, self._architecture)
                stream.forget()
        watch = _Watch(self._architecture, len(self.study.domains), self._domains_of(stream), stream, layer)
        sampled = _sampled(stream, layer) if layer is not None and "sample" in self.study.parts else None
        with self._timed("tokens"):
            self._spans.start(stream, watch.domains)
            watch.push(index, block, keep=sampled)
            self.study.tokens_M, self.study.cosine_M[index] = watch.tokens_M, watch.cosine_M
            self.study.span_MLL, self.study.sampled_M = self._spans.add(stream, index)
        if layer is None:
            return
        assert watch.statistics is not None
        self.study.experts[index] = statistics = watch.statistics
        if sampled is not None:
            with self._timed("sample"):
                statistics.sample = watch.sample()
        if "likeness" in self.study.parts:
            with self._timed("likeness"):
                statistics.likeness = likeness(layer, block.get_submodule(self._architecture.running_router))

    def weigh(self, index: int, block: nn.Module) -> None:
        """Take only what the weights say, without any token."""
        layer = moe_layer(self._architecture, block)
        if layer is not None:
            self.study.experts[index] = _empty(layer, domains=len(self.study.domains), used=0, width=0)

    def _domains_of(self, stream: Stream) -> list[Tensor]:
        split = self._domain_N.split([ids.shape[0] for ids in stream.ids])
        return [domain_B.repeat_interleave(ids.shape[1]) for domain_B, ids in zip(split, stream.ids, strict=True)]

    @contextmanager
    def _timed(self, part: Part) -> Generator[None]:
        start = time.perf_counter()
        yield
        self.study.seconds[part] = self.study.seconds.get(part, 0.0) + time.perf_counter() - start


def weigh(shell: Shell, reader: Reader, architecture: Architecture, on_block: OnBlock) -> Study:
    """Return a study of the weights alone: no token, no activation."""
    observer = Observer(architecture, ("text",), torch.zeros(1, dtype=torch.int64), ("weights",))
    for index in range(len(shell.blocks)):
        with shell.live(index, reader.block(index)) as block:
            observer.weigh(index, block)
        give_back()
        on_block(index + 1, len(shell.blocks), f"weighed block {index + 1} of {len(shell.blocks)}")
    return observer.study


class _Watch:
    """One block under observation."""

    def __init__(
        self, architecture: Architecture, count: int, domains: list[Tensor], stream: Stream, layer: MoELayer | None
    ) -> None:
        self.domains = domains
        self.tokens_M = torch.zeros(count, dtype=torch.float64)
        self.cosine_M = torch.zeros(count, dtype=torch.float64)
        self.statistics: ExpertStatistics | None = None
        self._architecture, self._count, self._stream, self._layer = architecture, count, stream, layer
        self._batch = 0
        self._probability_TE = self._before_TD = self._added_TD = torch.empty(0)
        self._kept: list[tuple[Tensor, ...]] = []
        self._keep: list[Tensor] | None = None
        self._router: dict[str, Tensor] = {}

    def push(self, index: int, block: nn.Module, *, keep: list[Tensor] | None) -> None:
        """Push the stream; ``keep``: positions in each micro-batch of the tokens to sample."""
        with ExitStack() as stack:
            if self._layer is not None:
                entry = block.get_submodule(self._architecture.layer_entry or self._architecture.feed_forward_norm)
                router = block.get_submodule(self._architecture.running_router)
                whole = block.get_submodule(self._architecture.running_moe)
                hooks = [entry.register_forward_pre_hook(self._see_entry), router.register_forward_hook(self._see_router)]
                if self._architecture.parallel:
                    hooks.append(whole.register_forward_hook(self._see_layer))
                for hook in hooks:
                    stack.callback(hook.remove)
                self._keep = keep
                stack.enter_context(self._layer.observed(self._see_experts))
            self._stream.push(index, block, self._compare)

    def _see_entry(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._before_TD = args[0].flatten(0, -2)

    def _see_layer(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._added_TD = output.flatten(0, -2)

    def _see_router(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        assert self._layer is not None
        if not self._router and self._keep is not None:
            self._router = _held_by(module, args, self._layer.count)
        self._logits_TE = output[0].flatten(0, -2)
        self._probability_TE = probability(self._logits_TE, self._architecture)

    def _compare(self, batch: int, input_BSD: Tensor, output_BSD: Tensor) -> None:
        domain_T = self.domains[batch].to(input_BSD.device)
        output_TD = output_BSD.flatten(0, -2)
        ones_T = output_TD.new_ones(len(output_TD))
        self.tokens_M += self._by_domain(domain_T, ones_T)
        self.cosine_M += self._by_domain(domain_T, _cosine(input_BSD.flatten(0, -2), output_TD))
        if self.statistics is not None:
            self.statistics.tokens_M += self._by_domain(domain_T, ones_T)
            # Beside attention, the residual stream without the layer is what leaves the block, less what the layer added.
            before_TD = output_TD - self._added_TD if self._architecture.parallel else self._before_TD
            self.statistics.layer_cosine_M += self._by_domain(domain_T, _cosine(before_TD, output_TD))
        self._batch = batch + 1

    def _see_experts(self, routed: Routed, outputs: Outputs) -> None:
        assert self._layer is not None
        if self.statistics is None:
            used, width = routed.ids_TK.shape[1], routed.x_TD.shape[1]
            self.statistics = _empty(self._layer, domains=self._count, used=used, width=width)
        domain_T = self.domains[self._batch].to(routed.x_TD.device)
        self._add(self.statistics, domain_T, routed, outputs)
        if self._keep is not None:
            place_S = self._keep[self._batch].to(routed.x_TD.device)
            kept = (routed.x_TD, routed.ids_TK, routed.weights_TK, self._logits_TE, domain_T)
            self._kept.append(tuple(value[place_S] for value in kept))

    def _add(self, into: ExpertStatistics, domain_T: Tensor, routed: Routed, outputs: Outputs) -> None:
        norm_P = _norm(outputs.value_PD)
        weight_P = routed.weights_TK.flatten()[outputs.order_P].to(norm_P.dtype)
        _add_pairs(into, domain_T[outputs.token_P], outputs, weight_P, norm_P)
        pairs = _Pairs(
            routed.ids_TK, routed.weights_TK, outputs.by_token(norm_P), outputs.by_token(weight_P * norm_P), self._probability_TE
        )
        for domain in domain_T.unique().tolist():
            is_here_T = domain_T == domain
            whole = bool(is_here_T.all())
            _add_tokens(into, domain, pairs if whole else pairs.of(is_here_T))
            for expert, tokens, rows in outputs.by_expert():
                value_PD = outputs.value_PD[rows]
                _add_outputs(into, domain, expert, value_PD if whole else value_PD[is_here_T[tokens]])

    def sample(self) -> Sample:
        """Show the kept tokens to every expert."""
        assert self._layer is not None
        layer = self._layer
        x_SD, ids_SK, weights_SK, logits_SE, domain_S = (torch.cat(values) for values in zip(*self._kept, strict=True))
        weights_SE = torch.zeros(len(x_SD), layer.count, dtype=torch.float64, device=x_SD.device)
        weights_SE.scatter_(1, ids_SK, weights_SK.double())
        size = max(1, _OUTPUT_NUMBERS // (layer.count * x_SD.shape[1]))
        grams: list[Tensor] = []
        for some_SD in x_SD.split(size):
            output_SED = torch.stack([layer.output(expert, some_SD) for expert in range(layer.count)], dim=1)
            output_SED = output_SED.to(torch.promote_types(output_SED.dtype, torch.float32))
            grams.append(torch.bmm(output_SED, output_SED.mT).cpu())
        return Sample(domain_S.cpu(), logits_SE.cpu(), weights_SE.cpu(), torch.cat(grams), self._router)

    def _by_domain(self, domain_T: Tensor, value_T: Tensor) -> Tensor:
        total_M = torch.zeros(self._count, dtype=torch.float64, device=value_T.device)
        return total_M.index_add_(0, domain_T, value_T.double()).cpu()


class _Pairs(NamedTuple):
    """What one call of the experts shows, token by token."""

    ids_TK: Tensor
    weights_TK: Tensor
    norm_TK: Tensor
    weighted_TK: Tensor
    probability_TE: Tensor

    def of(self, is_here_T: Tensor) -> _Pairs:
        """Return the same for some of the tokens."""
        return _Pairs(*(value[is_here_T] for value in self))


def _add_pairs(into: ExpertStatistics, domain_P: Tensor, outputs: Outputs, weight_P: Tensor, norm_P: Tensor) -> None:
    """Add up what one expert did with one token, by domain and expert."""
    experts = into.count_ME.shape[1]
    expert_P = torch.repeat_interleave(torch.arange(experts, device=norm_P.device), outputs.count_E)
    slot_P = domain_P * experts + expert_P
    weighted_P = weight_P * norm_P
    sums = {
        into.count_ME: torch.ones_like(norm_P),
        into.weight_ME: weight_P,
        into.norm_ME: norm_P,
        into.square_ME: norm_P.double().square(),
        into.weighted_norm_ME: weighted_P,
        into.weighted_square_ME: weighted_P.double().square(),
    }
    for total_ME, value_P in sums.items():
        sum_S = torch.zeros(total_ME.numel(), dtype=torch.float64, device=norm_P.device)
        total_ME += sum_S.index_add_(0, slot_P, value_P.double()).view(total_ME.shape).cpu()


def _add_tokens(into: ExpertStatistics, domain: int, pairs: _Pairs) -> None:
    """Add up what a token's experts show together."""
    into.probability_ME[domain] += pairs.probability_TE.sum(0, dtype=torch.float64).cpu()
    value_TE = pairs.norm_TK.new_zeros(len(pairs.ids_TK), into.count_ME.shape[1])
    into.together_MEE[domain] += _gram(value_TE.scatter_(1, pairs.ids_TK, 1.0))
    into.together_norm_MEE[domain] += _gram(value_TE.scatter_(1, pairs.ids_TK, pairs.weighted_TK))
    into.rank_MKK[domain] += _ranks(pairs.weights_TK, pairs.norm_TK)
    into.ratio_MB[domain] += _ratios(pairs.weights_TK)


def _add_outputs(into: ExpertStatistics, domain: int, expert: int, value_PD: Tensor) -> None:
    """Add up what one expert answered to its tokens."""
    if len(value_PD):
        dtype = torch.promote_types(value_PD.dtype, torch.float32)
        into.output_MED[domain, expert] += value_PD.sum(0, dtype=dtype).double().cpu()
        largest = max(float(value_PD.max()), -float(value_PD.min()))
        into.largest_ME[domain, expert] = max(float(into.largest_ME[domain, expert]), largest)


class _Spans:
    """Cosines between what enters and what leaves every span of blocks, on a sample of tokens."""

    def __init__(self, domains: int) -> None:
        self._domains = domains
        self._hidden: list[Tensor] = []
        self._span_MLL = torch.zeros(domains, 0, 0, dtype=torch.float64)

    def start(self, stream: Stream, domains: list[Tensor]) -> None:
        """Take the first block's inputs, unless that was done before."""
        if not self._hidden:
            width = stream.hidden[0].shape[-1] * (stream.blocks + 1)
            self._places = _spread(stream, max(1, min(_SPAN_TOKENS, _HIDDEN_BYTES // (4 * width))))
            self._domain_S = torch.cat([domain_T[place_S] for domain_T, place_S in zip(domains, self._places, strict=True)])
            self._span_MLL = torch.zeros(self._domains, stream.blocks, stream.blocks, dtype=torch.float64)
            self._hidden.append(self._directions(stream))

    def add(self, stream: Stream, index: int) -> tuple[Tensor, Tensor]:
        """Compare this block's outputs with the inputs of all blocks so far; return the sums, and the tokens per domain."""
        after_SD = self._directions(stream)
        for first, before_SD in enumerate(self._hidden):
            cosine_S = torch.linalg.vecdot(before_SD, after_SD).double()
            self._span_MLL[:, first, index].index_add_(0, self._domain_S, cosine_S)
        self._hidden.append(after_SD)
        return self._span_MLL, torch.bincount(self._domain_S, minlength=self._domains).double()

    def _directions(self, stream: Stream) -> Tensor:
        rows = [hidden.flatten(0, -2)[place_S] for hidden, place_S in zip(stream.hidden, self._places, strict=True)]
        return torch.nn.functional.normalize(torch.cat(rows).float(), dim=1)


def _empty(layer: MoELayer, *, domains: int, used: int, width: int) -> ExpertStatistics:
    sizes = {"M": domains, "E": layer.count, "K": used, "D": width, "B": RATIO_BINS}
    zeros = {
        entry.name: torch.zeros([sizes[letter] for letter in entry.name.rsplit("_", 1)[1]], dtype=torch.float64)
        for entry in fields(ExpertStatistics)
        if "_M" in entry.name
    }
    sums: Any = weight_sums(layer)
    return ExpertStatistics(**zeros, **sums)


def _held_by(router: nn.Module, args: tuple[Any, ...], experts: int) -> dict[str, Tensor]:
    """Return what a router has for each expert beside its logits: buffers, and tensors that it is called with."""
    # A bias of the logits is in the logits already. What only sways the choice is a buffer, or called what it is.
    swaying = [*router.named_buffers(), *(pair for pair in router.named_parameters() if "correction" in pair[0])]
    held = {name: value.flatten() for name, value in swaying if value.numel() == experts}
    held |= {
        f"argument {place}": value for place, value in enumerate(args) if isinstance(value, Tensor) and value.shape == (experts,)
    }
    return {name: value.detach().float().cpu().clone() for name, value in held.items()}


def weight_sums(layer: MoELayer) -> dict[str, Tensor | int]:
    """Return the sums of magnitudes and squares over each expert's matrices, and how many weights these are."""
    stacks = [layer.stack(name, range(layer.count)) for name in ("gate_up_proj", "down_proj")]
    return {
        "absolute_E": sum(stack_EOI.abs().sum((1, 2), dtype=torch.float64).cpu() for stack_EOI in stacks),
        "magnitude_E": sum(stack_EOI.float().square().sum((1, 2), dtype=torch.float64).cpu() for stack_EOI in stacks),
        "parameters": sum(stack_EOI[0].numel() for stack_EOI in stacks),
    }


def _sampled(stream: Stream, layer: MoELayer) -> list[Tensor]:
    return _spread(stream, max(1, min(_SAMPLED_TOKENS, _SAMPLE_NUMBERS // layer.count**2)))


def _spread(stream: Stream, wanted: int) -> list[Tensor]:
    """Return places of at most so many tokens, evenly spread over all of them, by micro-batch."""
    sizes = [ids.numel() for ids in stream.ids]
    total = sum(sizes)
    place_S = torch.arange(min(wanted, total)) * total // min(wanted, total)
    places: list[Tensor] = []
    start = 0
    for size in sizes:
        places.append(place_S[(place_S >= start) & (place_S < start + size)] - start)
        start += size
    return places


def _cosine(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    # In one precision and one pass each; the product is rescaled in float64, where small norms do not underflow.
    dtype = torch.promote_types(a_TD.dtype, torch.float32)
    product_T = torch.linalg.vecdot(a_TD.to(dtype), b_TD.to(dtype)).double()
    norms_T = _norm(a_TD).double() * _norm(b_TD).double()
    return product_T / norms_T.clamp(min=torch.finfo(torch.float32).tiny)


def _norm(value_TD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value_TD, dim=1, dtype=torch.promote_types(value_TD.dtype, torch.float32))


def _gram(value_TE: Tensor) -> Tensor:
    return (value_TE.mT @ value_TE).double().cpu()


def _ranks(weights_TK: Tensor, norm_TK: Tensor) -> Tensor:
    used = weights_TK.shape[1]
    by_weight_TK = _places(weights_TK)
    by_norm_TK = _places(norm_TK)
    return torch.bincount((by_weight_TK * used + by_norm_TK).flatten(), minlength=used**2).view(used, used).double().cpu()


def _places(value_TK: Tensor) -> Tensor:
    return value_TK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _ratios(weights_TK: Tensor) -> Tensor:
    ordered_TK = weights_TK.double().sort(1, descending=True).values
    half = -(-ordered_TK.shape[1] // 2)
    ratio_T = ordered_TK[:, half:].sum(1) / ordered_TK[:, :half].sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    place_T = (ratio_T * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)
    return torch.bincount(place_T, minlength=RATIO_BINS).double().cpu()
