from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.errors import Stopped
from compression.progress import (
    STAGES,
    BlockDone,
    Event,
    Progress,
    Silent,
    Stage,
    StageStarted,
    Warned,
    event_from_dict,
    event_to_dict,
)


class Recorder:
    """Remembers every event, and asks to stop after so many."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.events: list[Event] = []
        self._stop_after = stop_after

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def should_stop(self) -> bool:
        return len(self.events) >= self._stop_after


SHARES: dict[Stage, float] = {"studying": 1, "compressing": 3, "verifying": 1}


def walk(progress: Progress, blocks: int) -> None:
    for stage in SHARES:
        progress.stage(stage)
        for block in range(blocks):
            progress.block(block + 1, blocks, f"block {block + 1}")


@given(blocks=st.integers(1, 20))
def test_the_fraction_never_goes_back_and_ends_at_one(blocks: int):
    listener = Recorder()

    walk(Progress(listener, SHARES), blocks)

    fractions = [event.fraction for event in listener.events if not isinstance(event, Warned)]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_a_stage_takes_its_share_of_the_whole():
    listener = Recorder()
    progress = Progress(listener, SHARES)

    progress.stage("compressing")
    progress.block(1, 2, "half of it")

    assert listener.events == [
        StageStarted("compressing", 0.2),
        BlockDone("compressing", 1, 2, 0.5, "half of it"),
    ]


def test_a_run_stops_at_the_end_of_the_block_in_which_it_is_asked_to():
    listener = Recorder(stop_after=3)

    with pytest.raises(Stopped):
        walk(Progress(listener, SHARES), 5)

    assert [event.type for event in listener.events] == ["stage", "block", "block"]


def test_a_run_can_stop_as_a_stage_begins():
    with pytest.raises(Stopped):
        Progress(Recorder(stop_after=1), SHARES).stage("studying")


def test_a_warning_passes_and_stops_nothing():
    listener = Recorder(stop_after=1)

    Progress(listener, SHARES).warn("few_tokens", "an expert saw 3 tokens")

    assert listener.events == [Warned("few_tokens", "an expert saw 3 tokens")]


events = st.one_of(
    st.builds(StageStarted, st.sampled_from(STAGES), st.floats(0, 1)),
    st.builds(BlockDone, st.sampled_from(STAGES), st.integers(), st.integers(), st.floats(0, 1), st.text()),
    st.builds(Warned, st.text(), st.text()),
)


@given(event=events)
def test_an_event_comes_back_equal_from_its_line_of_json(event: Event):
    assert event_from_dict(json.loads(json.dumps(event_to_dict(event)))) == event


def test_silence_listens_to_nothing_and_never_stops():
    silent = Silent()

    walk(Progress(silent, SHARES), 3)

    assert silent.should_stop() is False
