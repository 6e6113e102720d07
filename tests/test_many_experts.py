"""The parts of the bench that trains a model of many experts, on a model of few."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.train_many_experts import (
    Paced,
    Usage,
    evenly,
    loss_balanced_by_block,
    new_model,
    tokens_per_expert,
    train,
    usage_of,
    write_demo_text,
)
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.plan import make_plan
from compression.request import Compression
from examples.demo.language import train_tokenizer

TINY = Paced(
    vocabulary=300, width=64, expert_width=64, blocks=2, experts=6, experts_used=2, sequence=16, batch=2, steps=3, balance=0.05
)  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "calibration.txt").write_text("The list is sorted in place. " * 60, encoding="utf-8")
    (tmp_path / "heldout.txt").write_text("The place is listed in sorts. " * 30, encoding="utf-8")
    return tmp_path


# Pace


@pytest.mark.parametrize("seconds_per_step", [0.0, 0.5, 0.99], ids=["at once", "in half the time", "just in time"])
def test_a_machine_that_keeps_pace_trains_by_steps_alone(seconds_per_step: float):
    paced = Paced(steps=100, seconds=100.0)

    assert [paced.used(step, step * seconds_per_step) for step in range(101)] == [step / 100 for step in range(101)]


def test_one_slow_step_changes_nothing_and_a_machine_that_falls_behind_ends_in_time():
    paced = Paced(steps=100, seconds=100.0)

    assert paced.used(1, 10.9) == 0.01
    assert paced.used(10, 55.0) == pytest.approx(0.5)
    assert paced.used(20, 100.0) == pytest.approx(1.0)


# Balance


def test_of_one_block_the_loss_is_the_stock_classes():
    model = new_model(replace(TINY, blocks=1), train_tokenizer(["plain words"], TINY.vocabulary))
    ids_NS = torch.randint(0, TINY.vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))

    ours = loss_balanced_by_block(model, ids_NS)

    # 1e-6: the same float32 arithmetic, gone about in another order
    stock = model(input_ids=ids_NS, labels=ids_NS, output_router_logits=True)
    assert ours.item() == pytest.approx(stock.loss.item(), rel=1e-6)
    assert stock.aux_loss.item() > 1


def test_two_lopsided_blocks_do_not_make_up_for_one_another():
    logits_TE = torch.tensor([[30.0, 0.0]]).expand(8, 2)
    output = SimpleNamespace(logits=torch.zeros(1, 8, 5), router_logits=(logits_TE, logits_TE.flip(1)))
    config = SimpleNamespace(num_experts=2, num_experts_per_tok=1, router_aux_loss_coef=1.0)
    model: Any = Given(output, config)

    loss = loss_balanced_by_block(model, torch.zeros(1, 8, dtype=torch.long))

    # Balanced, the term is 1; with every token on one expert of two, 2. The other part is that of five even words.
    assert loss.item() == pytest.approx(math.log(5) + 2.0)


class Given:
    """A model that answers what it is given."""

    def __init__(self, output: object, config: object) -> None:
        self.output, self.config = output, config

    def __call__(self, **_: object) -> object:
        return self.output


# What is measured


def test_windows_are_spread_over_the_whole_text_and_no_more_than_asked_for():
    windows_NS = torch.arange(10).view(10, 1)

    assert evenly(windows_NS, 10).flatten().tolist() == list(range(10))
    assert evenly(windows_NS, 4).flatten().tolist() == [0, 3, 6, 9]
    assert evenly(windows_NS, 7).flatten().tolist() == [0, 2, 4, 6, 8]
    assert evenly(windows_NS, 99).flatten().tolist() == list(range(10))


def test_usage_is_told_in_even_shares():
    assert usage_of(torch.tensor([5, 5, 5])) == Usage(1.0, 1.0, 0.0)
    assert usage_of(torch.tensor([0, 2, 4])) == Usage(0.0, 2.0, pytest.approx((2 / 3) ** 0.5))


def test_every_token_counts_once_for_each_expert_that_its_router_chose():
    tokenizer = train_tokenizer(["plain words"], TINY.vocabulary)
    model = new_model(TINY, tokenizer).eval()
    ids_NS = torch.randint(0, TINY.vocabulary, (5, 12), generator=torch.Generator().manual_seed(0))
    seen = [torch.zeros(TINY.experts, dtype=torch.long) for _ in range(TINY.blocks)]
    for counts_E, block in zip(seen, model.model.layers, strict=True):

        def count(_: object, given: tuple[torch.Tensor, ...], counts_E: torch.Tensor = counts_E) -> None:
            counts_E += torch.bincount(given[1].flatten(), minlength=TINY.experts)

        block.mlp.experts.register_forward_pre_hook(count)

    counts_LE = tokens_per_expert(model, ids_NS, batch=2)

    assert counts_LE.sum(1).tolist() == [5 * 12 * TINY.experts_used] * TINY.blocks
    assert counts_LE.tolist() == [counts_E.tolist() for counts_E in seen]


# The whole


def test_it_trains_a_stock_checkpoint_that_can_be_quantized_and_measures_what_it_saved(text: Path):
    measured = train(text / "model", text, TINY)

    model = AutoModelForCausalLM.from_pretrained(text / "model")
    assert (model.config.model_type, model.dtype, model.config.output_router_logits) == ("qwen3_moe", torch.bfloat16, False)
    assert len(AutoTokenizer.from_pretrained(text / "model")) <= TINY.vocabulary
    assert measured.steps == 3
    assert len(measured.usage) == TINY.blocks
    request = Compression.model_validate(
        {"model": "hub/name", "recipe": {"steps": [{"step": "quantize", "group_size": 32, "attention": "W4A16"}]}}
    )
    assert make_plan(request, read_checkpoint(FolderFiles(text / "model"))).feasible


def test_the_same_machine_trains_the_same_model_again(text: Path):
    for name in ("one", "two"):
        train(text / name, text, TINY)

    assert (text / "one" / "model.safetensors").read_bytes() == (text / "two" / "model.safetensors").read_bytes()


def test_the_held_out_text_is_never_learned_from(text: Path):
    one = train(text / "one", text, TINY)
    (text / "heldout.txt").write_text("Another text altogether. " * 30, encoding="utf-8")
    two = train(text / "two", text, TINY)

    assert (text / "one" / "model.safetensors").read_bytes() == (text / "two" / "model.safetensors").read_bytes()
    assert (text / "one" / "tokenizer.json").read_bytes() == (text / "two" / "tokenizer.json").read_bytes()
    assert one.perplexity != two.perplexity


def test_without_a_text_the_demos_is_written_for_the_benches(tmp_path: Path):
    folder = write_demo_text(tmp_path / "text", TINY)

    sizes = [(folder / name).stat().st_size for name in ("calibration.txt", "heldout.txt")]
    assert sizes[0] > 5 * sizes[1] > 0
