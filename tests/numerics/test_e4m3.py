"""E4M3 in integer arithmetic against ml_dtypes' casts."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax import numerics
from fp8jax.testing import ALL_BF16, ALL_FP16

E4M3 = ml_dtypes.float8_e4m3fn
CODES = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)  # 0 to 448.
MIDDLES = (CODES[1:] + CODES[:-1]) / 2  # Exact: a code has four bits.
EDGES = np.concatenate(
    [CODES, MIDDLES, np.nextafter(MIDDLES, np.float32(0)), np.nextafter(MIDDLES, 448)]
).astype(np.float32)
ANY = np.random.default_rng(0).integers(0, 2**32, 1 << 20, np.uint32).view(np.float32)
INPUTS = {
    "edges": np.concatenate([EDGES, -EDGES]),
    "bf16": ALL_BF16.astype(np.float32).ravel(),
    "fp16": ALL_FP16.astype(np.float32).ravel(),
    "any": ANY,
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", INPUTS)
def test_codes_and_values_are_those_of_a_cast(kind, wrap):
    x = INPUTS[kind]
    x = x[~(np.abs(x) > 448)]  # NaN stays.
    codes = np.asarray(wrap(numerics.encode_e4m3)(jnp.asarray(x)))
    nan = np.isnan(x)
    expected = np.where(nan, np.float32(0), x).astype(E4M3)
    np.testing.assert_array_equal(
        codes[~nan].view(np.uint8), expected[~nan].view(np.uint8)
    )
    assert np.isnan(codes[nan].astype(np.float32)).all()
    values = np.asarray(wrap(numerics.round_to_e4m3)(jnp.asarray(x)))
    np.testing.assert_array_equal(values[~nan], expected[~nan].astype(np.float32))
    assert np.isnan(values[nan]).all()
    assert kind == "edges" or nan.any()
