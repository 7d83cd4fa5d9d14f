"""Scales and codes against ml_dtypes and exact powers of two."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8jax import numerics
from fp8jax.testing import ALL_BF16, ALL_FP16

FORMATS = [jnp.float8_e4m3fn, jnp.float8_e5m2]
ONE = np.float32(1)
BOTH = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def same_codes(actual, expected):
    """Equal codes, any NaN for a NaN."""
    actual, expected = (np.asarray(x) for x in (actual, expected))
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), nan)
    np.testing.assert_array_equal(
        actual.view(np.uint8)[~nan], expected.view(np.uint8)[~nan]
    )


@pytest.mark.parametrize("dtype", FORMATS)
def test_all_256_codes_decode(dtype):
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    decoded = numerics.decode_tiles(codes.reshape(1, 1, 2, 128), np.ones((1, 2), "f"))
    np.testing.assert_array_equal(np.asarray(decoded).ravel(), codes.astype(np.float32))


@BOTH
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("patterns", [ALL_BF16, ALL_FP16], ids=["bf16", "fp16"])
def test_all_16_bit_inputs_encode_as_ml_dtypes_does(patterns, dtype, wrap):
    limit = numerics.max_value(dtype)
    actual = wrap(lambda x: numerics.encode(x, ONE, dtype))(jnp.asarray(patterns))
    # Bits, so that NumPy does not warn of the signalling NaNs among them.
    expected = np.clip(np.nan_to_num(patterns.astype(np.float32), nan=0), -limit, limit)
    expected = np.where(np.isnan(patterns.astype(np.float32)), np.nan, expected)
    same_codes(actual, expected.astype(dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_float32_ties_are_not_rounded_twice(dtype):
    # Midpoints of neighbouring codes, and the float32 next to them: a conversion by
    # way of float16 or bfloat16 would take those for ties.
    codes = np.arange(128, dtype=np.uint8).view(dtype).astype(np.float32)
    codes = codes[np.isfinite(codes)]
    middle = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate(
        [
            np.nextafter(middle, np.float32(0)),
            middle,
            np.nextafter(middle, np.float32(9e9)),
        ]
    )
    x = np.concatenate([x, -x])
    actual = numerics.encode(jnp.asarray(x), ONE, dtype)
    same_codes(actual, x.astype(dtype))


@pytest.mark.parametrize("exponent", range(-126, 127))
def test_pow2_is_exact_at_powers_of_two_and_one_ulp_beside(exponent):
    power = np.float32(2.0**exponent)
    below = np.nextafter(power, np.float32(0))
    above = np.nextafter(power, np.float32(np.inf))
    x = jnp.asarray([power, above] if exponent == -126 else [power, above, below])
    expected = np.asarray([power, 2 * power, power][: len(x)])
    np.testing.assert_array_equal(numerics.round_up_pow2(x), expected)


@BOTH
@pytest.mark.parametrize("kind", ["pow2", "fp32"])
def test_scale_covers_amax_from_1e38_to_1e_minus_38(kind, wrap):
    amax = np.concatenate([np.logspace(-37.9, 38.5, 4001), [2.0**-126, 3.3e38]]).astype(
        np.float32
    )
    scale = wrap(lambda a: numerics.scale_from_amax(a, jnp.float8_e4m3fn, kind))(
        jnp.asarray(amax)
    )
    scale = np.asarray(scale).astype(np.float64)
    assert np.all(scale >= 2.0**-126)
    # 1/448 is rounded, and so is the product: 2^-23 in all.
    assert np.all(scale * 448 >= amax * (1 - 2.0**-23))
    if kind == "pow2":
        np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)
        big = scale > 2.0**-126
        assert np.all(scale[big] * 448 < amax[big].astype("f8") * 2 * (1 + 2.0**-22))
    else:
        expected = np.maximum(amax * np.float32(1 / 448), np.float32(2.0**-126))
        np.testing.assert_array_equal(scale.astype(np.float32), expected)


@BOTH
def test_zero_tile_has_scale_one_and_bad_ones_nan(wrap):
    amax = jnp.asarray([0.0, jnp.inf, jnp.nan, 448.0])
    scale = wrap(lambda a: numerics.scale_from_amax(a, jnp.float8_e4m3fn, "pow2"))(amax)
    np.testing.assert_array_equal(scale, np.asarray([1, np.nan, np.nan, 1], "f"))


def test_eps_is_a_floor_of_amax():
    amax = jnp.asarray([1e-9, 1.0])
    scale = numerics.scale_from_amax(amax, jnp.float8_e4m3fn, "fp32", eps=1e-4)
    expected = np.asarray([1e-4, 1.0], "f") * np.float32(1 / 448)
    np.testing.assert_array_equal(scale, expected)


@BOTH
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 63, 127])
def test_a_single_nan_or_inf_is_the_largest(bad, place, wrap):
    x = np.full((1, 128), -3e38, np.float32)
    x[0, place] = bad
    amax = wrap(lambda x: numerics.integer_amax(x, (1,)))(jnp.asarray(x))
    assert np.isnan(amax[0, 0]) if np.isnan(bad) else np.isposinf(amax[0, 0])


@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from([1, 64, 128]))
def test_scale_shape_is_a_ceiling_division(m, k, side):
    assert numerics.scale_shape((7, m, k), (side, 128)) == (
        7,
        -(-m // side),
        -(-k // 128),
    )


def test_tiles_join_to_what_was_split():
    x = jnp.arange(303 * 300.0).reshape(303, 300)
    tiles = numerics.split_tiles(x, (128, 128))
    assert tiles.shape == (3, 128, 3, 128)
    np.testing.assert_array_equal(numerics.join_tiles(tiles, x.shape), x)


def test_error_measures_know_a_known_error():
    expected = jnp.asarray([3.0, 4.0])
    actual = expected * 1.01
    np.testing.assert_allclose(
        numerics.relative_error(actual, expected), 0.01, rtol=1e-4
    )
    np.testing.assert_allclose(numerics.sqnr_db(actual, expected), 40, rtol=1e-4)
    np.testing.assert_allclose(
        numerics.cosine_similarity(actual, expected), 1, rtol=1e-6
    )
    with pytest.raises(ValueError, match="relative_error compares arrays of one shape"):
        numerics.sqnr_db(actual, expected[:1])


def test_formats_are_what_the_ocp_specification_says():
    e4m3, e5m2 = FORMATS
    assert numerics.max_value(e4m3) == 448
    assert numerics.max_value(e5m2) == 57344
    assert float(ml_dtypes.finfo(e4m3).smallest_normal) == 2.0**-6
    assert numerics.is_fp8(e4m3)
    assert not numerics.is_fp8(jnp.bfloat16)
