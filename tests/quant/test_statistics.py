"""Both directions at once, and sums that say how well codes stand for an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import quantize
from fp8jax.quant import MOMENTS, moments, statistics, sum_moments

X = jax.random.normal(jax.random.key(0), (200, 300), jnp.bfloat16)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    parts = [X[:128], X[128:]]  # Tiles of one row: the parts have the whole's tiles.
    several = [moments(x, quantize(x)) for x in parts]
    got, whole = sum_moments(several), moments(X, quantize(X))
    np.testing.assert_allclose(got, whole, rtol=1e-5)  # Float32 sums in other orders.
    assert got[MOMENTS.index("size")] == X.size
    assert got[MOMENTS.index("amax")] == jnp.abs(X).max().astype(jnp.float32)


def test_nothing_counted_is_nan_and_no_error_is_infinite():
    empty = statistics(jnp.zeros((2, len(MOMENTS))))
    assert np.isnan(empty["sqnr_db"]).all()
    assert np.isnan(empty["underflow"]).all()
    exact = jnp.ones((1, 128))
    assert np.isposinf(statistics(moments(exact, quantize(exact)))["sqnr_db"])


def test_moments_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"moments takes equal shapes, got \(1, 300\)"):
        moments(X[:1], quantize(X))
