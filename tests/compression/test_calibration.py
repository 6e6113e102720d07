"""Calibration text becomes the tokens that its settings and content determine, and nothing else does."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from compression.calibration import RUN, TokenSet, _shared_out, _shared_tokens, load_calibration, load_evaluation, refuse_overlap
from compression.errors import BrokenCheckpoint, RemoteCodeRequired, ValidationFailed
from compression.request import Calibration, Domain, InlineText, Perplexity

WORDS = ("ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "spruce", "thorn", "yew")
FAR = 512
"""A sequence length at which a phrase in common does not fill a sample."""


def prose(seed: int, words: int = 400) -> str:
    """Text of random words: two seeds share no run worth the name."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def inline(*texts: str) -> InlineText:
    return InlineText(inline=texts)


def calibrate(folder: Path, source: object, **settings: int) -> TokenSet:
    return load_calibration(
        Calibration.model_validate({"source": source, **{"samples": 4, "sequence_length": 64, **settings}}), folder
    )


def evaluate(folder: Path, source: object, **settings: int) -> TokenSet:
    return load_evaluation(Perplexity.model_validate({"source": source, **settings}), folder, sequence_length=64)


def stream(folder: Path, texts: Sequence[str]) -> list[int]:
    """The tokens of some documents, joined the plain way."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for index, text in enumerate(texts):
        ids += [tokenizer.eos_token_id] * (index > 0) + tokenizer.encode(text, add_special_tokens=False)
    return ids


def windows(ids: Sequence[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]


def rows(ids_NS: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids_NS.tolist()]


def test_the_samples_are_windows_of_the_documents_joined_by_end_of_text(tiny_tokenizer: Path) -> None:
    texts = [prose(1), prose(2, words=3), prose(3)]
    expected = windows(stream(tiny_tokenizer, texts), 32)

    tokens = calibrate(tiny_tokenizer, inline(*texts), samples=len(expected), sequence_length=32)

    assert sorted(rows(tokens.ids_NS)) == sorted(expected)
    assert rows(tokens.ids_NS) != expected
    assert tokens.ids_NS.dtype == torch.int64
    assert tokens.tokens == len(expected) * 32


def test_no_sample_is_drawn_twice(tiny_tokenizer: Path) -> None:
    tokens = calibrate(tiny_tokenizer, inline(prose(1, words=2000)), samples=20, sequence_length=32)

    assert len(set(rows(tokens.ids_NS))) == 20


def test_one_seed_gives_one_draw_and_another_seed_another(tiny_tokenizer: Path) -> None:
    first, again, other = (calibrate(tiny_tokenizer, inline(prose(1)), seed=seed) for seed in (7, 7, 8))

    assert torch.equal(first.ids_NS, again.ids_NS)
    assert first.content_hash == again.content_hash
    assert not torch.equal(first.ids_NS, other.ids_NS)
    assert first.content_hash != other.content_hash


def test_the_draw_leaves_the_global_random_state_alone(tiny_tokenizer: Path) -> None:
    before = torch.random.get_rng_state()

    calibrate(tiny_tokenizer, inline(prose(1)))

    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_changed_character_changes_the_hash(tiny_tokenizer: Path) -> None:
    text = prose(1)
    changed = text[:40] + "#" + text[41:]

    hashes = {calibrate(tiny_tokenizer, inline(each), samples=99).content_hash for each in (text, changed)}

    assert len(hashes) == 2


def test_the_hash_knows_how_tokens_are_cut_and_grouped(tiny_tokenizer: Path) -> None:
    text = prose(1, words=300)
    narrow = calibrate(tiny_tokenizer, inline(text), samples=1, sequence_length=64)
    grouped = calibrate(tiny_tokenizer, [{"source": inline(prose(2)), "weight": 1e-9}, {"source": inline(text)}], samples=1)

    assert torch.equal(narrow.ids_NS, grouped.ids_NS)
    assert narrow.content_hash != grouped.content_hash


def test_the_same_documents_give_the_same_tokens_however_they_are_stored(tiny_tokenizer: Path, tmp_path: Path) -> None:
    texts = [prose(seed) for seed in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")

    sources = (inline(*texts), f"file://{tmp_path}/a.jsonl", f"file://{tmp_path}/a.parquet")
    hashes = {calibrate(tiny_tokenizer, source, samples=9).content_hash for source in sources}

    assert len(hashes) == 1


def test_a_text_file_gives_the_tokens_of_the_same_inline_document(tiny_tokenizer: Path, tmp_path: Path) -> None:
    text = "\n\n".join(prose(seed) for seed in range(3))
    (tmp_path / "a.txt").write_text(text)

    from_file, from_request = calibrate(tiny_tokenizer, f"file://{tmp_path}/a.txt"), calibrate(tiny_tokenizer, inline(text))

    assert from_file.content_hash == from_request.content_hash
    assert from_file.description["documents"] == 1


def test_domains_keep_their_order_their_share_and_their_own_text(tiny_tokenizer: Path) -> None:
    mixture = [
        {"source": inline(prose(1)), "weight": 1, "name": "trees"},
        {"source": inline(prose(2)), "weight": 3, "name": "numbers"},
    ]

    tokens = calibrate(tiny_tokenizer, mixture, samples=8, sequence_length=16)

    assert tokens.domains == ("trees", "numbers")
    assert tokens.domain_N.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    for sample, domain in zip(rows(tokens.ids_NS), tokens.domain_N.tolist(), strict=True):
        assert sample in windows(stream(tiny_tokenizer, [prose(domain + 1)]), 16)


def test_unnamed_domains_are_named_after_their_source(tiny_tokenizer: Path) -> None:
    tokens = calibrate(tiny_tokenizer, [{"source": inline(prose(1))}, {"source": "default"}])

    assert tokens.domains[0] == "inline 0"
    assert tokens.domains[1].startswith("default (pydoc_data.topics, Python 3.")
    assert tokens.description["default"]


@pytest.mark.parametrize(
    ("samples", "weights", "counts"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [1.0, 2.0, 7.0], [1, 2, 7]),
        (3, [0.5, 0.25, 0.25], [1, 1, 1]),
        (1, [1, 2], [0, 1]),
        (5, [9], [5]),
    ],
)
def test_samples_are_shared_out_by_largest_remainder(samples: int, weights: list[float], counts: list[int]) -> None:
    assert _shared_out(samples, weights) == counts


@given(st.integers(1, 10_000), st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=16))
def test_every_sample_is_shared_out_and_no_domain_is_a_sample_off(samples: int, weights: list[float]) -> None:
    counts = _shared_out(samples, weights)

    total = sum(weight / max(weights) for weight in weights)
    assert sum(counts) == samples
    assert all(
        abs(count - samples * weight / max(weights) / total) <= 1 + 1e-6 for count, weight in zip(counts, weights, strict=True)
    )


def test_an_infinite_weight_is_refused(tiny_tokenizer: Path) -> None:
    domain = Domain.model_construct(source=inline("x"), weight=float("inf"), name=None)

    with pytest.raises(ValidationFailed, match="inf is not a finite number") as caught:
        load_calibration(Calibration.model_construct(source=(domain,), samples=1, sequence_length=8, seed=0), tiny_tokenizer)

    assert caught.value.pointer == "/calibration/source/0/weight"


def test_a_domain_too_light_for_a_sample_is_reported(tiny_tokenizer: Path) -> None:
    tokens = calibrate(
        tiny_tokenizer, [{"source": inline(prose(1))}, {"source": inline(prose(2)), "weight": 1e-6, "name": "light"}]
    )

    assert tokens.domain_N.tolist() == [0, 0, 0, 0]
    assert tokens.description["warnings"] == ["light has too small a weight for one sample, and none was taken"]


def test_a_source_is_not_mixed_with_itself(tiny_tokenizer: Path) -> None:
    with pytest.raises(ValidationFailed, match="in the mixture twice") as caught:
        calibrate(tiny_tokenizer, [{"source": inline("x")}, {"source": inline("x")}])

    assert caught.value.pointer == "/calibration/source/1/source"


def test_two_domains_do_not_share_a_name(tiny_tokenizer: Path) -> None:
    with pytest.raises(ValidationFailed, match="two domains are named 'code'"):
        calibrate(tiny_tokenizer, [{"source": inline("x"), "name": "code"}, {"source": inline("y"), "name": "code"}])


def test_too_little_text_is_used_whole_and_said(tiny_tokenizer: Path) -> None:
    tokens = calibrate(tiny_tokenizer, inline(prose(1, words=60)), samples=50, sequence_length=16)

    expected = windows(stream(tiny_tokenizer, [prose(1, words=60)]), 16)
    assert sorted(rows(tokens.ids_NS)) == sorted(expected)
    assert tokens.description["samples"] == len(expected) < tokens.description["samples_asked"] == 50
    assert tokens.description["warnings"] == [f"inline (1 documents) gives only {len(expected)} of the 50 samples asked for"]


def test_text_for_less_than_one_sample_is_refused_with_its_token_count(tiny_tokenizer: Path) -> None:
    count = len(stream(tiny_tokenizer, ["oak", "elm"]))

    with pytest.raises(ValidationFailed, match=rf"gives {count} tokens in 2 documents; one sample needs 64") as caught:
        calibrate(tiny_tokenizer, inline("oak", "elm"))

    assert caught.value.pointer == "/calibration/source"


def test_no_text_at_all_is_refused(tiny_tokenizer: Path) -> None:
    with pytest.raises(ValidationFailed, match="gives 0 tokens in 0 documents") as caught:
        evaluate(tiny_tokenizer, inline("", " "))

    assert caught.value.pointer == "/evaluation/perplexity/source"


def test_a_long_source_is_read_no_further_than_four_times_the_need(tiny_tokenizer: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": prose(seed, words=50)}) for seed in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "broken"]))
    source = f"file://{tmp_path}/a.jsonl"

    tokens = calibrate(tiny_tokenizer, source, samples=4)

    (domain,) = tokens.description["domains"]
    assert 4 * 4 * 64 <= domain["tokens_read"] < 4 * 4 * 64 + 1000
    assert domain["documents"] < 200
    assert not domain["read_to_the_end"]
    with pytest.raises(ValidationFailed, match="line 201 of"):
        calibrate(tiny_tokenizer, source, samples=10_000)


def test_a_document_read_in_part_is_counted(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1, words=200_000))

    (domain,) = calibrate(tiny_tokenizer, f"file://{tmp_path}/a.txt").description["domains"]

    assert domain["documents"] == 1
    assert not domain["read_to_the_end"]


def test_a_source_read_whole_is_said_to_be(tiny_tokenizer: Path) -> None:
    (domain,) = calibrate(tiny_tokenizer, inline(prose(1))).description["domains"]

    assert domain["read_to_the_end"]


def test_the_description_is_plain_data_and_repeats_no_text(tiny_tokenizer: Path) -> None:
    tokens = calibrate(tiny_tokenizer, inline(prose(1, words=60), prose(2, words=60)), seed=5)

    assert "oak" not in json.dumps(tokens.description)
    assert tokens.description["documents"] == 2
    assert (tokens.description["samples"], tokens.description["sequence_length"], tokens.description["seed"]) == (4, 64, 5)
    assert tokens.description["tokens"] == tokens.tokens
    assert not tokens.description["default"]


def test_evaluation_takes_its_own_sequence_length_or_the_one_of_calibration(tiny_tokenizer: Path) -> None:
    assert evaluate(tiny_tokenizer, inline(prose(1))).ids_NS.shape[1] == 64
    assert evaluate(tiny_tokenizer, inline(prose(1)), sequence_length=16).ids_NS.shape[1] == 16


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')

    with pytest.raises(BrokenCheckpoint, match="holds no tokenizer") as caught:
        calibrate(tmp_path, inline("x"))

    assert str(tmp_path) in str(caught.value)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')

    with pytest.raises(BrokenCheckpoint, match="does not open"):
        calibrate(tmp_path, inline("x"))


def test_a_tokenizer_with_code_of_its_own_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    (tmp_path / "vocab.txt").write_text("x\n")
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    )

    with pytest.raises(RemoteCodeRequired, match="code of its own"):
        calibrate(tmp_path, inline("x"))


def test_texts_that_share_nothing_may_meet(tiny_tokenizer: Path) -> None:
    assert refuse_overlap(calibrate(tiny_tokenizer, inline(prose(1))), evaluate(tiny_tokenizer, inline(prose(2)))) == 0.0


def test_the_same_text_is_refused_even_where_no_sample_is_the_same(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1, words=4000))
    calibration = calibrate(tiny_tokenizer, f"file://{tmp_path}/a.txt", samples=1, sequence_length=64)
    evaluation = evaluate(tiny_tokenizer, inline(prose(1, words=4000)), samples=1, sequence_length=16)
    assert not _shared_tokens(calibration.ids_NS, evaluation.ids_NS).any()

    with pytest.raises(ValidationFailed, match=r"evaluation text is calibration text.*inline \(1 documents\).*a\.txt") as caught:
        refuse_overlap(calibration, evaluation)

    assert caught.value.pointer == "/evaluation/perplexity/source"


def test_a_calibration_sample_hidden_in_other_evaluation_text_is_refused(tiny_tokenizer: Path) -> None:
    calibration = calibrate(tiny_tokenizer, inline(prose(1)), samples=99)
    evaluation = evaluate(tiny_tokenizer, inline(prose(2, words=203) + " " + prose(1) + " " + prose(3, words=2000)), samples=99)

    with pytest.raises(ValidationFailed, match="samples as a whole"):
        refuse_overlap(calibration, evaluation)


def test_one_whole_sample_in_common_is_refused_however_small_its_share(tiny_tokenizer: Path) -> None:
    excerpt = prose(9, words=60)
    calibration = calibrate(tiny_tokenizer, inline(f"{prose(1)} {excerpt} {prose(2)}"), samples=99, sequence_length=FAR)
    evaluation = evaluate(tiny_tokenizer, inline(f"{prose(3, words=4000)} {excerpt} {prose(4, words=4000)}"), samples=9999)
    assert 0.0 < _shared_tokens(calibration.ids_NS, evaluation.ids_NS).double().mean() < 0.02

    with pytest.raises(ValidationFailed, match=r"[1-9] samples as a whole"):
        refuse_overlap(calibration, evaluation)


def test_a_phrase_in_common_is_measured_and_allowed(tiny_tokenizer: Path) -> None:
    phrase = prose(9, words=30)
    calibration = calibrate(tiny_tokenizer, inline(f"{prose(1)} {phrase} {prose(2)}"), samples=99)
    evaluation = evaluate(
        tiny_tokenizer, inline(f"{prose(3, words=2000)} {phrase} {prose(4, words=2000)}"), samples=999, sequence_length=FAR
    )

    assert 0.0 < refuse_overlap(calibration, evaluation) < 0.05


def test_many_phrases_in_common_are_refused_though_no_sample_is_whole(tiny_tokenizer: Path) -> None:
    phrase = prose(9, words=30)
    calibration = calibrate(tiny_tokenizer, inline(f"{prose(1)} {phrase} {prose(2)}"), samples=99)
    spread = " ".join(f"{prose(seed, words=100)} {phrase}" for seed in range(10, 30))
    evaluation = evaluate(tiny_tokenizer, inline(spread), samples=999, sequence_length=FAR)

    with pytest.raises(ValidationFailed, match="0 samples as a whole"):
        refuse_overlap(calibration, evaluation)


def test_one_document_of_many_in_common_is_allowed_and_half_of_them_are_not(tiny_tokenizer: Path) -> None:
    mine, theirs = [prose(seed, words=40) for seed in range(40)], [prose(seed, words=40) for seed in range(100, 140)]
    calibration = calibrate(tiny_tokenizer, inline(*mine), sequence_length=16, samples=99)

    assert refuse_overlap(calibration, evaluate(tiny_tokenizer, inline(*theirs, mine[0]), samples=999, sequence_length=16)) == 0.0
    with pytest.raises(ValidationFailed, match=r"(49|50)\.\d% is the same text"):
        refuse_overlap(calibration, evaluate(tiny_tokenizer, inline(*theirs, *mine), samples=999, sequence_length=16))


def test_rulers_and_blank_space_are_no_shared_text(tiny_tokenizer: Path) -> None:
    ruler = "=" * 3000
    calibration = calibrate(tiny_tokenizer, inline(prose(1) + ruler), samples=99)
    evaluation = evaluate(tiny_tokenizer, inline(prose(2) + ruler), samples=99)

    assert refuse_overlap(calibration, evaluation) == 0.0


@given(st.integers(0, 2**32), st.integers(RUN, 3 * RUN), st.integers(0, 4 * RUN))
def test_shared_runs_are_found_wherever_they_lie(seed: int, length: int, place: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    calibration_NS = torch.randint(0, 1000, (2, 8 * RUN), generator=generator)
    evaluation_NS = torch.randint(1000, 2000, (3, 8 * RUN), generator=generator)
    evaluation_NS[1, place : place + length] = calibration_NS[1, 5 : 5 + length]

    shared_NS = _shared_tokens(calibration_NS, evaluation_NS)

    assert shared_NS.sum() == length
    assert shared_NS[1, place : place + length].all()


@pytest.mark.parametrize("length", [32, 64, 256])
def test_the_default_texts_share_no_run_at_all(length: int, tiny_tokenizer: Path) -> None:
    everything = 2**20
    calibration = calibrate(tiny_tokenizer, "default", samples=everything, sequence_length=length)
    evaluation = evaluate(tiny_tokenizer, "default", samples=everything, sequence_length=length)

    assert refuse_overlap(calibration, evaluation) == 0.0
    assert min(calibration.tokens, evaluation.tokens) > 250_000
    assert calibration.description["default"]
    assert evaluation.description["default"]
