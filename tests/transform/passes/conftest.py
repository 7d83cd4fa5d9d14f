"""JAX's check for leaks collects garbage at each trace: here of new objects alone."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _earlier_objects_left_out() -> None:
    gc.collect()
    gc.freeze()
