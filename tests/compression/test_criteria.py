"""Every criterion agrees with a slow reference in float64: scores to 1e-5, and the very same experts kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise as neighbours
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.calibration import load_calibration
from compression.checkpoint.reader import Reader
from compression.methods import Choice, choose_cuts
from compression.observer import Observer
from compression.recipe import ExpertDrop
from compression.request import Calibration
from compression.study import Study
from compression.sweep import Stream, sweep
from compression.trimming import Cuts, Routing, expert_drop, pairwise, reconstruction
from compression.trimming.routers import Routers
from tests.compression import slow_criteria
from tests.compression.slow_criteria import Layer

ONE_BY_ONE = ("routing_score", "frequency", "expert_norm", "reap", "man", "msan", "aimer")
TIED = 1e-9
"""Scores that are closer than this, relative to the largest, are ties: the reference cannot order them either."""


@pytest.fixture(scope="module", params=["random", "trained"])
def looked_at(request, tiny_model_factory: Callable[..., Path]) -> tuple[Study, dict[int, Layer], Path]:
    """A study and the slow reference's view of the same model and tokens: a tiny random model, and a trained one."""
    if request.param == "random":
        folder = tiny_model_factory("mixtral")
        ids_NS = torch.randint(3, 300, (8, 48), generator=torch.Generator().manual_seed(5))
    else:
        folder = request.getfixturevalue("shared_folder") / "models" / "mixtral-docs"
        ids_NS = load_calibration(Calibration(samples=8, sequence_length=64), folder).ids_NS
    return study_of(folder, ids_NS), slow_criteria.layers_of(folder, ids_NS), folder


def study_of(folder: Path, ids_NS: torch.Tensor) -> Study:
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    observer = Observer(ARCHITECTURES["mixtral"], ("text",), torch.zeros(len(ids_NS), dtype=torch.long), ("tokens", "sample"))
    sweep(shell, reader, Stream(shell, ids_NS, dtype=torch.float64), observer, lambda *_: None)
    return observer.study


@cache
def routing_of(folder: Path) -> Routing:
    return Routing(experts=8, top_k=2, router=Routers(Reader(folder).config))


def kept(study: Study, folder: Path, criterion: str, count: int) -> dict[int, tuple[int, ...]]:
    blocks = tuple(study.cosine_M)
    whole = Cuts(blocks, {block: tuple(range(8)) for block in blocks})
    step = ExpertDrop.model_validate({"criterion": criterion, "experts_kept": count})
    return dict(choose_cuts((step,), study, whole, Choice(frozenset(blocks), routing_of(folder))).experts)


@pytest.mark.parametrize("criterion", ONE_BY_ONE)
def test_scores_are_those_of_the_definition(looked_at, criterion: str):
    study, layers, _ = looked_at

    for block, layer in layers.items():
        ours = expert_drop.CRITERIA[criterion](study.experts[block])
        slow = torch.tensor(slow_criteria.scores(layer, criterion), dtype=torch.float64)

        # Norms are taken in float32, whose rounding is 6e-8; the issue is whether a formula is right.
        torch.testing.assert_close(ours, slow, rtol=1e-5, atol=0)


@pytest.mark.parametrize("criterion", ONE_BY_ONE)
@pytest.mark.parametrize("count", [4, 6])
def test_the_kept_experts_are_the_references_own_but_for_ties(looked_at, criterion: str, count: int):
    study, layers, folder = looked_at

    for block, experts in kept(study, folder, criterion, count).items():
        slow = slow_criteria.scores(layers[block], criterion)
        ordered = sorted(slow, reverse=True)
        tied = abs(ordered[count - 1] - ordered[count]) <= TIED * max(map(abs, slow))
        best = tuple(sorted(sorted(range(8), key=lambda e: (-slow[e], e))[:count]))

        assert experts == best or tied, (block, slow)


def test_pairs_are_weighed_as_hope_defines_them(looked_at):
    study, layers, _ = looked_at

    for block, layer in layers.items():
        ours = pairwise.interactions(study.experts[block])

        torch.testing.assert_close(ours, torch.from_numpy(slow_criteria.hope(layer)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [4, 6])
def test_hope_keeps_the_best_of_all_sets(looked_at, count: int):
    study, layers, folder = looked_at

    assert kept(study, folder, "hope", count) == {b: slow_criteria.best_pairwise(layer, count) for b, layer in layers.items()}


@pytest.mark.parametrize("count", [4, 6])
def test_reconstruction_finds_what_running_the_layer_for_every_set_finds(looked_at, count: int):
    study, layers, folder = looked_at
    ours = kept(study, folder, "reconstruction", count)

    for block, layer in layers.items():
        losses = slow_criteria.reconstruction_losses(layer, count)
        loss_of = reconstruction.loss_of(study.experts[block], routing_of(folder).router)

        best = min(losses, key=lambda subset: losses[subset])
        size = float(np.linalg.norm(layer.output()))
        tied = losses[ours[block]] - losses[best] <= 1e-6 * size  # such as experts that no token chose
        assert ours[block] == best or tied
        for subset, loss in losses.items():
            # A difference of float32 inner products: exact to 1e-3, or to 1e-5 of the whole output where nearly all cancels.
            assert loss_of(subset) == pytest.approx(loss, rel=1e-3, abs=1e-5 * size)


def test_keeping_all_experts_changes_no_output(looked_at):
    study, _, folder = looked_at

    for statistics in study.experts.values():
        assert reconstruction.loss_of(statistics, routing_of(folder).router)(tuple(range(8))) == pytest.approx(0.0, abs=1e-3)


def test_losses_grow_as_sets_shrink(looked_at):
    study, _, folder = looked_at
    loss_of = reconstruction.loss_of(study.experts[0], routing_of(folder).router)

    best = [loss_of(kept(study, folder, "reconstruction", count)[0]) for count in (8, 7, 6, 5, 4)]

    assert all(a < b for a, b in neighbours(best))


def test_the_layers_cosine_is_that_of_the_residual_stream_before_and_after(looked_at):
    study, layers, _ = looked_at

    for block, layer in layers.items():
        after_TD = layer.residual + layer.output()
        product_T = (layer.residual * after_TD).sum(1)
        cosine_T = product_T / ((layer.residual**2).sum(1) ** 0.5 * (after_TD**2).sum(1) ** 0.5)

        assert study.experts[block].layer_cosine == pytest.approx(cosine_T.mean(), rel=1e-5)


def test_looking_up_what_changes_gives_the_loss_of_multiplying_everything_out(looked_at, monkeypatch):
    study, _, folder = looked_at
    sample, router = study.experts[1].sample, routing_of(folder).router
    whole = reconstruction.Search(sample, router)
    monkeypatch.setattr(reconstruction, "_FEW", 0)
    looked_up = reconstruction.Search(sample, router)

    for kept_experts in ((0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6, 7), (1, 3)):
        assert looked_up.loss(kept_experts) == pytest.approx(whole.loss(kept_experts), rel=1e-9)
