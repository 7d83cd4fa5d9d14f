"""Passes are tested under JAX's check for tracers that leak."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _no_leaks():
    with jax.checking_leaks():
        yield
