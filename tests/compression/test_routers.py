"""A family's router, taken out of its model, answers rows of tokens as it did inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.observer import Observer
from compression.sweep import Stream, sweep
from compression.trimming.reconstruction import Search
from compression.trimming.routers import Routers

IDS_NS = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", ["afmoe", "deepseek_v3", "jamba", "laguna"])
def test_asked_again_about_all_experts_it_answers_what_it_answered(tiny_model_factory: Callable[..., Path], family: str):
    reader = Reader(tiny_model_factory(family))
    shell = Shell(reader.config, reader.outside())
    observer = Observer(reader.architecture, ("text",), torch.zeros(len(IDS_NS), dtype=torch.long), ("tokens", "sample"))
    sweep(shell, reader, Stream(shell, IDS_NS), observer, lambda *_: None)
    routers = Routers(reader.config)

    for statistics in observer.study.experts.values():
        assert statistics.sample is not None
        search = Search(statistics.sample, routers)
        everyone = tuple(range(search.experts))
        assert search.loss(everyone) == pytest.approx(0, abs=1e-3 * search.loss(everyone[:4]))
