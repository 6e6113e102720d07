"""Fixtures of the library's tests."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.fixture(scope="module")
def code_that_travels_stays_here(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Keep the copies that transformers makes of an artifact's code out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
