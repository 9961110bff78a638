"""Fixtures that all tests share."""

from collections.abc import Iterator

import pytest

from ranks import Ranks


@pytest.fixture(params=["eager", "compiled"])
def compile_mode(request: pytest.FixtureRequest) -> bool:
    """``compile=`` for Lamb16, once each; the graphs are compiled once a process."""
    return bool(request.param == "compiled")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for what runs on several ranks."""
    pool = Ranks()
    yield pool
    pool.stop()
