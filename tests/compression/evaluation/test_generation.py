"""Figures of what was written, on answers that can be counted by hand."""

from __future__ import annotations

import pytest

from compression.evaluation.generation import compared, is_as_expected, repetition
from compression.request import GenerationSettings, Prompt


def test_the_second_time_counts_and_the_first_does_not():
    # 5 4-grams, of which the last is the first one again.
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 / 5
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0
    assert repetition([[7] * 10]) == 6 / 7
    assert repetition([[1, 2]]) == 0.0


@pytest.mark.parametrize(
    ("text", "matches"),
    [("42", True), (" 42\nQ:", True), ("42. So", True), ("420", False), ("4", False), ("is 42", False), ("", False)],
)
def test_an_answer_begins_with_what_is_expected_and_no_longer_word(text: str, matches: bool):
    assert is_as_expected(text, " 42 ") is matches


def test_answers_that_differ_are_shown_first():
    prompts = [Prompt(prompt=letter, expected="x" if letter == "a" else None) for letter in "abc"]
    before = {"tokens": [[1], [2], [3]], "texts": ["x", "y", "z"]}
    after = {"tokens": [[1], [2], [4]], "texts": ["x", "y", "w"]}

    found = compared(GenerationSettings(source=("a",)), prompts, before, after, {})

    assert found.agreement == 2 / 3
    assert [sample.prompt for sample in found.samples] == ["c", "a", "b"]
    assert found.before.exact_match == found.after.exact_match == 1.0
