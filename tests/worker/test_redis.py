"""Production parts that fail: Redis and PostgreSQL killed, messages lost, doubled and redelivered. Each job has one result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from jobs.queue import Announcer, make_celery
from jobs.settings import Settings
from jobs.status import JobStatus
from tests.servers import Postgres, Redis, a_postgres, a_redis
from tests.worker.stand import Stand, a_stand

RUN = {"blocks": 30, "block_s": 0.1}


@pytest.fixture(scope="module")
def mortal_redis() -> Iterator[Redis]:
    """A server that no other test depends on."""
    with a_redis() as server:
        yield server


@pytest.fixture(scope="module")
def mortal_postgres() -> Iterator[Postgres]:
    """The same of PostgreSQL."""
    with a_postgres() as server:
        yield server


@pytest.fixture
def house(tmp_path: Path, mortal_redis: Redis, mortal_postgres: Postgres) -> Iterator[Stand]:
    """One worker and maintenance on servers that may be killed."""
    urls = {"DATABASE_URL": mortal_postgres.fresh_url(), "BROKER_URL": mortal_redis.fresh_url()}
    with a_stand(tmp_path, **urls) as stand:
        stand.start("worker.maintenance")
        stand.start_worker()
        yield stand


def check_one_run(house: Stand, job_id: str) -> None:
    job = house.wait_over(job_id)
    assert (job.status, job.fence) == (JobStatus.SUCCEEDED, 1)
    assert [row.outcome for row in house.attempts(job_id)] == ["succeeded"]
    assert len(house.events(job_id, "job.succeeded")) == 1


def test_a_redis_that_is_killed_while_a_job_runs_costs_nothing(house: Stand, mortal_redis: Redis):
    job_id = house.post(**RUN)
    house.wait_for_block(job_id)

    mortal_redis.server.restart(kill=True)

    check_one_run(house, job_id)
    assert house.wait_over(house.post()).status == JobStatus.SUCCEEDED  # the same worker hears again


def test_a_worker_that_cannot_acknowledge_asks_for_the_next_message_all_the_same(tmp_path: Path, mortal_redis: Redis):
    settings = Settings(data_dir=tmp_path, broker_url=mortal_redis.fresh_url(), database_url="postgresql://h/d")
    Announcer(settings).announce("job_1", "gpu.cpu")
    with make_celery(settings).connection_for_read() as connection:
        channel = connection.default_channel
        channel.basic_qos(0, 1, False)  # as a worker: one message at a time
        message = channel.basic_get("gpu.cpu", no_ack=False)
        assert not channel.qos.can_consume()

        mortal_redis.server.kill()
        try:
            with pytest.raises(channel.connection_errors):
                channel.basic_ack(message.delivery_tag)
            assert channel.qos.can_consume()
        finally:
            mortal_redis.server.start()


def test_a_job_that_is_posted_while_redis_is_down_is_accepted_and_announced_later(house: Stand, mortal_redis: Redis):
    check_one_run(house, house.post())
    mortal_redis.server.kill()

    job_id = house.post()
    assert house.job(job_id).status == JobStatus.QUEUED
    mortal_redis.server.start()

    check_one_run(house, job_id)


def test_messages_that_are_lost_are_repeated(house: Stand, mortal_redis: Redis):
    first = house.post(**RUN)
    house.wait_for_block(first)
    others = [house.post(blocks=1) for _ in range(3)]
    with redis.Redis.from_url(house.settings.broker_url or "") as client:
        client.flushall()

    for job_id in (first, *others):
        check_one_run(house, job_id)


def test_ten_equal_messages_make_one_claim(house: Stand):
    job_id = house.post(**RUN)
    for _ in range(9):
        house.announcer.announce(job_id, "gpu.cpu")
    house.start_worker("second")

    check_one_run(house, job_id)
    house.wait(lambda: house.unheard() == 0, "all messages heard")
    check_one_run(house, job_id)


def test_a_message_that_redis_delivers_again_while_its_job_runs_makes_no_second_run(house: Stand):
    house.start_worker("second")
    job_id = house.post(**RUN)
    house.wait_for_block(job_id)
    holder = house.job(job_id).worker

    house.wait(lambda: redeliver(house), "a message that is held by a worker")
    house.wait(lambda: house.unheard() == 0, "the second delivery heard")

    assert house.job(job_id).worker in (holder, None)
    check_one_run(house, job_id)


def redeliver(house: Stand) -> bool:
    """Do what Redis' listeners do with a message that is held longer than the visibility timeout; say whether there was one."""
    app: Any = make_celery(house.settings)
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "visibility_timeout": 0}
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        with channel.conn_or_acquire() as client:
            held = client.hlen(channel.unacked_key)
        channel.qos.restore_visible()
        return held > 0


@pytest.mark.parametrize("how", ["restarted", "killed"])
def test_a_postgres_that_goes_while_a_job_runs_leaves_one_result(house: Stand, mortal_postgres: Postgres, how: str):
    job_id = house.post(blocks=40, block_s=0.1)
    house.wait_for_block(job_id)

    mortal_postgres.server.restart(kill=how == "killed")

    job = house.wait_over(job_id)
    assert job.status == JobStatus.SUCCEEDED
    assert [row.outcome for row in house.attempts(job_id)].count("succeeded") == 1
    assert len(house.events(job_id, "job.succeeded")) == 1
    assert {key.split("/")[2] for key in house.stored(job_id)} == {f"a{job.fence}"}
    assert house.wait_over(house.post()).status == JobStatus.SUCCEEDED
