"""Ids: sortable, well-formed, and found out when they are not."""

from __future__ import annotations

import time
import uuid

import pytest

from jobs.errors import JobNotFound
from jobs.ids import new_job_id, parse_job_id


def test_ids_sort_by_time_and_survive_parsing():
    ids = [new_job_id() for _ in range(2000)]

    # The first 13 letters are time, to half a microsecond; within it the order is left to chance.
    assert sorted(ids, key=lambda job_id: job_id[:17]) == ids
    assert len(set(ids)) == len(ids)
    assert [parse_job_id(job_id) for job_id in ids] == ids


def test_an_id_is_a_uuid_of_version_7_with_the_present_millisecond():
    before = time.time_ns() // 1_000_000
    letters = new_job_id().removeprefix("job_")
    value = 0
    for letter in letters:
        value = value * 32 + "0123456789abcdefghjkmnpqrstvwxyz".index(letter)
    decoded = uuid.UUID(int=value)

    assert (decoded.version, decoded.variant) == (7, uuid.RFC_4122)
    assert before <= value >> 80 <= time.time_ns() // 1_000_000


@pytest.mark.parametrize(
    "text", ["", "job_", "job_x", "art_" + "0" * 26, "job_" + "u" * 26, "job_" + "0" * 27, "job_" + "0" * 25 + "\n"]
)
def test_what_cannot_be_an_id_is_not_found(text: str):
    with pytest.raises(JobNotFound):
        parse_job_id(text)
