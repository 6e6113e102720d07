"""What a study costs, part by part, beside a sweep that looks at nothing; how big it is; and what a second job pays.

    python -m bench.study_cost ../shared/models/mixtral-docs ../shared/data/docs [--rounds 5] [--samples 128]

Every round sweeps once with the empty visitor and once with each set of parts, one after another in the same process, and the
table gives the median over rounds of the ratio within a round. The search over subsets is timed beside the study that it reads,
and beside the published way, which runs the layer anew for each subset.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from bench._trained import arguments
from bench.expert_criteria import LENGTH, Bench
from compression.block import Shell
from compression.calibration import TokenSet, load_calibration
from compression.checkpoint.source import open_source
from compression.moe import moe_layer
from compression.observer import Observer
from compression.recipe import ExpertDrop
from compression.request import Calibration
from compression.study import Part
from compression.study_store import StudyStore
from compression.sweep import Push, Stream, Visitor, sweep, working_dtype

PARTS: dict[str, tuple[Part, ...]] = {
    "routing, outputs, cosines": ("tokens",),
    "and sampled outputs": ("tokens", "sample"),
    "and likeness of weights": ("tokens", "likeness"),
    "and trial errors (Gram matrices)": ("tokens", "trials"),
}


def main() -> None:
    """Measure, and print the tables."""
    given = arguments(__doc__, _settings)
    if given is None:
        return
    settings = Calibration(source=(given.text / "calibration.txt").as_uri(), samples=given.samples, sequence_length=LENGTH)
    tokens = load_calibration(settings, given.model)
    print(f"{tokens.tokens} tokens, {torch.get_num_threads()} threads, median of {given.rounds} rounds")
    _parts(given.model, tokens, given.rounds)
    bench = Bench(given.model, given.text)
    _stored(bench, tokens)
    _search(bench, tokens, given.rounds)


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128, help=f"of {LENGTH} tokens")


def _parts(model: Path, tokens: TokenSet, rounds: int) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in PARTS}
    empty: list[float] = []
    for _ in range(rounds):
        empty.append(_sweep(model, tokens, lambda _: Push()))
        for name, parts in PARTS.items():
            seconds = _sweep(model, tokens, lambda row, parts=parts: Observer(row, tokens.domains, tokens.domain_N, parts))
            ratios[name].append(seconds / empty[-1])
    print(f"\n{'empty visitor':36s} {median(empty):7.2f} s")
    for name, values in ratios.items():
        print(f"{name:36s} {median(values):7.2f} times ({min(values):.2f} to {max(values):.2f})")


def _sweep(model: Path, tokens: TokenSet, visitor: Callable[[Any], Visitor]) -> float:
    reader = open_source(model)
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, tokens.ids_NS, dtype=working_dtype(shell.device, shell.dtype))
    watcher = visitor(reader.architecture)
    start = time.perf_counter()
    sweep(shell, reader, stream, watcher, lambda *_: None)
    return time.perf_counter() - start


def _stored(bench: Bench, tokens: TokenSet) -> None:
    """Print a study's size on disk, and what it takes a second job to find it and to decide."""
    model = bench.reader.folder
    reader = open_source(model)
    shell = Shell(reader.config, reader.outside())
    dtype = working_dtype(shell.device, shell.dtype)
    observer = Observer(reader.architecture, tokens.domains, tokens.domain_N, ("tokens", "sample", "likeness"))
    reader.hashing = True
    sweep(shell, reader, Stream(shell, tokens.ids_NS, dtype=dtype), observer, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="slimtrim-bench-") as folder:
        store = StudyStore(Path(folder))
        place = store.keep(observer.study, reader, tokens.content_hash, dtype)
        sizes = {file.name: file.stat().st_size for file in place.iterdir()}
        start = time.perf_counter()
        found = store.find(open_source(model), tokens.content_hash, frozenset({"tokens", "sample"}), dtype)
        finding = time.perf_counter() - start
        assert found is not None
        start = time.perf_counter()
        for criterion in ("reap", "hope", "routing_score"):
            bench.choose(ExpertDrop.model_validate({"criterion": criterion, "experts_kept": 4}), found)
        choosing = time.perf_counter() - start
    weights = sum(header.bytes for header in reader.checkpoint.tensors.values())
    print(f"\nstudy on disk: {sizes}, {sum(sizes.values()) / weights:.3f} of the model's {weights} bytes")
    print(f"second job: {finding:.3f} s to find it and read it, {choosing:.3f} s to choose by three criteria; no weight is read")


