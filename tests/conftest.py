"""Fixtures that all tests share."""

import pytest


@pytest.fixture(params=["eager", "compiled"])
def compile_mode(request: pytest.FixtureRequest) -> bool:
    """``compile=`` for Lamb16, once each; the graphs are compiled once a process."""
    return bool(request.param == "compiled")
