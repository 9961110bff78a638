"""Hypothesis profiles: ``ci`` (default: quick, deterministic) and ``thorough`` (1,000 examples a property)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import DEVICE

COMMON = {
    "deadline": None,  # the first compiled example takes as long as the compiler
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,  # the fixtures here do not change between examples
    ],
}
settings.register_profile("ci", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile("ci")


@pytest.fixture(params=["eager", "compiled"])
def compile(request: pytest.FixtureRequest) -> bool:
    """Run a property on the eager and on the compiled step."""
    return bool(request.param == "compiled")


@pytest.fixture
def flush_denormal():
    """Flush-to-zero on, for one test; skipped where the processor has none, and where Lamb16 runs on a GPU."""
    if DEVICE.type != "cpu":
        pytest.skip("the flag is the CPU's: the reference alone would flush, and the step on the GPU would not")
    assert torch.get_num_threads() == 1, "the flag belongs to the calling thread"
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals to zero")
    yield
    torch.set_flush_denormal(False)
