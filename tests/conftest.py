"""Fixtures that several folders share. Nothing heavy is imported here: tests/api runs without torch."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.servers import S3, Bucket, Postgres, Redis

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """Keep the collector, which every verification calls, from looking through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model_factory("mixtral", dtype="bfloat16")`` -> a checkpoint folder, one per set of arguments.

    The arguments are those of ``tests.tiny_models.build``. The folder is shared: copy it before changing it.
    """
    from tests import tiny_models

    built: dict[str, Path] = {}

    def factory(model_type: str, **options: Any) -> Path:
        key = repr((model_type, sorted(options.items())))
        if key not in built:
            built[key] = tiny_models.build(model_type, tmp_path_factory.mktemp(model_type), **options)
        return built[key]

    return factory


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only the tokenizer of the tiny models."""
    from tests import tiny_models

    return tiny_models.build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of reference data and models beside the repository; without it the test is skipped by name."""
    if not _SHARED.is_dir():
        pytest.skip("NOT RUN: the folder 'shared' with reference data and models is not beside the repository")
    return _SHARED


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A private PostgreSQL server, which ends with the tests."""
    from tests.servers import a_postgres

    with a_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A private Redis server, which ends with the tests."""
    from tests.servers import a_redis

    with a_redis() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A private S3 server, which ends with the tests."""
    from tests.servers import an_s3

    with an_s3() as server:
        yield server


@pytest.fixture(scope="session")
def _shared_bucket(s3: S3) -> Bucket:
    return s3.fresh_bucket()


@pytest.fixture
def bucket(_shared_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty prefix in a bucket of that server, with its credentials in the environment, where boto3 looks for them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, _shared_bucket.environment[name])
    return replace(_shared_bucket, prefix=f"things/{secrets.token_hex(6)}")
