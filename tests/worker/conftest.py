"""A stand of its own for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.stand import Stand, a_stand


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    with a_stand(tmp_path) as stand:
        yield stand
