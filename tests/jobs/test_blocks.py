"""Finished blocks: written under the fence, found by what they depend on, and gone when nobody asks for them any more."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from jobs.blocks import StoredFile, prefix_of
from jobs.status import JobStatus
from jobs.tables import JobBlock
from tests.jobs.conftest import OWNER, PASSING, Rows, all_at_once

FILE = StoredFile("block.safetensors", "blocks/ann/f/job_1/a1/block-00000/block.safetensors", 5, "ab" * 32)


def keep(rows: Rows, claim, name: str = "block-00000", fingerprint: str = "f", file: StoredFile = FILE) -> bool:
    return rows.do(lambda work: work.blocks.keep(claim, claim.owner, fingerprint, name, [file]))


def find(rows: Rows, owner: str = OWNER, fingerprint: str = "f"):
    return dict(rows.do(lambda work: work.blocks.find(owner, fingerprint)))


def stale(rows: Rows, kept_s: float = 3600.0) -> list[str]:
    return rows.do(lambda work: work.blocks.forget_stale(kept_s))


def age(rows: Rows, seconds: float) -> None:
    from jobs.clock import now

    with rows.open_session() as session, session.begin():
        session.execute(update(JobBlock).values(created_at=now(-seconds)))


def test_what_is_kept_is_found_by_its_owner_and_fingerprint_alone(rows: Rows):
    claim = rows.claimed()

    assert keep(rows, claim)
    assert find(rows) == {"block-00000": [FILE]}
    assert find(rows, owner="bob") == find(rows, fingerprint="g") == {}


def test_a_worker_that_lost_its_job_keeps_nothing(rows: Rows):
    claim = rows.claimed(lease_s=-1.0)
    rows.do(lambda work: work.upkeep.expire_leases())

    assert not keep(rows, claim)
    another = rows.claim(claim.job_id)
    assert another is not None
    assert not keep(rows, claim)
    assert not rows.do(lambda work: work.blocks.begin(claim, "f"))
    assert (find(rows), rows.job(claim.job_id).fingerprint) == ({}, None)
    assert keep(rows, another)


def test_of_two_who_finish_the_same_block_at_once_one_is_kept_and_both_go_on(rows: Rows):
    claims = [rows.claimed(), rows.claimed()]
    files = [StoredFile("b", f"blocks/ann/f/{claim.job_id}/a1/b", 1, "0" * 64) for claim in claims]
    pairs = zip(claims, files, strict=True)

    assert all_at_once([lambda c=c, f=f: keep(rows, c, file=f) for c, f in pairs]) == [True, True]
    ((kept,),) = find(rows).values()
    assert kept in files
    assert keep(rows, claims[0], file=files[1])
    assert find(rows) == {"block-00000": [kept]}


def test_an_attempt_that_made_a_block_durable_does_not_count(rows: Rows):
    job_id = rows.add(max_attempts=2)
    counts: list[int] = []
    for number in range(4):
        claim = rows.claim(job_id)
        assert claim is not None
        if number in (1, 2):
            keep(rows, claim, name=f"block-0000{number}")
        rows.do(lambda work, claim=claim: work.attempts.fail(claim, PASSING, 0.0))
        counts.append(rows.job(job_id).fruitless)

    job = rows.job(job_id)
    assert counts == [1, 0, 0, 1]
    assert (job.status, job.attempt) == (JobStatus.QUEUED, 5)


def test_attempts_in_a_row_without_a_block_end_the_job(rows: Rows):
    job_id = rows.add(max_attempts=2)
    for number in range(3):
        claim = rows.claim(job_id)
        assert claim is not None
        if number == 0:
            keep(rows, claim)
        rows.do(lambda work, claim=claim: work.attempts.fail(claim, PASSING, 0.0))

    job = rows.job(job_id)
    assert job.status_reason is not None
    assert (job.status, job.status_reason["code"]) == (JobStatus.FAILED, "attempts_exhausted")
    assert job.attempt == 3


def test_blocks_go_when_their_job_has_succeeded_or_when_they_are_old(rows: Rows):
    claim = rows.claimed()
    keep(rows, claim)
    rows.do(lambda work: work.blocks.begin(claim, "f"))
    age(rows, 7200.0)
    assert stale(rows) == []  # a running job may need them, however old they are

    rows.force(claim.job_id, status=JobStatus.FAILED, lease_until=None)
    assert stale(rows, kept_s=9000.0) == []
    assert stale(rows) == [prefix_of(OWNER, "f")]
    assert find(rows) == {}

    keep(rows, other := rows.claimed())
    rows.do(lambda work: work.blocks.begin(other, "f"))
    rows.force(other.job_id, status=JobStatus.SUCCEEDED, lease_until=None)
    assert stale(rows, kept_s=9000.0) == [prefix_of(OWNER, "f")]


def test_another_job_on_the_same_blocks_keeps_them(rows: Rows):
    done, waiting = rows.claimed(), rows.add(fingerprint="f")
    keep(rows, done)
    rows.do(lambda work: work.blocks.begin(done, "f"))
    rows.force(done.job_id, status=JobStatus.SUCCEEDED, lease_until=None)

    assert stale(rows) == []
    rows.force(waiting, status=JobStatus.CANCELLED)
    assert stale(rows) == [prefix_of(OWNER, "f")]


@pytest.mark.parametrize(
    ("job", "fence", "kept"), [("own", 1, {"block-00000", "block-00001"}), ("own", 2, set()), ("other", 1, set())]
)
def test_parts_are_kept_for_the_attempt_that_their_row_names(rows: Rows, job: str, fence: int, kept: set[str]):
    claim = rows.claimed()
    for name in ("block-00000", "block-00001"):
        keep(rows, claim, name)
    keep(rows, claim, "block-00002", fingerprint="g")
    job_id = claim.job_id if job == "own" else "job_other"

    assert rows.do(lambda work: work.blocks.kept_of(job_id, fence, prefix_of(OWNER, "f"))) == kept
