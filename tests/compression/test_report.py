"""The report: its worst news first, in sentences that say what the numbers say, and a card that tells how to open what."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from compression.card import model_card
from compression.measured import Quality
from compression.report import BlockRow, LedgerRow, Report, Verification, worst_first
from compression.reporting import without_long_texts
from compression.request import Compression, InlineText
from tests.compression.made_reports import full_report

QUALITY = Quality(tokens=1000, loss_before=2.0, loss_after=2.1, divergence=0.05, top1_agreement=0.9)
WINDOWS = Verification(
    opened_with="transformers 5.23.0", mode="windows", largest_logit_difference=0.0, tokens=512, tensors_scanned=9
)
PACKED = WINDOWS.model_copy(update={"opened_with": "slimtrim_runtime.py on transformers 5.23.0", "rules_of_vllm": "not followed"})


def row(tensor: str = "model.layers.0.mlp.experts.3.up_proj.weight", **changes: Any) -> LedgerRow:
    plain = {"tensor": tensor, "scheme": "W4A16", "method_asked": "gptq", "method_used": "gptq", "tokens": 900}
    plain |= {"tokens_topped_up": 0, "damping": 0.01, "error_before": 0.02, "error_after": 0.01, "error_of": "outputs"}
    return LedgerRow.model_validate({**plain, "zeros": 0.1, "bits": 4.5, **changes})


def block(index: int, **changes: Any) -> BlockRow:
    plain = {"index": index, "action": "keep", "index_after": index, "experts_kept": tuple(range(8)), "experts_before": 8}
    return BlockRow.model_validate({**plain, "cosine": None, "expert_tokens": None, **changes})


def report(**changes: Any) -> Report:
    plain: dict[str, Any] = {
        "model": "owner/name",
        "revision": "main",
        "profile": "portable",
        "steps": ({"step": "quantize", "method": "gptq", "group_size": None},),
        "bytes_before": 4000,
        "bytes_after": 1000,
        "bytes_planned": 1000,
        "target_bytes": None,
        "memory": {"transformers": 4321, "packed_engine": 1234},
        "components": {},
        "quality": QUALITY,
        "lost": ("This is gone.", "And that."),
        "warnings": (),
        "blocks": (),
        "ledger": (),
        "verification": WINDOWS,
        "calibration": None,
        "evaluation": {},
        "seconds": {},
        "peak_memory_bytes": {},
        "versions": {},
    }
    return Report(**{**plain, **changes})


def news(*ledger: LedgerRow) -> tuple[str, ...]:
    """What the ledger adds to the sentence about quality."""
    return worst_first(QUALITY, (), ledger)[1:]


def test_quality_comes_first_and_is_told_in_the_readers_units():
    (sentence,) = worst_first(QUALITY, (), ())

    # e^2.0 and e^2.1; e^0.1 is 10.5 % more.
    assert sentence == (
        "Perplexity went from 7.39 to 8.17 (+10.5%) on 1000 held-out tokens; the next token differs for 10.0% of them."
    )


def test_blocks_and_experts_that_are_gone_are_counted_and_blocks_named():
    blocks = (
        block(0, experts_kept=None, experts_before=None),
        block(1, experts_kept=(0, 2, 5), index_after=1),
        block(2, action="drop", index_after=None, experts_kept=None),
        block(3, experts_kept=(1, 2, 3), index_after=2),
    )

    assert worst_first(QUALITY, blocks, ())[1:] == (
        "1 of 4 blocks are gone: 2.",
        "10 experts are gone from the MoE layers that stay.",
    )


def test_nothing_is_said_of_what_is_not_gone():
    assert worst_first(QUALITY, (block(0), block(1)), ()) == worst_first(QUALITY, (), ())


def test_a_weight_that_was_slimmed_otherwise_than_asked_is_named_with_what_was_used():
    rounded = row("a.weight", method_used="rtn")
    both = row("b.weight", method_asked="sparsegpt+gptq", method_used="magnitude+rtn")

    told = news(row(), rounded, both)

    assert told[0] == (
        "2 of 3 weights had too little calibration to go by and were slimmed by magnitude+rtn and rtn: a.weight, b.weight."
    )


def test_an_expert_without_tokens_of_its_own_is_named_once_for_all_its_matrices():
    stem = "model.layers.2.mlp.experts.7"
    matrices = [row(f"{stem}.{part}_proj.weight", tokens=0, tokens_topped_up=256) for part in ("gate", "up", "down")]

    told = news(row(), *matrices)

    assert told[0] == f"1 experts or layers saw no calibration token of their own: {stem}."


def test_experts_of_one_tensor_are_told_apart():
    stem = "model.layers.2.mlp.experts"
    parts = [row(f"{stem}.{part}[{e}]", tokens=0) for part in ("gate_up_proj", "down_proj") for e in (3, 11)]

    assert news(*parts)[0] == f"2 experts or layers saw no calibration token of their own: {stem}.3, {stem}.11."


def test_where_no_tokens_were_needed_none_are_missed():
    told = news(row(tokens=None, damping=None, method_asked="rtn", method_used="rtn", error_of="weights"))

    assert told == ("The largest relative error of a weight is 1.00%, in model.layers.0.mlp.experts.3.up_proj.weight.",)


def test_experts_that_were_topped_up_are_counted_apart_from_those_that_saw_nothing():
    told = news(row(tokens=10, tokens_topped_up=246), row("x.3.up.weight", tokens=0, tokens_topped_up=256), row())

    assert told[1] == "1 weights of starved experts were topped up with tokens that the router nearly sent them."


def test_the_largest_error_is_named_last_with_what_it_is_an_error_of():
    told = news(row(), row("worst.weight", error_after=0.25, error_of="weights_times_inputs"), row(error_after=0.2))

    assert told[-1] == "The largest relative error of a weight times its inputs is 25.00%, in worst.weight."


def test_a_list_of_more_than_eight_says_how_many_it_leaves_out():
    told = news(*[row(f"w{number}.weight", method_used="rtn") for number in range(11)])

    assert told[0].endswith("w0.weight, " + ", ".join(f"w{n}.weight" for n in range(1, 8)) + " and 3 more.")


def test_retention_is_one_where_nothing_was_lost_and_less_where_something_was():
    assert QUALITY.model_copy(update={"loss_after": 2.0}).retention == 1.0
    assert QUALITY.retention == pytest.approx(math.exp(-0.1))
    assert QUALITY.perplexity_before / QUALITY.perplexity_after == pytest.approx(QUALITY.retention)


def test_the_summary_of_a_job_is_drawn_from_the_report():
    assert report().result() == {
        "bytes_before": 4000,
        "bytes_after": 1000,
        "ratio": 4.0,
        "retention": QUALITY.retention,
        "perplexity_before": QUALITY.perplexity_before,
        "perplexity_after": QUALITY.perplexity_after,
        "divergence": 0.05,
        "verified": True,
    }


def test_the_card_of_a_quantized_model_names_its_base_and_its_format_to_the_hub():
    card = model_card(report())

    assert card.startswith(
        "---\nbase_model: owner/name\nbase_model_relation: quantized\nlibrary_name: transformers\n"
        "pipeline_tag: text-generation\ntags:\n- mixture-of-experts\n- slimtrim\n- compressed-tensors\n"
    )
    assert "4.00 times smaller" in card
    assert "- This is gone.\n- And that.\n" in card
    assert "- `quantize`: method gptq\n" in card  # a setting that was left out is not a setting


def test_the_card_of_a_model_that_was_not_quantized_does_not_say_it_was():
    card = model_card(report(steps=({"step": "prune", "method": "wanda", "sparsity": 0.5},)))

    assert "base_model_relation: finetune\n" in card
    assert "compressed-tensors" not in card


def test_the_card_of_a_model_from_a_folder_claims_no_base_on_the_hub():
    card = model_card(report(model="file:///models/mine/"))

    assert "base_model:" not in card
    assert "# mine, made smaller by slimtrim" in card


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, "vLLM itself was not run", "open_model"),
        ({"profile": "custom"}, "vLLM reads none but 8-bit and 4-bit weights", "open_model"),
        ({"profile": "custom", "verification": PACKED}, "open_model(folder)", "opens in stock transformers"),
    ],
)
def test_the_card_tells_how_the_artifact_really_opens_and_how_much_memory_that_takes(
    changes: dict[str, Any], said: str, unsaid: str
):
    card = model_card(report(**changes))

    assert said in card
    assert unsaid not in card
    assert "4321 bytes" in card


def test_a_number_under_an_unknown_name_is_our_own_mistake():
    with pytest.raises(ValidationError, match="extra_forbidden"):
        row(methods_used="gptq")


def test_a_request_with_long_text_of_its_own_is_told_so_that_doing_it_again_is_refused_and_not_misread():
    def told(text: str) -> dict[str, Any]:
        request = Compression.model_validate(
            {"model": "m/m", "recipe": {"steps": [{"step": "quantize"}]}, "calibration": {"source": {"inline": [text]}}}
        )
        return without_long_texts(request.model_dump(mode="json"))

    assert Compression.model_validate(told("short")).calibration.source == InlineText(inline=("short",))
    long = told("x" * 5000)
    assert long["calibration"]["source"]["inline"]["left_out"] == 1
    assert long["calibration"]["source"]["inline"]["sha256"] != told("y" * 5000)["calibration"]["source"]["inline"]["sha256"]
    with pytest.raises(ValidationError, match="inline"):
        Compression.model_validate(long)


def test_retention_is_the_worst_of_text_kinds_of_text_and_benchmarks():
    whole = full_report()
    text = whole.model_copy(update={"benchmarks": None})
    alone = text.model_copy(update={"quality": whole.quality.model_copy(update={"domains": ()})})

    # exp(2.0 - 2.25), exp(2.0 - 2.5), and (0.5 - 0.25) / (0.75 - 0.25).
    assert (alone.retention, text.retention, whole.retention) == pytest.approx((0.7788, 0.6065, 0.5), abs=1e-4)
    assert whole.result()["retention"] == whole.retention
