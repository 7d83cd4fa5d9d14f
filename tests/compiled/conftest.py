"""Skips what compiles for H100s where this JAX cannot, or fails if told to."""

import pytest

from benchmarks import _h100


@pytest.fixture(scope="session", autouse=True)
def _compiler(request: pytest.FixtureRequest) -> None:
    try:
        _h100.devices(1)
    except RuntimeError as reason:
        required = request.config.getoption("--require-compiled")
        (pytest.fail if required else pytest.skip)(str(reason))