def _search(bench: Bench, tokens: TokenSet, rounds: int) -> None:
    """Print what the search for 4 of 8 experts costs beside its study, and beside running the layer for every subset."""
    model = bench.reader.folder
    shares: list[float] = []
    for _ in range(rounds):
        reader = open_source(model)
        shell = Shell(reader.config, reader.outside())
        observer = Observer(reader.architecture, tokens.domains, tokens.domain_N, ("tokens", "sample"))
        stream = Stream(shell, tokens.ids_NS, dtype=working_dtype(shell.device, shell.dtype))
        start = time.perf_counter()
        sweep(shell, reader, stream, observer, lambda *_: None)
        study = time.perf_counter() - start
        start = time.perf_counter()
        cuts = bench.choose(ExpertDrop(criterion="reconstruction", experts_kept=4), observer.study)
        shares.append((time.perf_counter() - start) / study)
    published = _Published(4)
    seconds = _sweep(model, tokens, lambda row: published.of(row, observer))
    same = sum(cuts.experts[block] == kept for block, kept in published.kept.items())
    print(f"\nsearch for 4 of 8 experts over all 70 subsets: {median(shares):.3f} of its study ({max(shares):.3f} at most)")
    print(f"run anew for every subset on the same sampled tokens: {published.seconds:.1f} s of a sweep of {seconds:.1f} s")
    print(f"the same experts in {same} of {len(published.kept)} layers")


class _Published:
    """Searches as the published code does: the router without some experts, and the layer run again, for every subset."""

    def __init__(self, keep: int) -> None:
        self.keep, self.seconds = keep, 0.0
        self.kept: dict[int, tuple[int, ...]] = {}

    def of(self, architecture: Any, observer: Observer) -> _Published:
        """Take the tokens that the study sampled."""
        self._architecture, self._places = architecture, observer
        return self

    def visit(self, index: int, block: nn.Module, stream: Stream) -> None:
        """Search the block's MoE layer, then push the stream."""
        layer = moe_layer(self._architecture, block)
        inputs: list[torch.Tensor] = []
        if layer is not None:
            hook = layer.experts.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
        stream.push(index, block)
        if layer is None:
            return
        hook.remove()
        x_TD = torch.cat(inputs)
        sampled = len(self._places.study.experts[index].sample.domain_S)  # type: ignore[union-attr]
        x_SD = x_TD[torch.arange(sampled) * len(x_TD) // sampled]
        start = time.perf_counter()
        router = block.get_submodule(self._architecture.running_router)
        self.kept[index] = self._best(layer.experts, x_SD, x_SD @ router.weight.mT)
        self.seconds += time.perf_counter() - start

    def _best(self, experts: Any, x_SD: torch.Tensor, logits_SE: torch.Tensor) -> tuple[int, ...]:
        count = logits_SE.shape[1]
        right_SD = self._run(experts, x_SD, logits_SE, ())
        losses = {
            gone: float((right_SD - self._run(experts, x_SD, logits_SE, gone)).double().norm())
            for gone in combinations(range(count), count - self.keep)
        }
        gone = min(losses, key=lambda subset: losses[subset])
        return tuple(expert for expert in range(count) if expert not in gone)

    @torch.no_grad()
    def _run(self, experts: Any, x_SD: torch.Tensor, logits_SE: torch.Tensor, gone: tuple[int, ...]) -> torch.Tensor:
        without_SE = logits_SE.clone()
        without_SE[:, list(gone)] = -torch.inf
        weights_SK, ids_SK = without_SE.float().softmax(-1).topk(2, dim=-1)
        return experts(x_SD, ids_SK, weights_SK / weights_SK.sum(-1, keepdim=True))


if __name__ == "__main__":
    main()
