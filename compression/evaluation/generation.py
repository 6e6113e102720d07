"""What two models wrote on the same prompts, in numbers: repetition, length, exact match, agreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compression.measured import Generation, GenerationSample, GenerationSide
from compression.request import GenerationSettings, Prompt

_GRAM = 4
_SAMPLES = 8
"""Prompts whose answers are shown."""
_SHOWN = 2000
"""Characters of a prompt and of an answer that are shown, the last of the one and the first of the other."""

Written = dict[str, Any]
"""What ``writing.py`` returns: ``tokens`` and ``texts``, one of each per prompt."""


def compared(
    settings: GenerationSettings, prompts: Sequence[Prompt], before: Written, after: Written, source: dict[str, Any]
) -> Generation:
    """Return the figures of what original and artifact wrote."""
    same = [first == second for first, second in zip(before["tokens"], after["tokens"], strict=True)]
    shown = sorted(range(len(prompts)), key=lambda place: same[place])[:_SAMPLES]
    return Generation(
        prompts=len(prompts),
        new_tokens=settings.new_tokens,
        agreement=sum(same) / len(same),
        before=_side(prompts, before),
        after=_side(prompts, after),
        samples=tuple(
            GenerationSample(
                prompt=prompts[place].prompt[-_SHOWN:],
                expected=prompts[place].expected,
                before=before["texts"][place][:_SHOWN],
                after=after["texts"][place][:_SHOWN],
            )
            for place in shown
        ),
        source=source,
    )


def _side(prompts: Sequence[Prompt], written: Written) -> GenerationSide:
    known = [
        (prompt.expected, text) for prompt, text in zip(prompts, written["texts"], strict=True) if prompt.expected is not None
    ]
    return GenerationSide(
        length=sum(map(len, written["tokens"])) / len(prompts),
        repetition=repetition(written["tokens"]),
        exact_match=sum(is_as_expected(text, expected) for expected, text in known) / len(known) if known else None,
    )


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Return the share of all 4-grams of tokens that stood in the same answer before; 0 where there are none."""
    repeated = total = 0
    for answer in answers:
        grams = [tuple(answer[place : place + _GRAM]) for place in range(len(answer) - _GRAM + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def is_as_expected(text: str, expected: str) -> bool:
    """Say whether the answer, blank space around both left out, begins with what is expected, and with no longer word.

    ``42`` is the beginning of ``42. Next`` and of ``42`` and a new line, and not of ``420``.
    """
    answer, expected = text.strip(), expected.strip()
    following = answer[len(expected) : len(expected) + 1]
    return answer.startswith(expected) and not (expected[-1].isalnum() and following.isalnum())
